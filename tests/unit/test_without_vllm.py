"""What works where vLLM cannot be imported; for a whole run see pipeline/test_second_engine.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = """
import importlib, pkgutil, sys
from pathlib import Path

sys.modules["vllm"] = None  # any import of it, or of a part of it, fails from here on

import distill_system

parts_of_vllm = {
    "distill_system.rollout.padding_mask",
    "distill_system.weights.backends",
    "distill_system.weights.gloo",
    "distill_system.weights.sealed",
}
names = [m.name for m in pkgutil.walk_packages(distill_system.__path__, "distill_system.")]
assert parts_of_vllm < set(names)
for name in names:
    if name not in parts_of_vllm and not name.endswith("__main__"):
        importlib.import_module(name)

from typer.testing import CliRunner
from distill_system.cli import app

runs = Path(sys.argv[1])
quickstart = "configs/quickstart.yaml"
few = [f"data.{name}.num_examples=99" for name in ("teacher_sft", "student_sft", "prompts")]
planned = CliRunner().invoke(app, ["plan", quickstart, "rollout.engine=transformers", *few])
assert planned.exit_code == 0, planned.output
assert "transformers" in planned.output, planned.output
assert "vLLM" not in planned.output, planned.output

refused = CliRunner().invoke(app, ["train", quickstart, f"runs_directory={runs}"])
assert refused.exit_code == 1, refused.output
for way_out in ("vLLM is not installed", "rollout.engine=transformers", "[cuda]"):
    assert way_out in refused.output, refused.output
assert not list(runs.iterdir()), "nothing was begun"
print("done")
"""


def test_everything_but_vllms_own_parts_is_imported_and_the_default_engine_is_refused(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.endswith("done\n"), done.stderr[-3000:]

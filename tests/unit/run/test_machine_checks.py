"""A machine that lacks what a run asks for: told before anything starts. nvidia-smi is a fake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from distill_system.errors import ResourceError
from distill_system.run.machine_checks import machine_notes, machine_problems, require_machine

ON_A_GPU = tuple(
    f"pools.{name}.gpus=1"
    for name in ("student_rollout", "teacher_rollout", "teacher_scoring", "learner")
)
HALF = ("scoring.dtype=bfloat16", "rollout.teacher_engine.dtype=bfloat16")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let nvidia-smi print these lines, as it does for what is asked here."""

    def make(*lines: str) -> None:
        tool = tmp_path / "nvidia-smi"
        printed = "\n".join(lines)
        asked = "--query-gpu=name,memory.total,compute_cap --format=csv,noheader,nounits"
        tool.write_text(f"#!/bin/sh\n[ \"$*\" = '{asked}' ] && cat <<'END'\n{printed}\nEND\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return make


def test_a_dtype_that_the_gpu_lacks_is_told_by_every_key_that_asks_for_it(
    configure, install, monkeypatch
) -> None:
    install("Tesla T4, 15360, 7.5", "NVIDIA A100-SXM4-80GB, 81920, 8.0")
    [problem] = machine_problems(configure(*ON_A_GPU, *HALF))
    assert problem.startswith("rollout.teacher_engine.dtype, scoring.dtype: expected a dtype")
    assert "got bfloat16 on Tesla T4 of compute capability 7.5; bfloat16 needs 8" in problem
    with pytest.raises(ResourceError, match="Tesla T4"):
        require_machine(configure(*ON_A_GPU, *HALF))
    assert machine_problems(configure(*HALF)) == [], "its workers are on the CPU"
    assert machine_problems(configure(*ON_A_GPU)) == [], "float32 is everywhere"
    idle = ("distill.objective.on_policy_weight=1", "distill.measure_every=null")
    [problem] = machine_problems(configure(*ON_A_GPU, *HALF, *idle))
    assert problem.startswith("scoring.dtype: "), "teacher engines are not started"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert machine_problems(configure(*ON_A_GPU, *HALF)) == [], "the A100 alone"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert machine_problems(configure(*ON_A_GPU, *HALF)) == [], "other machines are asked later"


def test_gpus_of_unequal_memory_are_told(configure, install) -> None:
    install("NVIDIA A100-PCIE-40GB, 40960, 8.0", "NVIDIA A100-SXM4-80GB, 81920, 8.0")
    [note] = machine_notes(configure(*ON_A_GPU))
    assert "NVIDIA A100-PCIE-40GB 40 GiB, NVIDIA A100-SXM4-80GB 80 GiB" in note
    assert machine_notes(configure()) == [], "nobody uses them"
    install("NVIDIA H100 80GB HBM3, 81559, 9.0", "NVIDIA H100 80GB HBM3, 81225, 9.0")
    assert machine_notes(configure(*ON_A_GPU)) == [], "firmware keeps a little"
    install("Some GPU, [N/A], [N/A]")
    assert machine_notes(configure(*ON_A_GPU)) == machine_problems(configure(*ON_A_GPU)) == []


def test_a_network_interface_that_is_not_there_is_told_with_those_that_are(
    configure, install
) -> None:
    install()
    [problem] = machine_problems(configure("cluster.network_interface=ib7"))
    assert "has no network interface 'ib7'; it has " in problem
    assert "lo (127.0.0.1" in problem
    assert machine_problems(configure("cluster.network_interface=lo")) == []

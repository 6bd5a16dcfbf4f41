"""benchmarks/gpu_check.py in its small form, so that it is whole when a GPU is at hand.

That a proof can fail is shown by breaking what it proves.
"""

from __future__ import annotations

import importlib
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
CPU = torch.device("cpu")
WITHOUT = """
import runpy, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"ray", "vllm", "datasets", "rouge_score", "trl"}:
            raise ModuleNotFoundError(f"{name} is not on that machine", name=name)

sys.meta_path.insert(0, Missing())
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv.pop(0))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def load(monkeypatch):
    """Imports a module of benchmarks/, which is no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def findings(load):
    return load("gpu_findings").Findings(CPU, small=True)


def _failed(findings):
    return [each["what"] for each in findings.demands if not each["holds"]]


def test_all_proofs_run_on_a_machine_without_ray_and_vllm(tmp_path):
    written = tmp_path / "folder/check.json"
    options = ["--device", "cpu", "--small", "--output", str(written)]
    script = str(BENCHMARKS / "gpu_check.py")
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(BENCHMARKS), script, *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    report = json.loads(written.read_text(encoding="utf-8"))
    rows = {row["proof"]: row for row in report["rows"]}
    assert rows.keys() == {
        "attention",
        "publisher",
        "scorer",
        "chunks",
        "float32_attention",
        "equal_bits",
        "offload",
        "steps",
    }
    assert report["headline"] == {
        "passed": 8,
        "failed": 0,
        "aims_missed": 0,
        "seconds": pytest.approx(sum(row["seconds"] for row in rows.values())),
    }
    assert report["versions"]["torch"] == torch.__version__
    steps = rows["steps"]["numbers"]
    assert steps["ammd"]["plan"]["gib"] > 0
    assert steps["ammd"]["first_loss"] == pytest.approx(
        steps["ammd, float32"]["first_loss"], rel=0.02
    )


def test_a_window_that_is_one_token_too_wide_is_found(load, findings, monkeypatch):
    attention = load("gpu_attention")
    real = attention.packed_attention

    def wrong(*arguments, sliding_window, **rest):
        return real(*arguments, sliding_window=sliding_window + 1, **rest)

    errors = attention._compare(findings, (1, 9, 30), 16, 2, 5, autocast=False)
    assert max(errors.values()) < attention.BFLOAT16_LIMIT
    monkeypatch.setattr(attention, "packed_attention", wrong)
    errors = attention._compare(findings, (1, 9, 30), 16, 2, 5, autocast=False)
    assert min(errors.values()) > attention.BFLOAT16_LIMIT


def test_a_publisher_that_sends_what_the_parameters_are_later_is_found(load, findings, monkeypatch):
    transfer = load("gpu_transfer")
    buckets = importlib.import_module("distill_system.weights.buckets").Buckets
    real = buckets.fill
    transfer.prove_publisher(findings)
    assert _failed(findings) == []

    def fill_later(self, named):
        held = list(named)
        real(self, [(name, torch.full_like(tensor, 7.0)) for name, tensor in held])

    monkeypatch.setattr(buckets, "fill", fill_later)
    transfer.prove_publisher(findings)
    assert _failed(findings) == [
        "version 1: the old bytes arrive",
        "version 2: the old bytes arrive",
    ]


def test_targets_that_are_rounded_otherwise_are_found(load, findings, monkeypatch):
    scorer = importlib.import_module("distill_system.scoring").TeacherScorer
    monkeypatch.setattr(
        scorer, "_to_wire", lambda self, rows, signal: (rows.float() * 1.01).half().numpy()
    )
    load("gpu_reading").prove_scorer(findings)
    assert _failed(findings) == [
        f"{name}: every way of conversion gives the same bits"
        for name in ("features", "expected_embedding")
    ]


def test_an_older_torch_is_given_equal_heads_and_no_unknown_keyword(load, monkeypatch):
    module = load("gpu_findings")
    packed = importlib.import_module("distill_system.language_model.packed_attention")
    asked = {}

    def varlen_of_2_11(query, key, value, boundaries, *, window_size):
        asked.update(heads=[each.shape[1] for each in (query, key, value)], window=window_size)

    monkeypatch.setattr(packed, "varlen_attn", packed.varlen_attn)
    assert module.adapt_to_older_torch() is None  # this torch knows the keyword
    monkeypatch.setattr(module, "varlen_attn", varlen_of_2_11)
    assert "enable_gqa" in module.adapt_to_older_torch()
    states = [torch.zeros(5, heads, 8) for heads in (6, 2, 2)]
    packed.varlen_attn(*states, None, window_size=(-1, 0), enable_gqa=True)
    assert asked == {"heads": [6, 6, 6], "window": (-1, 0)}


def _hangs(findings):
    findings.note("found", 3)
    time.sleep(600)


def _dies(findings):
    findings.note("found", 4)
    os._exit(9)


def _fails_in_parts(findings):
    with findings.part("first"):
        raise ValueError("the first part's error")
    with findings.part("second"):
        findings.require("the second part runs", True)


@pytest.mark.parametrize(
    ("prove", "seconds", "found", "problem"),
    [(_hangs, 2.0, {"found": 3}, "not done within its 2 s"), (_dies, 60.0, {"found": 4}, "with 9")],
)
def test_a_proof_that_does_not_end_well_leaves_what_it_found(load, prove, seconds, found, problem):
    check = load("gpu_check")
    row = check.run_proof(
        check.Proof("trial", prove, seconds),
        "cpu",
        small=True,
        seconds=seconds,
        context=multiprocessing.get_context("fork"),
    )
    assert row["numbers"] == found
    assert problem in row["problem"]
    assert not row["passed"]
    assert check.count_demands([row])["failed"] == 1
    assert row["seconds"] < 30.0


def test_a_part_that_fails_costs_the_others_nothing(findings):
    _fails_in_parts(findings)
    first, second = findings.demands
    assert (first["what"], first["holds"]) == ("first", False)
    assert "the first part's error" in first["problem"][-1]
    assert second["holds"]


@pytest.mark.parametrize(
    ("value", "holds"), [(0.5, True), (1.5, False), (math.nan, False), (np.float32(0.5), True)]
)
def test_a_demand_holds_within_its_limits_alone(findings, value, holds):
    findings.demand("a number", value, at_most=1.0, is_aim=True)
    findings.demand("a number", value, at_least=-1.0, at_most=1.0)
    assert [each["holds"] for each in findings.demands] == [holds, holds]


def test_full_sizes_are_refused_on_a_cpu(load, capsys):
    with pytest.raises(SystemExit):
        load("gpu_check").main(["--device", "cpu"])
    assert "expected --small" in capsys.readouterr().err

"""The alarm on what a step's text says of engines and learner; perplexities by source."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distill_system.config import load_config
from distill_system.driver.measuring import Measuring
from distill_system.errors import TransferError

CONFIGURATION = Path(__file__).parents[3] / "configs" / "quickstart.yaml"


def _measuring(**rollout: Any) -> tuple[Measuring, list[str]]:
    changes = [f"rollout.{key}={value}" for key, value in rollout.items()]
    config = load_config([CONFIGURATION], changes)
    notes: list[str] = []
    context: Any = SimpleNamespace(config=config, view=SimpleNamespace(note=notes.append))
    nothing: Any = None
    return Measuring(context, nothing, nothing), notes


def test_a_step_whose_gap_has_risen_is_told_of_with_the_cause() -> None:
    """The run of issue 12: 0.13 nats at first, 0.69 two steps later; held-out text saw nothing."""
    measuring, notes = _measuring(
        **{"student_engine.dtype": "bfloat16", "weight_rounding": "nearest"}
    )
    for gap in (0.13, 0.35):
        measuring.check_step({"learner/logprob_gap": gap})
    assert notes == []
    measuring.check_step({"learner/logprob_gap": 0.69})
    [note] = notes
    assert "mean 0.69 nats (text of the step), 0.13 when it was first measured" in note
    assert "do not follow small updates" in note
    assert "rollout.weight_rounding=stochastic" in note


def test_a_step_above_the_limit_ends_the_run() -> None:
    measuring, _ = _measuring(max_logprob_gap=0.2)
    measuring.check_step({"learner/logprob_gap": 0.19})
    with pytest.raises(TransferError, match=r"text of the step.*max_logprob_gap allows 0\.2"):
        measuring.check_step({"learner/logprob_gap": 0.21})


def test_a_step_that_cannot_tell_is_not_judged() -> None:
    measuring, notes = _measuring(max_logprob_gap=0.2)
    measuring.check_step({"learner/loss": 5.0})
    truncated, _ = _measuring(**{"max_logprob_gap": 0.2, "sampling.top_p": 0.9})
    truncated.check_step({"learner/logprob_gap": 3.0})
    assert notes == []


def test_a_source_is_measured_by_the_perplexities_of_all_its_tokens() -> None:
    counts = {"student_prompts_per_step": 1, "teacher_prompts_per_step": 1}
    config = load_config([CONFIGURATION, {"distill": counts}])
    asked: list[int] = []

    def teacher(rows: Any) -> list[Any]:
        asked.append(len(rows))
        return [np.full(row, -1.0, np.float32) for row in rows]

    def student(rows: Any) -> list[Any]:
        return [np.full(row, -float(row), np.float32) for row in rows]

    pools: Any = SimpleNamespace(
        scorers=SimpleNamespace(read_logprobs=teacher),
        learner=SimpleNamespace(read_logprobs=student),
    )
    rows = {"a": [1, 2, 3], "b": [1]}  # a row stands for as many tokens, -itself nats each
    data: Any = SimpleNamespace(source_held_out=rows)
    context: Any = SimpleNamespace(config=config)
    measuring = Measuring(context, pools, data)
    a = math.exp((1 * 1 + 2 * 2 + 3 * 3) / 6 - 1.0)
    for _ in range(2):
        assert measuring.measure_sources() == pytest.approx({"a": a, "b": 1.0})
    assert sorted(asked) == [1, 1, 2], "the teacher does not change: once, a step's rows at a time"

import math

import pytest

from distill_system.errors import TransferError
from distill_system.weights import GapAlarm, explain_gap


def _alarm(
    *, limit: float | None = None, lower_precision: bool = False, cause: str = ""
) -> GapAlarm:
    return GapAlarm("held-out", limit=limit, lower_precision=lower_precision, cause=cause)


def test_a_small_gap_is_not_worth_a_word() -> None:
    assert _alarm().judge(1e-6, 1e-4) is None
    assert _alarm(lower_precision=True).judge(0.3, 2.0) is None
    assert _alarm(limit=0.3).judge(0.3, 2.0) is None


def test_an_unusual_gap_is_noted_with_what_to_look_at() -> None:
    note = _alarm(cause="because of this; ").judge(0.3, 2.5)
    assert note is not None
    assert "mean 0.3 nats, largest 2.5 (held-out)" in note
    assert "because of this; look at the last versions" in note
    assert "rollout.max_logprob_gap" in note
    without = _alarm().judge(0.3)
    assert without is not None
    assert "largest" not in without


@pytest.mark.parametrize("gap", [0.21, math.nan, math.inf])
def test_a_gap_above_the_limit_ends_the_run_even_where_it_is_usual(gap: float) -> None:
    with pytest.raises(TransferError, match=r"rollout\.max_logprob_gap allows 0\.2"):
        _alarm(limit=0.2, lower_precision=True).judge(gap, 1.0)


@pytest.mark.parametrize(("lower_precision", "usual"), [(False, 0.1), (True, 0.5)])
def test_without_a_limit_of_ones_own_the_documented_one_warns(
    lower_precision: bool, usual: float
) -> None:
    """rollout.max_logprob_gap: null warns at 0.1 in float32 and 0.5 below."""
    quiet, told = (
        _alarm(lower_precision=lower_precision).judge(usual + by, 1.0) for by in (-0.01, 0.01)
    )
    assert quiet is None
    assert told is not None
    assert f"usually below {usual}" in told


@pytest.mark.parametrize(
    ("first", "quiet", "told"),
    [(0.13, 0.38, 0.4), (0.02, 0.059, 0.061), (0.001, 0.049, 0.051), (0.3, 0.49, 0.51)],
)
def test_in_lower_precision_a_gap_that_triples_is_told_of(
    first: float, quiet: float, told: float
) -> None:
    """What precision costs hardly changes; an engine that is left behind shows by the rise."""
    alarm = _alarm(lower_precision=True)
    assert [alarm.judge(first), alarm.judge(quiet)] == [None, None]
    note = alarm.judge(told)
    assert note is not None
    assert f"mean {told} nats" in note


def test_a_first_gap_says_what_it_was() -> None:
    alarm = _alarm(lower_precision=True)
    alarm.judge(0.13)
    assert "0.13 when it was first measured" in str(alarm.judge(0.69))


def test_in_float32_a_gap_may_rise_to_the_usual_limit() -> None:
    alarm = _alarm()
    assert [alarm.judge(gap) for gap in (3e-7, 1e-3, 0.09)] == [None] * 3


def test_what_was_told_is_told_again_only_when_it_has_doubled() -> None:
    alarm = _alarm(lower_precision=True)
    said = [alarm.judge(gap) is not None for gap in (0.1, 0.6, 0.7, 1.1, 1.3, 0.6, 2.7)]
    assert said == [False, True, False, False, True, False, True]


def test_a_nan_is_told_of_each_time() -> None:
    alarm = _alarm(lower_precision=True)
    assert [alarm.judge(math.nan) is not None for _ in range(2)] == [True, True]


@pytest.mark.parametrize(
    ("engine", "rounding", "learner", "expected"),
    [
        ("bfloat16", "nearest", "float32", "rollout.weight_rounding=stochastic"),
        ("float16", "nearest", "float32", "rollout.student_engine.dtype=bfloat16"),
        ("float32", "none", "bfloat16", "learner.compute_dtype=float32"),
        ("bfloat16", "stochastic", "float32", ""),
        ("bfloat16", "nearest", "bfloat16", ""),
        ("float32", "none", "float32", ""),
    ],
)
def test_the_cause_is_told_where_the_precisions_are_known_to_part(
    engine: str, rounding: str, learner: str, expected: str
) -> None:
    said = explain_gap(engine=engine, rounding=rounding, learner=learner)
    assert expected in said
    assert bool(said) is bool(expected)

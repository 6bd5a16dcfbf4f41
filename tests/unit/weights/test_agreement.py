import math

import pytest

from distill_system.errors import TransferError
from distill_system.weights import check_logprob_gap


def test_a_small_gap_is_not_worth_a_word() -> None:
    assert check_logprob_gap(1e-6, 1e-4, limit=None, lower_precision=False) is None
    assert check_logprob_gap(0.3, 2.0, limit=None, lower_precision=True) is None
    assert check_logprob_gap(0.3, 2.0, limit=0.3, lower_precision=False) is None


def test_an_unusual_gap_is_noted_with_what_to_look_at() -> None:
    note = check_logprob_gap(0.3, 2.5, limit=None, lower_precision=False)
    assert note is not None
    assert "mean 0.3 nats, largest 2.5" in note
    assert "rollout.max_logprob_gap" in note


@pytest.mark.parametrize("gap", [0.21, math.nan, math.inf])
def test_a_gap_above_the_limit_ends_the_run_even_where_it_is_usual(gap: float) -> None:
    with pytest.raises(TransferError, match=r"rollout\.max_logprob_gap allows 0\.2"):
        check_logprob_gap(gap, 1.0, limit=0.2, lower_precision=True)


@pytest.mark.parametrize(("lower_precision", "usual"), [(False, 0.1), (True, 0.5)])
def test_without_a_limit_of_ones_own_the_documented_one_warns(
    lower_precision: bool, usual: float
) -> None:
    """rollout.max_logprob_gap: null warns at 0.1 in float32 and 0.5 below."""
    quiet, told = (
        check_logprob_gap(usual + by, 1.0, limit=None, lower_precision=lower_precision)
        for by in (-0.01, 0.01)
    )
    assert quiet is None
    assert told is not None
    assert f"usually below {usual}" in told

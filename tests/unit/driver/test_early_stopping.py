from __future__ import annotations

import math

import pytest

from distill_system.config.distill import EarlyStoppingConfig
from distill_system.driver.early_stopping import EarlyStopping

LOSS = "held_out/cross_entropy"


def _stopping(**changes):
    return EarlyStopping(
        EarlyStoppingConfig(**{"metric": LOSS, "mode": "min", "patience": 2, **changes})
    )


def _ends_at(stopping, values):
    """Number of measurements after which it is due; None if it never is."""
    for number, value in enumerate(values, start=1):
        stopping.observe({LOSS: value, "learner/loss": -number})
        if stopping.is_due:
            return number
    return None


@pytest.mark.parametrize(
    ("changes", "values", "ends"),
    [
        ({}, [5.0, 4.0, 3.0, 2.0, 1.0], None),
        ({}, [5.0, 4.0, 4.5, 4.2], 4),
        ({}, [5.0, 4.0, 4.5, 3.9, 4.5], None),
        ({}, [5.0, 4.0, 4.0, 4.0], 4),
        ({"patience": 1}, [5.0, 5.1], 2),
        ({"min_gain": 0.5}, [5.0, 4.6, 4.4, 4.3, 4.0], 5),
        ({"min_gain": 0.5}, [5.0, 4.5, 4.5], 3),
        ({"mode": "max"}, [1.0, 2.0, 1.5, 1.5], 4),
        ({"mode": "max"}, [1.0, 2.0, 3.0], None),
        ({}, [5.0, math.nan, None], 3),
        ({}, [math.nan, 5.0, 4.0, math.inf, 3.0], None),
    ],
)
def test_it_ends_after_so_many_measurements_without_a_gain(changes, values, ends):
    assert _ends_at(_stopping(**changes), values) == ends


def test_steps_that_measure_nothing_do_not_count():
    stopping = _stopping(patience=1)
    stopping.observe({LOSS: 1.0})
    for _ in range(5):
        stopping.observe({"learner/loss": 1.0})
    assert not stopping.is_due


@pytest.mark.parametrize("cut", range(7))
def test_a_resumed_run_ends_where_one_life_would(cut):
    values = [5.0, 4.0, 4.1, 3.9, 4.0, 4.0, 3.0]
    whole = _ends_at(_stopping(), values)
    assert whole == 6
    first = _stopping()
    if cut < whole:
        assert _ends_at(first, values[:cut]) is None
        second = _stopping()
        second.restore(first.state())
        assert cut + (_ends_at(second, values[cut:]) or 99) == whole


def test_a_count_of_another_metric_begins_anew():
    first = _stopping()
    _ends_at(first, [1.0, 2.0])
    other = _stopping(metric="evaluation/test/rouge_l_greedy", mode="max")
    other.restore(first.state())
    assert (other.best, other.without_gain) == (None, 0)
    older = _stopping()
    older.restore({})
    assert (older.best, older.without_gain) == (None, 0)


def test_the_reason_names_metric_value_and_key():
    stopping = _stopping(min_gain=0.25)
    _ends_at(stopping, [5.0, 4.0, 4.0, 4.0])
    assert stopping.reason == (
        "distill.early_stopping: held_out/cross_entropy was not better than 4 by more than 0.25 "
        "in 2 measurements in a row"
    )


def test_without_a_configuration_it_never_ends():
    stopping = EarlyStopping(None)
    stopping.observe({LOSS: 1.0})
    assert not stopping.is_due

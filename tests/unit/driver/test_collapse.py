"""Series of metrics that collapse, and such that do not."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from distill_system.config.distill import CollapseConfig
from distill_system.driver.collapse import SIGNALS, CollapseWatch

LENGTH = "learner/mean_student_response_tokens"
CURVES = Path(__file__).with_name("quickstart_curves.json")


def _watch(**changes):
    return CollapseWatch(CollapseConfig(**{"window": 5, **changes}))


def _lines(watch, rows):
    """Lines of all rows; each is the metrics of a step."""
    return [line for row in rows for line in watch.observe(row)[1]]


def _noisy(means, share=0.15, seed=0):
    rng = np.random.default_rng(seed)
    return [float(mean * (1 + share * rng.standard_normal())) for mean in means]


def _rows(**columns):
    """One row of metrics a step, from columns by a short name."""
    names = {
        "length": LENGTH,
        "teacher_length": "teacher_text/mean_tokens",
        "ended": "learner/student_ended_share",
        "teacher_ended": "teacher_text/ended_share",
        "entropy": "student_text/entropy",
        "teacher_entropy": "teacher_text/entropy",
        "distinct": "student_text/distinct_trigrams",
        "overlap": "held_out/top_token_overlap",
    }
    return [
        dict(zip((names[key] for key in columns), values, strict=True))
        for values in zip(*columns.values(), strict=True)
    ]


STEADY = [50.0] * 30


@pytest.mark.parametrize(
    ("columns", "signal"),
    [
        ({"length": _noisy([*STEADY, *np.linspace(50, 8, 30)])}, "short"),
        ({"length": _noisy([*STEADY, *np.linspace(50, 250, 30)])}, "long"),
        ({"ended": [0.9] * 30 + [0.3] * 10}, "unended"),
        ({"entropy": _noisy([1.2] * 30 + [0.1] * 10)}, "sure"),
        ({"entropy": _noisy([1.2] * 30 + [5.0] * 10)}, "random"),
        ({"distinct": _noisy([0.8] * 30 + [0.2] * 10)}, "repetitive"),
        ({"overlap": [0.6, 0.65, 0.3, 0.2]}, "apart"),
        # away from the teacher, too
        ({"length": [50.0] * 20 + [10.0] * 20, "teacher_length": [60.0] * 40}, "short"),
        ({"ended": [0.9] * 20 + [0.2] * 20, "teacher_ended": [0.8] * 40}, "unended"),
    ],
)
def test_a_collapse_is_told_once_and_by_its_name(columns, signal):
    watch = _watch()
    rows = _rows(**columns)
    [line] = _lines(watch, rows)
    judged = watch.observe(rows[-1])[0]
    assert {name for name, value in judged.items() if value} == {f"collapse/{signal}"}
    [found] = [each for each in SIGNALS if each.name == signal]
    assert found.title in line
    assert f"distill.collapse.{found.key}" in line


@pytest.mark.parametrize(
    "columns",
    [
        {"length": _noisy(STEADY * 3, share=0.3)},
        # the student learns to end: its answers become those of the teacher
        {
            "length": _noisy([250] * 10 + [30] * 40),
            "teacher_length": _noisy([32] * 50),
            "ended": [0.02] * 10 + [0.99] * 40,
            "teacher_ended": [0.97] * 50,
            "entropy": _noisy([4.0] * 10 + [0.3] * 40),
            "teacher_entropy": _noisy([0.35] * 50),
        },
        # a teacher that thinks for long teaches a student that did not
        {"length": _noisy([20] * 10 + [400] * 40), "teacher_length": _noisy([420] * 50)},
        {"overlap": [0.5, 0.55, 0.6, 0.62, 0.61]},
        # one odd step is none
        {"length": [50.0] * 20 + [1.0] + [50.0] * 20},
        {"entropy": [1.0] * 20 + [math.nan, 1e9] + [1.0] * 3},
        {"ended": [0.0] * 40},
    ],
)
def test_what_is_no_collapse_is_not_told(columns):
    watch = _watch(max_entropy=None) if "entropy" in columns else _watch()
    rows = _rows(**columns)
    assert _lines(watch, rows) == []
    assert not any(watch.observe(rows[-1])[0].values())


def test_nothing_is_said_of_the_curves_of_a_real_run():
    """Those of the quickstart's distillation, by the defaults."""
    curves = json.loads(CURVES.read_text("utf-8"))
    length = len(curves[LENGTH])
    assert length >= 60
    rows = [
        {name: values[at] for name, values in curves.items() if values[at] is not None}
        for at in range(length)
    ]
    watch = CollapseWatch(CollapseConfig())
    assert _lines(watch, rows) == []
    judged = watch.observe(rows[-1])[0]
    steps = [signal for signal in SIGNALS if signal.metric in rows[-1]]
    assert set(judged) == {f"collapse/{signal.name}" for signal in steps}
    assert len(judged) >= 6


def test_a_collapse_that_passes_is_told_of_again_when_it_comes_back():
    rows = _rows(length=[50.0] * 20 + [5.0] * 20 + [50.0] * 20 + [5.0] * 20)
    assert len(_lines(_watch(), rows)) == 2


def test_an_alarm_is_repeated_while_it_lasts():
    rows = _rows(length=[50.0] * 20 + [5.0] * 21)
    watch = _watch(action="alarm")
    told = [at for at, row in enumerate(rows, start=1) if watch.observe(row)[1]]
    first, *later = told
    assert later == list(range(first + 5, 42, 5))
    assert not watch.ends_run


def test_a_run_is_ended_where_the_configuration_says_so():
    rows = _rows(length=[50.0] * 20 + [5.0] * 20)
    watch = _watch(action="stop")
    for row in rows[:20]:
        watch.observe(row)
    assert not watch.ends_run
    for row in rows[20:]:
        watch.observe(row)
    assert watch.ends_run
    assert "mean length" in watch.reason
    noting = _watch()
    _lines(noting, rows)
    assert not noting.ends_run


def test_a_limit_that_is_null_does_not_judge():
    rows = _rows(length=[50.0] * 20 + [5.0] * 20)
    assert _lines(_watch(min_length=None), rows) == []


@pytest.mark.parametrize("cut", [1, 4, 7, 11, 23, 26])
def test_a_resumed_run_judges_as_one_life_would(cut):
    rows = _rows(
        length=_noisy([50] * 20 + [12] * 12),
        entropy=_noisy([1] * 32),
        teacher_length=STEADY + [50.0] * 2,
    )
    whole, first, second = _watch(), _watch(), _watch()
    expected = [whole.observe(row)[0] for row in rows]
    assert any(judged.get("collapse/short") for judged in expected)
    assert [first.observe(row)[0] for row in rows[:cut]] == expected[:cut]
    second.restore(json.loads(json.dumps(first.state())))
    assert [second.observe(row)[0] for row in rows[cut:]] == expected[cut:]


def test_a_window_of_another_size_begins_anew():
    first = _watch()
    _lines(first, _rows(length=STEADY))
    second = _watch(window=6)
    second.restore(first.state())
    judged = [second.observe(row)[0] for row in _rows(length=STEADY[:12])]
    assert judged[10] == {}
    assert judged[11] == {"collapse/short": 0.0, "collapse/long": 0.0}


def test_signals_have_a_limit_each_and_every_limit_a_signal():
    limits = set(CollapseConfig.model_fields) - {"action", "window"}
    assert {signal.key for signal in SIGNALS} == limits

"""Weights of sources against the printed formula, and their bounds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_system.config import load_config
from distill_system.config.data import TeacherGapConfig
from distill_system.data import PromptFrontier, SourceShare
from distill_system.errors import ConfigError
from distill_system.streams.source_weights import SourceWeights

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
RATIOS = st.lists(st.lists(st.floats(0.1, 50.0), min_size=3, max_size=3), min_size=1, max_size=12)


def _printed(measured, smoothing, cap):
    """DDK's update as its page prints it, over all measurements, with the cap."""
    history = []
    for rho in measured:
        e = [math.exp(min(cap, each)) for each in rho]
        if not history:
            history.append([each / sum(e) for each in e])
            continue
        psi = [r * each for r, each in zip(history[-1], e, strict=True)]
        r = [smoothing * each / sum(psi) + (1 - smoothing) / len(psi) for each in psi]
        history.append(r)
    return history


def _weights(names="abc", **settings):
    return SourceWeights(TeacherGapConfig(**settings), list(names), delay=1)


@given(RATIOS, st.floats(0.05, 0.99), st.floats(1.0, 20.0))
def test_the_weights_are_those_of_the_printed_formula(measured, smoothing, cap):
    weights, expected = _weights(smoothing=smoothing, cap=cap), _printed(measured, smoothing, cap)
    for done, (rho, wanted) in enumerate(zip(measured, expected, strict=True)):
        told = weights.observe(done, dict(zip("abc", rho, strict=True)))
        assert list(told.values()) == pytest.approx(wanted)
        assert sum(told.values()) == pytest.approx(1.0)
        if done:
            assert min(told.values()) >= (1 - smoothing) / 3 - 1e-12, "never below the floor"


@given(st.floats(0.5, 9.0), st.integers(1, 30))
def test_equal_ratios_keep_equal_weights(rho, times):
    weights = _weights()
    for done in range(times):
        told = weights.observe(done, dict.fromkeys("abc", rho))
    assert list(told.values()) == pytest.approx([1 / 3] * 3)


def test_a_lasting_gap_grows_to_all_that_the_floor_leaves():
    weights = _weights(smoothing=0.5, cap=5.0)
    for done in range(20):
        told = weights.observe(done, {"a": 1e6, "b": 1.0, "c": 1.0})
    assert list(told.values()) == pytest.approx([0.5 + 0.5 / 3, 0.5 / 3, 0.5 / 3], abs=0.02)


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_a_measurement_holds_for_steps_whose_prompts_cannot_be_out_yet(staleness):
    weights = SourceWeights(TeacherGapConfig(every=2), ["a", "b"], delay=staleness + 1)
    assert [done for done in range(7) if weights.is_due(done)] == [0, 2, 4, 6]
    assert weights.at(0) is None
    weights.observe(0, {"a": 1.0, "b": 2.0})
    first = weights.at(0)
    assert first is not None
    weights.observe(2, {"a": 1.0, "b": 2.0})
    assert weights.at(2 + staleness) == first
    second = weights.at(3 + staleness)
    assert second != first
    weights.observe(4, {"a": 1.0, "b": 2.0})
    assert weights.at(4 + staleness) == second != weights.at(5 + staleness)


def test_a_checkpoint_keeps_what_the_steps_to_come_need():
    weights, again = (SourceWeights(TeacherGapConfig(), ["a", "b"], delay=3) for _ in range(2))
    for done in range(9):
        weights.observe(done, {"a": 1.0, "b": 1.0 + done})
        again.restore(json.loads(json.dumps(weights.state())))
        assert [again.at(step) for step in range(done, done + 9)] == [
            weights.at(step) for step in range(done, done + 9)
        ]
        assert len(weights.state()) <= 5, "it does not grow with the run"


def _frontier():
    shares = [SourceShare("a", 5), SourceShare("b", 7)]
    return PromptFrontier(shares, 1, "prompts")


def test_a_walk_takes_turns_by_new_weights_without_making_up_for_the_old_ones():
    frontier = _frontier()
    assert sum(index < 5 for index in frontier.take(40)) == 20
    for weights, from_a in (([0.9, 0.1], 36), ([0.25, 0.75], 10), ([0.5, 0.5], 20)):
        taken = frontier.take(40, weights=weights)
        assert abs(sum(index < 5 for index in taken) - from_a) <= 1
    taken = frontier.take(20, weights=[1.0, 1e-9])
    assert [sorted(taken[at : at + 5]) for at in (5, 10)] != [taken[5:10], taken[10:15]], "shuffled"


@pytest.mark.parametrize("at", [0, 3, 11, 30])
def test_a_walk_goes_on_by_the_weights_that_it_had(at):
    frontier, again = _frontier(), _frontier()
    frontier.take(7)
    frontier.take(at, weights=[0.8, 0.2])
    again.restore(json.loads(json.dumps(frontier.state())))
    assert again.take(40) == frontier.take(40)


ROWS = "{type: embedded, split: train, num_examples: 8}"


@pytest.mark.parametrize(
    ("sources", "policy", "said"),
    [
        (f"{{a: {{source: {ROWS}}}, b: {{source: {ROWS}}}}}", "{}", r"got held_out in none of"),
        (f"{{a: {{source: {ROWS}, held_out: {ROWS}}}}}", "{}", r"two sources or more"),
        (
            f"{{a: {{source: {ROWS}, held_out: {ROWS}, weight: 2}}, "
            f"b: {{source: {ROWS}, held_out: {ROWS}}}}}",
            "{}",
            r"no weight in each.*\[1\.0, 2\.0\]",
        ),
        (f"{{a: {{source: {ROWS}, held_out: {ROWS}}}}}", "null", r"give policy, such as"),
    ],
)
def test_a_policy_needs_rows_to_measure_on(sources, policy, said):
    override = f"data.prompts={{type: mixture, sources: {sources}, policy: {policy}}}"
    with pytest.raises(ConfigError, match=said):
        load_config([QUICKSTART], [override])

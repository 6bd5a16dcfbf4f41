"""Which pools a run starts, and which it says that it does without."""

from __future__ import annotations

import pytest

from distill_system.cluster import pools_demand
from distill_system.errors import ConfigError
from distill_system.run.settings_notes import settings_notes

ROWS = ("distill.off_policy_source=dataset", "data.student_sft={type: jsonl, path: rows.jsonl}")
SFT = ("distill.objective={type: token_matching, off_policy: {type: cross_entropy}}", *ROWS)
ON_POLICY = "distill.objective.on_policy_weight=1"
UNMEASURED = "distill.measure_every=null"
BESIDE = ("pools.teacher_scoring.colocate_with=teacher_rollout",)
ALL = {"student_rollout", "teacher_rollout", "teacher_scoring", "learner"}
NO_TEACHER_ENGINE = ALL - {"teacher_rollout"}


@pytest.mark.parametrize(
    ("overrides", "started", "first"),
    [
        ((), ALL, False),
        ((UNMEASURED,), ALL, False),
        # the teacher writes for no step, and its held-out text and evaluation are wanted once
        ((ON_POLICY,), NO_TEACHER_ENGINE, True),
        (ROWS, NO_TEACHER_ENGINE, True),
        (("distill.off_policy_source={teacher: 1, dataset: 9}", ROWS[1]), ALL, False),
        ((ON_POLICY, UNMEASURED), NO_TEACHER_ENGINE, False),
        # an objective that asks the teacher for nothing: only measures read the scorers
        (SFT, NO_TEACHER_ENGINE, True),
        ((*SFT, UNMEASURED), {"student_rollout", "learner"}, False),
        # engines of their own evaluate, and the student's others have nothing to do
        (
            (*SFT, UNMEASURED, "pools.evaluation={count: 1}"),
            {"evaluation", "learner"},
            False,
        ),
        (("pools.evaluation={count: 1}",), {*ALL, "evaluation"}, False),
    ],
)
def test_a_pool_is_started_if_somebody_reads_it(configure, overrides, started, first) -> None:
    config = configure(*overrides)
    assert set(config.started_pools) == started
    assert config.teacher_writes_first is first
    notes = settings_notes(config)
    for name in config.pools.by_name.keys() - started:
        told = f"not started: {name} (nobody reads it)"
        assert (told in notes) is not (first and name == "teacher_rollout")
    assert any(note.startswith("teacher_rollout writes held-out text") for note in notes) is first


def test_scorers_that_only_measure_are_told(configure) -> None:
    [note] = [note for note in settings_notes(configure(*SFT)) if "teacher_scoring" in note]
    assert note.startswith("teacher_scoring is started for measures on data.held_out alone")


def test_a_scorer_beside_nobody_stands_by_itself(configure) -> None:
    assert configure(*BESIDE).started_pools["teacher_scoring"].colocate_with == "teacher_rollout"
    alone = configure(*BESIDE, ON_POLICY).started_pools["teacher_scoring"]
    assert alone.colocate_with is None


def test_a_run_needs_room_for_its_fullest_moment_alone(configure) -> None:
    """The teacher's four CPUs and the two of the others are never held at once."""
    small = [f"pools.{name}.cpus=0.5" for name in ALL]
    large = (*small, "pools.teacher_rollout.cpus=4")
    assert pools_demand(configure(*large)) == {"CPU": 5.5}
    assert pools_demand(configure(*large, ON_POLICY)) == {"CPU": 4.0}
    assert pools_demand(configure(*large, ON_POLICY, UNMEASURED)) == {"CPU": 1.5}


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ("distill.keep_best={metric: held_out/cross_entropy, mode: min}",),
            "this run measures no 'held_out/cross_entropy'",
        ),
        ((*ROWS, "distill.replay={}"), "replay follows the loss on data.held_out"),
    ],
)
def test_what_follows_measures_is_refused_without_any(configure, overrides, told) -> None:
    configure(*overrides)
    with pytest.raises(ConfigError, match=told):
        configure(*overrides, UNMEASURED)

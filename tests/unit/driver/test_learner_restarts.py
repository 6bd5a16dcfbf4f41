"""When a learner starts anew, and when its loss ends the run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from distill_system.config.pools import FaultsConfig
from distill_system.driver.learner_restarts import LearnerRestarts
from distill_system.errors import DeadlineError, NonFiniteError, WorkerLostError
from distill_system.observe import FaultLog, RunDirectory
from distill_system.observe.fault_log import read_faults


@pytest.fixture
def make(tmp_path):
    """Restarts of a learner whose starts raise what is given, in their order."""

    def build(*failures, most=5):
        left, notes = list(failures), list[str]()

        def start_anew():
            if left:
                raise left.pop(0)

        context: Any = SimpleNamespace(
            config=SimpleNamespace(faults=FaultsConfig(max_replacements=most)),
            view=SimpleNamespace(note=notes.append),
            stop=SimpleNamespace(is_made=False),
        )
        log = FaultLog(RunDirectory(tmp_path), "distill", ["learner"])
        made.append(log)
        return LearnerRestarts(context, "learner", log, start_anew), log, notes

    made: list[FaultLog] = []
    yield build
    for log in made:
        log.close()


def _died(rank=0):
    return WorkerLostError(f"learner-{rank} died of something", f"learner-{rank}")


def _nan():
    error = NonFiniteError("the loss is nan")
    error.worker = "learner-1"
    return error


@pytest.mark.parametrize(
    ("error", "rank"),
    [
        (_died(1), "learner-1"),
        (DeadlineError("it takes too long", ["teacher_scoring-0", "learner-2"]), "learner-2"),
        (_nan(), "learner-1"),
    ],
)
def test_a_lost_rank_starts_all_anew_and_what_it_cost_is_written_down(make, tmp_path, error, rank):
    restarts, log, notes = make()
    log.step = 17
    restarts.lose(error)
    restarts.restart()
    restarts.goes_on_after(10)
    lost, restarted = read_faults(RunDirectory(tmp_path))
    assert (lost.worker, lost.event, lost.step) == (rank, "lost", 17)
    assert (restarted.worker, restarted.event, restarted.steps_again) == (rank, "restarted", 7)
    assert restarted.seconds is not None
    assert "all ranks start anew" in notes[0]
    assert "7 steps are made again" in notes[1]
    assert log.metrics() == {"faults/learner": 1.0}
    assert log.step == 10, "losses from here on are told from here"
    restarts.goes_on_after(10)
    assert len(read_faults(RunDirectory(tmp_path))) == 2, "it is told once"


@pytest.mark.parametrize(
    "error",
    [
        WorkerLostError("teacher_scoring-0 died", "teacher_scoring-0"),
        DeadlineError("others are late", ["student_rollout-0"]),
        NonFiniteError("raised in this process"),
    ],
)
def test_what_another_worker_did_is_not_the_learners_loss(make, error):
    restarts, _, _ = make()
    with pytest.raises(type(error)) as caught:
        restarts.lose(error)
    assert caught.value is error


def test_a_rank_that_is_lost_while_they_start_begins_it_again(make):
    restarts, log, _ = make(_died(1), _died(0))
    restarts.lose(_died())
    log.step = 1
    restarts.restart()
    assert log.metrics() == {"faults/learner": 3.0}


def test_a_learner_that_does_not_get_past_a_step_ends_the_run(make):
    restarts, log, _ = make(most=100)
    for step in (4, 9, 9):
        log.step = step
        restarts.lose(_died())
    with pytest.raises(WorkerLostError, match="died of something"):
        restarts.lose(_died())


def test_numbers_that_are_not_finite_are_computed_once_more_and_no_more(make):
    restarts, log, _ = make(most=100)
    log.step = 3
    restarts.lose(_nan())
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        restarts.lose(_nan())


@pytest.mark.parametrize("error", [_died(), _nan()])
def test_without_a_budget_the_first_loss_ends_the_run_with_its_own_error(make, error):
    restarts, _, _ = make(most=0)
    with pytest.raises(type(error)) as caught:
        restarts.lose(error)
    assert str(caught.value) == str(error)


def test_nothing_starts_anew_once_a_person_has_ended_the_run(make):
    restarts, _, _ = make()
    restarts._context.stop.is_made = True
    with pytest.raises(WorkerLostError, match="died of something"):
        restarts.lose(_died())

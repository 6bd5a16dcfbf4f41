"""Pools that change under a run: requests, workers on their way, and what the run is told."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes.local_workers import LocalWorkers
from fakes.starts import LateStarts

from distill_system.cluster import ElasticPool, WorkerRequest
from distill_system.config.pools import FaultsConfig, PoolConfig, ScalingConfig
from distill_system.elastic.elastic_pools import ElasticPools
from distill_system.elastic.scale_requests import ScaleRequests
from distill_system.elastic.scaling import ScalingObservation
from distill_system.errors import DeadlineError, ModelError, ResourceError, WorkerLostError
from distill_system.observe import RunDirectory
from distill_system.records import PoolActivity


class Clerk:
    def __init__(self, *, name: str) -> None:
        self.name = name


class Run:
    """A run's elastic side with two workers in each of two pools, and what others see of it."""

    def __init__(self, folder: Path, **scaling: Any) -> None:
        self.session = LateStarts()
        self.requests = ScaleRequests(RunDirectory(folder))
        self.said: list[str] = []
        self.events: list[str] = []
        self.is_ending = False
        self.faults: list[tuple[str, str]] = []
        self.busy: set[tuple[str, int]] = set()
        self.asked: list[tuple[str, int]] = []
        self.seconds = 0.0
        self.workers = {
            name: LocalWorkers([Clerk(name=f"{name}-0"), Clerk(name=f"{name}-1")])
            for name in ("student_rollout", "teacher_scoring")
        }
        self.elastic = ElasticPools(
            {name: self._pool(name) for name in self.workers},
            self.session,
            ScalingConfig.model_validate(scaling),
            self.requests,
            crew=self,
            weights=self,
            faults=FaultsConfig(max_replacements=2, within_seconds=100.0),
            fault_log=self,
            notify=self.said.append,
            is_ending=lambda: self.is_ending,
            clock=lambda: self.seconds,
            sleep=self._sleep,
        )

    # What the pools ask of those who give work, and of the weights' way to them

    pools = ("student_rollout",)

    def break_up(self) -> None:
        self.events.append("broken up")

    def release_worker(self, pool: str, worker: int) -> bool:
        self.asked.append((pool, worker))
        return (pool, worker) not in self.busy

    def forget_worker(self, pool: str, worker: int) -> None:
        assert worker in self.workers[pool].members, "it is told before the worker is gone"
        self.events.append(f"{pool}-{worker} forgotten")

    def admit_workers(self) -> None:
        self.events.append("admitted")

    def bring_weights(self) -> None:
        self.events.append("weights brought")

    def lose(self, worker: str, cause: str) -> None:
        self.faults.append((worker, "lost"))

    def replace(self, worker: str, successor: str, seconds: float) -> None:
        self.faults.append((worker, f"{successor} after {seconds:g} s"))

    def _sleep(self, seconds: float) -> None:
        """Time in which whatever starts becomes ready."""
        self.seconds += seconds
        for start in self.session.starts:
            start.is_ready = True

    def adopt(self) -> bool:
        """Whether the weights' group has changed."""
        self.events = []
        self.elastic.adopt()
        assert self.events[-1] == "admitted"
        return "broken up" in self.events

    def _pool(self, name: str) -> ElasticPool:
        config = PoolConfig(min_count=1, count=2, max_count=4)
        arguments = [{"name": f"{name}-{index}"} for index in range(2)]
        return ElasticPool(
            workers=self.workers[name],
            request=WorkerRequest(name=name, worker_class=Clerk, arguments=arguments, pool=config),
        )

    def ask(self, **wanted: int) -> str:
        """Send a request, and let the run read it."""
        request_id = self.requests.write(wanted)
        self.elastic.advance()
        return request_id

    def names(self, pool: str) -> dict[int, str]:
        return {at: clerk.name for at, clerk in self.workers[pool].objects.items()}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = Run(tmp_path)
    with made.elastic:
        yield made


def test_a_worker_joins_at_the_boundary_after_it_is_ready(run: Run) -> None:
    run.ask(student_rollout=3)
    [start] = run.session.starts
    assert run.adopt() is False, "it is not ready"
    start.is_ready = True
    run.elastic.advance()
    assert run.workers["student_rollout"].members == (0, 1), "no boundary has come"
    assert run.adopt() is True
    assert run.names("student_rollout")[2] == "student_rollout-2"
    assert run.adopt() is False, "the group changes once"


def test_scorers_come_without_a_new_weight_transfer_group(run: Run) -> None:
    run.ask(teacher_scoring=3)
    run.session.starts[0].is_ready = True
    assert run.adopt() is False
    assert run.workers["teacher_scoring"].members == (0, 1, 2)


def test_both_pools_may_change_at_one_boundary_and_the_group_hears_of_the_student_alone(
    run: Run,
) -> None:
    run.ask(student_rollout=3, teacher_scoring=3)
    assert [start.name for start in run.session.starts] == [
        "student_rollout-2",
        "teacher_scoring-2",
    ]
    for start in run.session.starts:
        start.is_ready = True
    assert run.adopt() is True, "scorers came after the student's worker"
    assert run.workers["student_rollout"].members == (0, 1, 2)
    assert run.workers["teacher_scoring"].members == (0, 1, 2)
    run.ask(student_rollout=2, teacher_scoring=1)
    assert run.adopt() is True
    assert run.workers["student_rollout"].members == (0, 1)
    assert run.workers["teacher_scoring"].members == (0,)


def test_the_newest_worker_leaves_once_it_has_handed_back_its_work(run: Run) -> None:
    run.busy = {("student_rollout", 1)}
    run.ask(student_rollout=1)
    assert run.adopt() is False
    assert run.workers["student_rollout"].members == (0, 1), "something is under way there"
    run.busy = set()
    run.elastic.advance()
    assert run.workers["student_rollout"].members == (0, 1), "it may be in a publish"
    assert run.adopt() is True
    assert run.workers["student_rollout"].members == (0,)
    assert set(run.asked) == {("student_rollout", 1)}


def test_ids_are_not_given_again(run: Run) -> None:
    for size, members in [(3, (0, 1, 2)), (2, (0, 1)), (4, (0, 1, 3, 4))]:
        run.ask(student_rollout=size)
        for start in run.session.starts:
            start.is_ready = True
        run.adopt()
        assert run.workers["student_rollout"].members == members


def test_a_smaller_size_takes_back_starts_before_it_sends_workers_home(run: Run) -> None:
    run.ask(student_rollout=4)
    run.ask(student_rollout=1)
    assert [start.is_over for start in run.session.starts] == [True, True]
    run.adopt()
    assert run.workers["student_rollout"].members == (0,)


def test_a_worker_that_cannot_come_is_told_of_and_the_run_goes_on(run: Run) -> None:
    request = run.ask(student_rollout=4)
    run.session.starts[0].error = ResourceError("no room")
    run.session.starts[1].is_ready = True
    run.elastic.advance()
    run.adopt()
    assert run.workers["student_rollout"].members == (0, 1, 3)
    assert any("student_rollout-2 is given up: no room" in line for line in run.said)
    status = run.requests.read_status()
    assert status is not None
    assert status.answers[request] == ""
    pool = status.pools["student_rollout"]
    assert (pool.wanted, pool.present, pool.is_settled) == (3, 3, True)
    assert "no room" in pool.problem
    run.elastic.advance()
    assert len(run.session.starts) == 2, "it is not tried again by itself"


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        ({"learner": 2}, "learner cannot change"),
        ({"student_rollout": 9}, "student_rollout=9 is out of its bounds: expected 1 to 4"),
        ({"student_rollout": 3, "teacher_scoring": 0}, "teacher_scoring=0 is out of its bounds"),
    ],
)
def test_what_cannot_be_is_refused_whole(run: Run, wanted: dict[str, int], problem: str) -> None:
    request = run.ask(**wanted)
    status = run.requests.read_status()
    assert status is not None
    assert problem in status.answers[request]
    assert run.session.starts == []


def test_a_damaged_request_is_refused_and_ends_nothing(run: Run) -> None:
    (run.requests.folder / "request-0-abc.json").write_text("{")
    run.elastic.advance()
    status = run.requests.read_status()
    assert status is not None
    assert "request-0-abc.json is not JSON" in status.answers["abc"]


def test_the_status_says_what_is_on_its_way_and_since_when(run: Run) -> None:
    run.ask(student_rollout=3, teacher_scoring=1)
    status = run.requests.read_status()
    assert status is not None
    student, scorer = status.pools["student_rollout"], status.pools["teacher_scoring"]
    assert (student.wanted, student.present, student.starting, student.leaving) == (3, 2, 1, 0)
    assert (scorer.wanted, scorer.present, scorer.starting, scorer.leaving) == (1, 2, 0, 1)
    assert student.since is not None
    run.session.starts[0].is_ready = True
    run.adopt()
    status = run.requests.read_status()
    assert status is not None
    assert all(pool.is_settled and pool.since is None for pool in status.pools.values())


def test_the_end_of_the_run_ends_what_still_starts(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with run.elastic:
        run.ask(student_rollout=4)
        assert run.requests.has_listener()
    assert all(start.is_over for start in run.session.starts)
    assert not run.requests.has_listener()


def _starving(run: Run) -> Callable[[], ScalingObservation]:
    idle = PoolActivity(num_workers=2, seconds=10.0, starved_seconds=20.0)
    return lambda: ScalingObservation(
        at_seconds=run.seconds,
        pools={
            "student_rollout": PoolActivity(num_workers=2, seconds=10.0),
            "teacher_scoring": idle,
        },
        learner_starved_share=0.4,
        waited_for="student_rollout",
    )


@pytest.mark.parametrize("automatic", [True, False])
def test_the_automatic_mode_grows_the_pool_that_the_learner_waits_for(
    tmp_path: Path, automatic: bool
) -> None:
    run = Run(tmp_path, automatic=automatic, patience=2, look_every_seconds=10.0)
    with run.elastic:
        for _ in range(4):
            run.seconds += 5.0  # every other call is due
            run.elastic.advance(_starving(run))
        assert [start.name for start in run.session.starts] == ["student_rollout-2"] * automatic
        assert any("the learner waits for it 40%" in line for line in run.said) is automatic


def test_the_automatic_mode_waits_for_workers_on_their_way_and_for_their_effect(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path, automatic=True, patience=1, look_every_seconds=1.0, cool_down_seconds=20.0)
    began = []
    with run.elastic:
        for second in itertools.count(1):
            run.seconds = float(second)
            run.elastic.advance(_starving(run))
            if len(run.session.starts) > len(began):
                began.append(second)
            if second == 50:
                run.session.starts[0].is_ready = True
                run.adopt()
            if second == 100:
                break
    assert began == [1, 70], "fifty seconds until it was there, and twenty until it showed"


def test_with_a_budget_a_worker_moves_and_one_line_says_so(tmp_path: Path) -> None:
    """Two pools of two, one CPU each, four in all."""
    how = {"automatic": True, "total_cpus": 4.0, "patience": 1, "look_every_seconds": 10.0}
    run = Run(tmp_path, **how)
    with run.elastic:
        run.ask(student_rollout=3)
        assert "student_rollout=3 takes 1 more than scaling.total_cpus=4" in run.said[-1]
        assert run.session.starts == []
        run.seconds = 10.0
        run.elastic.advance(_starving(run))
        assert run.said[-1] == (
            "student_rollout: 2 -> 3 workers, teacher_scoring: 2 -> 1 workers (the learner waits "
            "for it 40% of its time, teacher_scoring is idle 100% of its time)"
        )
        run.adopt()
        assert run.workers["teacher_scoring"].members == (0,)
        assert [start.name for start in run.session.starts] == ["student_rollout-2"]
        run.ask(student_rollout=2, teacher_scoring=2)
        assert "by request" in run.said[-1], "what keeps to the budget may be asked for"


def _dead(name: str) -> WorkerLostError:
    return WorkerLostError(f"{name} died of something", name)


def test_a_lost_worker_is_replaced_in_its_place(run: Run) -> None:
    workers = run.workers["student_rollout"]
    run.session.dead = [_dead("student_rollout-0")]
    run.elastic.advance()
    assert workers.members == (1,)
    assert workers.count == 2, "work is dealt as before"
    assert run.events == ["student_rollout-0 forgotten", "broken up"]
    assert "student_rollout-0 died of something; it is replaced, and the run goes on" in run.said
    [start] = run.session.starts
    assert (start.name, start.place) == ("student_rollout-2", "place of 0")
    run.seconds, start.is_ready = 12.0, True
    assert run.adopt() is True
    assert (workers.members, workers.count) == ((1, 2), 2)
    assert run.faults == [
        ("student_rollout-0", "lost"),
        ("student_rollout-0", "student_rollout-2 after 12 s"),
    ]
    status = run.requests.read_status()
    assert status is not None
    assert status.pools["student_rollout"].is_settled


def test_a_loss_is_told_once_however_many_hear_of_it(run: Run) -> None:
    for _ in range(3):
        run.elastic.lose(_dead("teacher_scoring-1"))
    assert run.events == ["teacher_scoring-1 forgotten"], "scorers receive no weights"
    assert len(run.session.starts) == 1


def test_too_many_losses_in_the_time_end_the_run_with_what_the_last_died_of(run: Run) -> None:
    run.elastic.lose(_dead("teacher_scoring-0"))
    run.seconds = 101.0  # the first counts no more
    run.elastic.lose(_dead("teacher_scoring-1"))
    for start in run.session.starts:
        start.is_ready = True
    run.adopt()
    run.elastic.lose(_dead("teacher_scoring-2"))
    with pytest.raises(WorkerLostError, match=r"-3 died of something.*has lost 3 .*=2") as caught:
        run.elastic.lose(_dead("teacher_scoring-3"))
    assert caught.value.worker == "teacher_scoring-3"


def test_a_worker_of_no_pool_here_is_somebody_elses_to_replace(run: Run) -> None:
    lost = _dead("learner-0")
    with pytest.raises(WorkerLostError) as caught:
        run.elastic.lose(lost)
    assert caught.value is lost


def test_a_pool_that_has_lost_all_is_waited_for_and_gets_its_weights(run: Run) -> None:
    for worker in (0, 1):
        run.elastic.lose(_dead(f"student_rollout-{worker}"))
    run.events = []
    run.elastic.wait_for_worker("student_rollout")
    assert run.workers["student_rollout"].members == (2, 3)
    assert run.events == ["broken up", "admitted", "weights brought"]
    run.elastic.lose(_dead("teacher_scoring-0"))
    run.elastic.lose(_dead("teacher_scoring-1"))
    run.events = []
    run.elastic.wait_for_worker("teacher_scoring")
    assert run.events == ["admitted"]


def test_a_replacement_that_fails_is_tried_again_until_the_budget_is_spent(run: Run) -> None:
    run.elastic.lose(_dead("teacher_scoring-0"))
    run.session.starts[0].is_placed = True
    run.session.starts[0].error = DeadlineError("it did not load")
    run.elastic.advance()
    assert [start.name for start in run.session.starts[1:]] == ["teacher_scoring-3"]
    run.session.starts[1].is_placed = True
    run.session.starts[1].error = DeadlineError("it did not load")
    with pytest.raises(WorkerLostError, match="it did not load"):
        run.elastic.advance()


def test_without_a_place_the_run_goes_on_with_those_that_are_left(run: Run) -> None:
    run.elastic.lose(_dead("teacher_scoring-0"))
    for number in range(5):  # it costs nothing of the budget
        run.session.starts[number].error = ResourceError("no room")
        run.elastic.advance()
    assert run.workers["teacher_scoring"].members == (1,)
    assert any("until then teacher_scoring goes on with what is left" in line for line in run.said)
    run.elastic.lose(_dead("teacher_scoring-1"))
    run.session.starts[5].error = ResourceError("no room")
    with pytest.raises(ResourceError, match="no room"):
        run.elastic.advance()


def test_a_model_that_cannot_be_loaded_again_ends_the_run(run: Run) -> None:
    run.elastic.lose(_dead("teacher_scoring-0"))
    run.session.starts[0].error = ModelError("the folder is gone")
    with pytest.raises(ModelError, match="the folder is gone"):
        run.elastic.advance()


def test_a_worker_that_is_lost_as_it_leaves_is_not_replaced(run: Run) -> None:
    run.busy = {("student_rollout", 1)}
    run.ask(student_rollout=1)
    run.elastic.lose(_dead("student_rollout-1"))
    assert run.session.starts == []
    assert (run.workers["student_rollout"].members, run.workers["student_rollout"].count) == (
        (0,),
        1,
    )


def test_a_smaller_size_takes_back_a_replacement(run: Run) -> None:
    run.elastic.lose(_dead("student_rollout-0"))
    run.ask(student_rollout=1)
    assert run.session.starts[0].is_over
    assert (run.workers["student_rollout"].members, run.workers["student_rollout"].count) == (
        (1,),
        1,
    )


def test_nobody_is_replaced_once_a_person_has_ended_the_run(run: Run) -> None:
    run.elastic.lose(_dead("teacher_scoring-0"))
    run.elastic.lose(_dead("teacher_scoring-1"))
    run.is_ending = True
    with pytest.raises(WorkerLostError, match="student_rollout-0 died of something"):
        run.elastic.lose(_dead("student_rollout-0"))
    with pytest.raises(WorkerLostError, match="the run ends"):
        run.elastic.wait_for_worker("teacher_scoring")

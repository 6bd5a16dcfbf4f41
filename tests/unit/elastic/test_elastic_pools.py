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
from distill_system.config.pools import PoolConfig, ScalingConfig
from distill_system.elastic.elastic_pools import ElasticPools
from distill_system.elastic.scale_requests import ScaleRequests
from distill_system.elastic.scaling import ScalingObservation
from distill_system.errors import ResourceError
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
            release=self._release,
            notify=self.said.append,
            clock=lambda: self.seconds,
        )

    def _pool(self, name: str) -> ElasticPool:
        config = PoolConfig(min_count=1, count=2, max_count=4)
        arguments = [{"name": f"{name}-{index}"} for index in range(2)]
        return ElasticPool(
            workers=self.workers[name],
            request=WorkerRequest(name=name, worker_class=Clerk, arguments=arguments, pool=config),
        )

    def _release(self, pool: str, worker_id: int) -> bool:
        self.asked.append((pool, worker_id))
        return (pool, worker_id) not in self.busy

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
    assert run.elastic.adopt() is False, "it is not ready"
    start.is_ready = True
    run.elastic.advance()
    assert run.workers["student_rollout"].members == (0, 1), "no boundary has come"
    assert run.elastic.adopt() is True
    assert run.names("student_rollout")[2] == "student_rollout-2"
    assert run.elastic.adopt() is False, "the group changes once"


def test_scorers_come_without_a_new_weight_transfer_group(run: Run) -> None:
    run.ask(teacher_scoring=3)
    run.session.starts[0].is_ready = True
    assert run.elastic.adopt() is False
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
    assert run.elastic.adopt() is True, "scorers came after the student's worker"
    assert run.workers["student_rollout"].members == (0, 1, 2)
    assert run.workers["teacher_scoring"].members == (0, 1, 2)
    run.ask(student_rollout=2, teacher_scoring=1)
    assert run.elastic.adopt() is True
    assert run.workers["student_rollout"].members == (0, 1)
    assert run.workers["teacher_scoring"].members == (0,)


def test_the_newest_worker_leaves_once_it_has_handed_back_its_work(run: Run) -> None:
    run.busy = {("student_rollout", 1)}
    run.ask(student_rollout=1)
    assert run.elastic.adopt() is False
    assert run.workers["student_rollout"].members == (0, 1), "something is under way there"
    run.busy = set()
    run.elastic.advance()
    assert run.workers["student_rollout"].members == (0, 1), "it may be in a publish"
    assert run.elastic.adopt() is True
    assert run.workers["student_rollout"].members == (0,)
    assert set(run.asked) == {("student_rollout", 1)}


def test_ids_are_not_given_again(run: Run) -> None:
    for size, members in [(3, (0, 1, 2)), (2, (0, 1)), (4, (0, 1, 3, 4))]:
        run.ask(student_rollout=size)
        for start in run.session.starts:
            start.is_ready = True
        run.elastic.adopt()
        assert run.workers["student_rollout"].members == members


def test_a_smaller_size_takes_back_starts_before_it_sends_workers_home(run: Run) -> None:
    run.ask(student_rollout=4)
    run.ask(student_rollout=1)
    assert [start.is_over for start in run.session.starts] == [True, True]
    run.elastic.adopt()
    assert run.workers["student_rollout"].members == (0,)


def test_a_worker_that_cannot_come_is_told_of_and_the_run_goes_on(run: Run) -> None:
    request = run.ask(student_rollout=4)
    run.session.starts[0].error = ResourceError("no room")
    run.session.starts[1].is_ready = True
    run.elastic.advance()
    run.elastic.adopt()
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
    run.elastic.adopt()
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
                run.elastic.adopt()
            if second == 100:
                break
    assert began == [1, 70], "fifty seconds until it was there, and twenty until it showed"

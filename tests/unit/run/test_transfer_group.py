"""Weights on their way to engines that die, hang or refuse, and what is done about it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from distill_system.errors import DeadlineError, TransferError, WorkerLostError
from distill_system.records import WeightVersion
from distill_system.run.transfer_group import TransferGroup


class Engines:
    """Two pools of engines, the learner that publishes to them, and who replaces the lost.

    failures: what the next publishes fail with.  silent: who is found to say nothing after one.
    """

    def __init__(self, *failures: Exception, silent: tuple[str, ...] = ()) -> None:
        self.members = {"student_rollout": [0, 1], "evaluation": [0]}
        self.failures, self.silent = list(failures), list(silent)
        self.opened: list[list[str]] = []
        self.published: list[int] = []
        self.lost: list[str] = []
        self.num_ended = 0
        learner: Any = self
        monitor: Any = self
        self.group = TransferGroup(
            learner,
            [self._workers(name) for name in self.members],
            monitor,
            backend="gloo",
            ranks={"student_rollout": 2, "evaluation": 1},
            seconds=5.0,
        )
        self.group.supervise(self, ["student_rollout", "evaluation", "teacher_scoring"])

    def _workers(self, name: str) -> Any:
        def handles() -> dict[str, object]:
            return {f"{name}-{at}": object() for at in self.members[name]}

        class Workers(SimpleNamespace):
            @property
            def members(workers) -> list[int]:  # noqa: N805  # of the pool, as it is now
                return self.members[name]

        return Workers(name=name, named_handles=handles)

    # The learner's side

    def connect_rollouts(self, backend: str, client: Any, num_receivers: int, seconds: float):
        assert (backend, seconds) == ("gloo", 5.0)
        names = self.group.names
        assert num_receivers == sum(2 if "student" in name else 1 for name in names)
        self.opened.append(names)

    def publish(self, version: int) -> WeightVersion:
        if self.failures:
            raise self.failures.pop(0)
        self.published.append(version)
        return WeightVersion(version=version, num_bytes=1, digest=1, seconds=0.1)

    def end_publish(self) -> None:
        self.num_ended += 1

    # The monitor's, and the supervision's

    def supervise(self, pools: Any) -> None:
        self.supervised = list(pools)

    def find_unresponsive(self, names: list[str], *, seconds: float, waiting_for: str):
        assert seconds > 0
        assert waiting_for
        return [WorkerLostError(f"{n} says nothing", n) for n in self.silent if n in names]

    def lose(self, lost: WorkerLostError) -> None:
        if lost.worker_id in self.members[lost.pool]:
            self.lost.append(lost.worker)
            self.members[lost.pool].remove(lost.worker_id)
            self.group.break_up()

    def notice(self) -> None:
        """Nobody dies unheard here."""

    def wait_for_worker(self, pool: str) -> None:
        raise AssertionError("a publish waits for nobody")


ALL = ["student_rollout-0", "student_rollout-1", "evaluation-0"]
CLOSED = TransferError("student_rollout-1: connection closed by peer")


def test_the_group_is_opened_once_and_anew_when_a_member_has_changed() -> None:
    engines = Engines()
    for version in (0, 1):
        sent = engines.group.publish(version)
        assert sent is not None
        assert sent.version == version
    assert engines.opened == [ALL]
    engines.members["student_rollout"].append(2)
    engines.group.break_up()
    engines.group.publish(2)
    assert engines.opened[1:] == [
        ["student_rollout-0", "student_rollout-1", "student_rollout-2", *ALL[2:]]
    ]
    assert (engines.published, engines.group.version) == ([0, 1, 2], 2)


@pytest.mark.parametrize(
    "failure",
    [
        CLOSED,
        DeadlineError("nothing came", ["student_rollout-1"]),
        WorkerLostError("student_rollout-0 died", "student_rollout-0"),
    ],
)
def test_who_fails_a_transfer_is_lost_and_the_version_reaches_the_others(
    failure: Exception,
) -> None:
    engines = Engines(failure, silent=("student_rollout-0",))
    engines.group.publish(4)
    assert engines.lost == ["student_rollout-0"]
    assert engines.opened == [ALL, ALL[1:]]
    assert engines.published == [4]
    assert engines.num_ended == 1, "nobody waits for the failed one"


def test_a_transfer_that_fails_with_all_alive_is_tried_once_more_and_no_more() -> None:
    engines = Engines(CLOSED)
    engines.group.publish(1)
    assert (engines.lost, engines.opened, engines.published) == ([], [ALL, ALL], [1])
    engines.failures = [CLOSED, CLOSED]
    with pytest.raises(TransferError) as caught:
        engines.group.publish(2)
    assert caught.value is CLOSED


def test_a_rank_that_is_lost_is_not_an_engines_fault() -> None:
    died = WorkerLostError("learner-0 died", "learner-0")
    engines = Engines(died)
    with pytest.raises(WorkerLostError) as caught:
        engines.group.publish(1)
    assert caught.value is died
    assert engines.lost == []


def test_without_supervision_the_first_failure_is_raised() -> None:
    engines = Engines(CLOSED, silent=("student_rollout-0",))
    engines.group.supervision = None
    with pytest.raises(TransferError) as caught:
        engines.group.publish(1)
    assert caught.value is CLOSED


def test_where_every_engine_is_lost_there_is_nobody_to_send_to() -> None:
    engines = Engines(CLOSED, silent=tuple(ALL))
    assert engines.group.publish(3) is None
    assert engines.lost == ALL
    assert engines.group.start_publish(4) == []
    assert engines.group.version == 4

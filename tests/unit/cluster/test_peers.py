"""Workers of several ranks in real Ray: one address, one place, one life."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import ray

from distill_system.cluster import ClusterSession, RayWorkers
from distill_system.errors import ModelError, WorkerLostError
from distill_system.workers import Peers

Start = Callable[..., RayWorkers]
RANKS = 3


class Choir:
    """Its first rank says what all say."""

    def __init__(self, *, peers: Peers | None = None, rank: int = 0) -> None:
        self.peers, self.rank = peers, rank
        if peers is not None:
            peers.start()

    def ready(self) -> None:
        if self.peers is not None:
            self.ask("ready")

    def ask(self, method: str) -> list[Any]:
        assert self.peers is not None
        calls = self.peers.call(method, [()] * (RANKS - 1))
        return self.peers.finish(calls, what=method, seconds=60.0)

    def describe(self) -> tuple[int, int, str]:
        place = ray.get_runtime_context().get_placement_group_id()
        return self.rank, os.getpid(), str(place)

    def describe_all(self) -> list[tuple[int, int, str]]:
        return [self.describe(), *self.ask("describe")]

    def refuse(self) -> None:
        """The first of the others alone, so that it is known whose error comes."""
        if self.rank == 1:
            raise ModelError("no such part")

    def refuse_in_another(self) -> None:
        self.ask("refuse")

    def fail(self) -> None:
        raise RuntimeError("no memory left")

    def wait_while_another_fails(self) -> None:
        """As in a collective, which hears of nothing."""
        assert self.peers is not None
        self.peers.call("fail", [()] * (RANKS - 1))
        time.sleep(60.0)


def _ask(group: RayWorkers, worker: int, method: str) -> Any:
    [said] = group.finish([group.start(worker, method)], what=method)
    return said


def _wait_until_gone(pids: list[int], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while any(map(psutil.pid_exists, pids)):
        assert time.monotonic() < deadline, f"of {pids} one is still there"
        time.sleep(0.05)


def test_ranks_answer_as_one_worker_and_go_together(
    session: ClusterSession, workers: Start
) -> None:
    group = workers(Choir, ranks=RANKS, count=1)
    _ask(group, 0, "ready")
    ranks, pids, places = zip(*_ask(group, 0, "describe_all"), strict=True)
    assert ranks == (0, 1, 2)
    assert len(set(pids)) == RANKS
    assert len(set(places)) == 1, "one placement group"
    with pytest.raises(ModelError, match=r"choir-0-rank-1: no such part") as caught:
        _ask(group, 0, "refuse_in_another")
    assert caught.value.worker == "choir-0", "by the name that its pool knows"
    with pytest.raises(WorkerLostError, match=r"choir-0.* died") as lost:
        _ask(group, 0, "wait_while_another_fails")
    assert lost.value.worker == "choir-0"
    _wait_until_gone(list(pids))

    place = group.vacate(0)
    starting = session.begin_worker(session._requests["choir"], group.take_id(), {}, place)
    deadline = time.monotonic() + 30.0
    while starting.poll() is None:
        assert time.monotonic() < deadline, f"{starting.name} is still {starting.stage}"
        time.sleep(0.02)
    session.adopt_worker(group, starting)
    later = _ask(group, 1, "describe_all")
    assert {each[2] for each in later} == set(places), "in the place of the lost one"
    group.remove(1)
    _wait_until_gone([each[1] for each in later])

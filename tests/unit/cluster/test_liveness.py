"""What Ray's two kinds of failed probes mean: out of reach for now, and dead."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError

from distill_system.cluster.liveness import LivenessMonitor
from distill_system.errors import WorkerLostError

OUT_OF_REACH = ActorUnavailableError("the connection was reset", b"1" * 16)
DEAD = ActorDiedError()


@pytest.fixture
def fail_with(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets every probe from now on be answered at once with this failure."""
    monkeypatch.setattr(ray, "wait", lambda references, **options: (references, []))

    def answer(error: Exception) -> None:
        def get(reference: object) -> None:
            raise error

        monkeypatch.setattr(ray, "get", get)

    return answer


@pytest.fixture
def monitor() -> LivenessMonitor:
    handle = SimpleNamespace(
        _actor_id=SimpleNamespace(hex=lambda: "31" * 16),
        __ray_ready__=SimpleNamespace(remote=object),
    )
    return LivenessMonitor({"student_rollout-0": handle})


def test_a_worker_that_is_out_of_reach_for_now_is_not_taken_for_dead(
    monitor: LivenessMonitor, fail_with: Any
) -> None:
    fail_with(OUT_OF_REACH)
    for _ in range(3):
        monitor.require_alive(seconds=0.0, waiting_for="rollouts")
    fail_with(DEAD)
    with pytest.raises(WorkerLostError, match="student_rollout-0 died while the run waited"):
        monitor.require_alive(seconds=0.0, waiting_for="rollouts")


def test_who_is_asked_to_answer_and_cannot_be_reached_is_lost_and_that_is_what_is_said(
    monitor: LivenessMonitor, fail_with: Any
) -> None:
    fail_with(OUT_OF_REACH)
    [lost] = monitor.find_unresponsive(["student_rollout-0"], seconds=0.0, waiting_for="weights")
    assert lost.worker == "student_rollout-0"
    assert "student_rollout-0 could not be reached while the run waited for weights" in str(lost)

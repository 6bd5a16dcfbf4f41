"""Publishes straight through a learner's door: the group that stands between is taken as whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from distill_system.workers import Reference, Supervision


class DirectTransfer:
    """Implements run.transfer_group.TransferGroup over a learner whose engines never fail.

    workers: of student_rollout, which receive every version in the order of their ids.
    """

    def __init__(self, learner: Any, workers: Any) -> None:
        self.learner = learner
        self.supervision: Supervision | None = None
        self.version = 0
        self.num_breaks = 0
        self._workers = workers

    @property
    def pools(self) -> list[str]:
        return ["student_rollout"]

    @property
    def names(self) -> list[str]:
        return [f"student_rollout-{worker}" for worker in self._workers.members]

    def supervise(self, supervision: Supervision, pools: Iterable[str]) -> None:
        assert set(self.pools) <= set(pools), "who receives weights is replaced"
        self.supervision = supervision

    def break_up(self) -> None:
        self.num_breaks += 1

    def publish(self, version: int) -> Any:
        self.version = version
        self.learner.start_publish(version)
        return self.learner.finish_publish()

    def start_publish(self, version: int) -> list[Reference]:
        self.version = version
        return list(self.learner.start_publish(version))

    def receiving(self) -> dict[Reference, str]:
        answers: Sequence[Reference] = self.learner.receiving()
        return dict(zip(answers, self.names, strict=True))

    def finish_publish(self) -> None:
        self.learner.end_publish()

    def recover(self, error: Exception) -> None:
        raise AssertionError("no engine of these fails") from error

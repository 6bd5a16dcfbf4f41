"""The learner and every student engine, joined for the transfer of weights.

The group changes with its members: an engine that joins, leaves or is lost breaks it, and it is
opened anew before the next publish. An engine that dies or hangs while weights travel holds up no
other past its deadline: it is lost, the group opens without it, and the version is sent again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from distill_system.cluster import EveryWorker, RayWorkers, all_named_handles
from distill_system.cluster.liveness import LivenessMonitor
from distill_system.errors import DeadlineError, TransferError, WorkerLostError
from distill_system.learner import LearnerGroup
from distill_system.records import WeightVersion
from distill_system.weights import FanOutClient
from distill_system.workers import Reference, Supervision

ANSWER_SECONDS = 30.0
"""An engine whose transfer has failed has nothing to do: one that says nothing for so long hangs.
It may have a slice of decoding before it."""

MOST_FAILURES = 2
"""A version whose transfer fails so often, with every engine alive, ends the run."""


class TransferGroup:
    """Sends versions to every present worker of the receiving pools.

    receivers: the pools that hold the student.
    ranks: of the transfer group that a worker of each of these pools takes.
    seconds: deadline of a publish, and for the engines to join.
    supervision: who replaces an engine that is lost on the way; None raises.
    version: what was published last.
    """

    def __init__(
        self,
        learner: LearnerGroup,
        receivers: Sequence[RayWorkers],
        monitor: LivenessMonitor,
        *,
        backend: str,
        ranks: Mapping[str, int],
        seconds: float,
    ) -> None:
        self.learner = learner
        self.supervision: Supervision | None = None
        self.version = 0
        self._receivers = tuple(receivers)
        self._monitor = monitor
        self._backend = backend
        self._ranks = ranks
        self._seconds = seconds
        self._is_open = False
        self._opened_with: list[str] = []
        self._failures = 0

    @property
    def pools(self) -> list[str]:
        """Names of the pools that hold the student."""
        return [workers.name for workers in self._receivers]

    @property
    def names(self) -> list[str]:
        """The present engines, each as pool-id, in the order in which they answer."""
        return list(all_named_handles(self._receivers))

    def supervise(self, supervision: Supervision, pools: Iterable[str]) -> None:
        """From now on this replaces what these pools lose; their deaths end no wait for others."""
        self.supervision = supervision
        self._monitor.supervise(pools)

    def break_up(self) -> None:
        """A member has come, gone or been lost: the group is opened anew before it is used."""
        self._is_open = False

    def publish(self, version: int) -> WeightVersion | None:
        """Send the weights to every engine, and wait until all hold them; None if there is none."""
        self.version = version
        while self.names:
            try:
                self._require_open()
                sent = self.learner.publish(version)
            except (TransferError, DeadlineError, WorkerLostError) as error:
                self.recover(error)
            else:
                self._failures = 0
                return sent
        return None

    def start_publish(self, version: int) -> list[Reference]:
        """Begin to send: references that are done once the learner's weights are packed."""
        self.version = version
        while self.names:
            try:
                self._require_open()
            except (TransferError, DeadlineError, WorkerLostError) as error:
                self.recover(error)
            else:
                return self.learner.start_publish(version)
        return []

    def receiving(self) -> dict[Reference, str]:
        """Of the publish that was begun: each engine's answer, with its name."""
        return dict(zip(self.learner.receiving(), self._opened_with, strict=True))

    def finish_publish(self) -> None:
        """Every answer of the publish that was begun has come, and none was a failure."""
        self.learner.end_publish()
        self._failures = 0

    def recover(self, error: TransferError | DeadlineError | WorkerLostError) -> None:
        """Lose the engines that have failed this transfer, so that it can be tried again.

        Raises: `error` if the learner itself failed, or if all engines answer and it has failed
            before.
        """
        self._is_open = False
        self.learner.end_publish()
        if self.supervision is None:
            raise error
        if isinstance(error, WorkerLostError) and error.pool not in self.pools:
            raise error
        lost = self._monitor.find_unresponsive(
            self.names, seconds=ANSWER_SECONDS, waiting_for="weights to reach the engines"
        )
        if not lost and not isinstance(error, WorkerLostError):
            self._failures += 1
            if self._failures >= MOST_FAILURES:
                raise error
        for each in [*lost, *([error] if isinstance(error, WorkerLostError) else [])]:
            self.supervision.lose(each)

    def _require_open(self) -> None:
        if self._is_open:
            return
        self._opened_with = self.names
        sizes = [self._ranks[workers.name] for workers in self._receivers for _ in workers.members]
        handles = EveryWorker(all_named_handles(self._receivers), seconds=self._seconds)
        client = FanOutClient(handles, sizes)
        self.learner.connect_rollouts(self._backend, client, client.num_receivers, self._seconds)
        self._is_open = True

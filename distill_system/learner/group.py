"""The learner group as the driver sees it: one door for N ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from distill_system.learner.checkpoint_files import FileRecord
from distill_system.learner.collate import StreamTotals
from distill_system.learner.publishing import Publishing
from distill_system.records import (
    FloatArray,
    ScoredChunk,
    StepResult,
    Stream,
    Trajectory,
    TrajectoryChunk,
    WeightVersion,
)
from distill_system.workers import Reference, Workers


class LearnerGroup:
    """Gives every rank its share of a step and speaks with rank 0's voice."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self._saving: list[Reference] = []
        self._publishing: Publishing | None = None
        self._publish_seconds = 0.0

    def connect(self) -> None:
        """Let the ranks find one another; returns when every model is loaded.

        Ranks that have started anew know nothing of a publish or a checkpoint under way.
        """
        self._saving, self._publishing = [], None
        self._all("ready", what="learner ranks to load their model")
        [(address, port)] = self._finish([self.workers.start(0, "address")], "rank 0's address")
        self._all("connect", address, port, what="learner ranks to meet and load their shares")

    def learn(self, step: int, scored: Sequence[ScoredChunk]) -> StepResult:
        """One update from scored chunks of both streams; targets go from scorer to rank."""
        return self.finish_step(step, self.start_step(step, scored))

    def start_step(self, step: int, scored: Sequence[ScoredChunk]) -> list[Reference]:
        """Begin what learn does, and return at once."""
        return self._start_on_chunks("step", [step], scored)

    def finish_step(self, step: int, references: Sequence[Reference]) -> StepResult:
        """Wait for what start_step began."""
        return self._finish(references, f"step {step}")[0]

    def start_supervised(self, step: int, trajectories: Sequence[Trajectory]) -> list[Reference]:
        """Begin one supervised update on data-set trajectories; see finish_supervised."""
        chunks = TrajectoryChunk.deal(trajectories, Stream.OFF_POLICY, self.workers.count)
        totals = {Stream.OFF_POLICY: StreamTotals.of(trajectories)}
        return [
            self.workers.start(rank, "step", step, [chunk], totals)
            for rank, chunk in enumerate(chunks)
        ]

    def finish_supervised(self, references: Sequence[Reference]) -> StepResult:
        """Wait for a supervised update."""
        return self._finish(references, "a supervised step")[0]

    def measure(self, scored: Sequence[ScoredChunk]) -> dict[str, float]:
        """Both distances and the cross-entropy on scored chunks; see Learner.measure."""
        return self._finish(self._start_on_chunks("measure", [], scored), "distances")[0]

    def read_logprobs(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """What the student says of the response tokens; see Learner.read_logprobs."""
        what = "the learner to read what its engines wrote"
        return self._all("read_logprobs", list(trajectories), what=what)[0]

    def connect_rollouts(
        self, backend: str, client: Any, num_receivers: int, timeout_seconds: float
    ) -> None:
        """Open the weight-transfer group from rank 0 to every rollout worker of the client.

        Called again it leaves the group before and opens another, at another port: workers may
        have come, gone or died. What was being sent may not arrive: publish after it.

        timeout_seconds: for the workers to join, and for each publish.
        """
        self._publishing, self._publish_seconds = None, timeout_seconds
        [(address, port)] = self._finish([self.workers.start(0, "address")], "rank 0's address")
        arguments = (backend, client, address, port, num_receivers, timeout_seconds)
        self._all("connect_rollouts", *arguments, what="the weight-transfer group")

    def publish(self, version: int) -> WeightVersion:
        """Send the weights to every rollout worker, and wait until all hold them."""
        self.start_publish(version)
        return self.finish_publish()

    def start_publish(self, version: int) -> list[Reference]:
        """Begin a publish of the weights as they are after the calls before this one.

        Returns references that are done once the weights are packed: the next step may begin at
        once, it comes after the packing and beside the sending. A publish that is under way is
        finished first.  Raises: what finish_publish raises of that one.
        """
        if self._publishing is not None:
            self.finish_publish()
        packing = [
            self.workers.start(rank, "start_publish", version) for rank in range(self.workers.count)
        ]
        self._publishing = Publishing(version, packing)
        return packing

    def receiving(self) -> list[Reference]:
        """A reference per rollout worker, done when it holds the version; waits for the packing.

        Raises: DeadlineError that names the ranks which still gather; TransferError.
        """
        assert self._publishing is not None, "start_publish comes before receiving"
        return self._publishing.receiving(self.workers, self._publish_seconds)

    def finish_publish(self) -> WeightVersion:
        """Wait until every rollout worker holds what start_publish began to send.

        Raises: DeadlineError that names the ranks which still gather, or the rollout workers which
        have not answered; TransferError of a worker that received other bytes than were sent;
        WorkerError of one that died.
        """
        assert self._publishing is not None, "start_publish comes before finish_publish"
        publishing, self._publishing = self._publishing, None
        return publishing.finish(self.workers, self._publish_seconds)

    def end_publish(self) -> None:
        """Nobody waits for the publish under way: its answers were heard of, or it has failed."""
        self._publishing = None

    def start_save(self, folder: Path) -> None:
        """Begin a checkpoint's learner part, in a folder that all ranks see; nobody waits here.

        It holds the state after the calls before this one; the calls to come run beside its write.
        """
        self._saving = [
            self.workers.start(rank, "start_save", str(folder))
            for rank in range(self.workers.count)
        ]

    def finish_save(self, *, wait: bool) -> dict[str, FileRecord] | None:
        """All files of the checkpoint under way; None if a rank still writes.

        wait: for a few seconds.
        """
        self._finish(self._saving, "the learner to copy its state")
        self._saving = []
        parts = self._all("finish_save", wait, what="the learner's checkpoint")
        if any(part is None for part in parts):
            return None
        return {name: record for part in parts for name, record in part.items()}

    def find_alterations(self, folder: Path, files: Mapping[str, FileRecord]) -> list[str]:
        """What is missing, truncated or altered of a checkpoint; the ranks share the reading."""
        count = self.workers.count
        largest_first = sorted(files, key=lambda name: (-files[name].num_bytes, name))
        shares = [{name: files[name] for name in largest_first[at::count]} for at in range(count)]
        calls = [
            self.workers.start(rank, "find_alterations", str(folder), share)
            for rank, share in enumerate(shares)
        ]
        found = self._finish(calls, "the learner to read its checkpoint through")
        return sorted(chain.from_iterable(found))

    def load(self, folder: Path) -> None:
        """Take a checkpoint's learner part back."""
        self._all("load", str(folder), what="the learner to load its checkpoint")

    def round_weights(self, dtype: str) -> None:
        """Give every weight the nearest value of a lower precision; see Learner.round_weights."""
        self._all("round_weights", dtype, what="the learner to round its weights")

    def export(self, folder: Path, dtype: str = "float32") -> None:
        """Write the model in Hugging Face form, its weights in this precision."""
        self._all("export", str(folder), dtype, what="the learner to export its model")

    def close(self) -> None:
        """Leave all process groups."""
        self._all("close", what="the learner to close its groups")

    def _start_on_chunks(
        self, method: str, arguments: list[Any], scored: Sequence[ScoredChunk]
    ) -> list[Reference]:
        """Chunk i goes to rank i mod N within its stream, its targets with it."""
        shares: list[list[ScoredChunk]] = [[] for _ in range(self.workers.count)]
        totals: dict[Stream, StreamTotals] = {}
        for stream in Stream:
            of_stream = [part for part in scored if part.chunk.stream is stream]
            if of_stream:
                trajectories = [t for part in of_stream for t in part.chunk.trajectories]
                totals[stream] = StreamTotals.of(trajectories)
            for index, part in enumerate(of_stream):
                shares[index % self.workers.count].append(part)
        return [
            self.workers.start(
                rank,
                method,
                *arguments,
                [part.chunk for part in share],
                totals,
                *(part.targets for part in share),
            )
            for rank, share in enumerate(shares)
        ]

    def _all(self, method: str, *arguments: Any, what: str) -> list[Any]:
        return self._finish(
            [self.workers.start(rank, method, *arguments) for rank in range(self.workers.count)],
            what,
        )

    def _finish(self, references: Sequence[Reference], what: str) -> list[Any]:
        return self.workers.finish(references, what=what)

"""The pool of teacher scorers: trajectories in -> chunks with a reference to their targets out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from distill_system.config.objective import TeacherNeeds
from distill_system.records import FloatArray, ScoredChunk, Stream, Trajectory, TrajectoryChunk
from distill_system.scoring.scorer import Shipped
from distill_system.workers import Reference, Workers


class ScoringPool:
    """Deals trajectories over the scorers."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self._receipts: dict[Reference, Reference] = {}
        self._shipped: dict[int, Shipped] = {}

    def score(
        self,
        trajectories: Sequence[Trajectory],
        stream: Stream,
        *,
        needs: TeacherNeeds,
        num_shares: int,
    ) -> list[ScoredChunk]:
        """Score and wait; see start and finish."""
        return self.finish(self.start(trajectories, stream, needs=needs, num_shares=num_shares))

    def start(
        self,
        trajectories: Sequence[Trajectory],
        stream: Stream,
        *,
        needs: TeacherNeeds,
        num_shares: int,
    ) -> list[ScoredChunk]:
        """Begin to score; the number of chunks is a multiple of num_shares (the learner's ranks).

        Does not wait; whoever hands the chunks on takes them from `finish`.
        """
        per_share = -(-max(self.workers.count, num_shares) // num_shares)
        chunks = TrajectoryChunk.deal(trajectories, stream, per_share * num_shares)
        return [
            ScoredChunk(chunk, self._start(index, chunk, needs) if needs.anything else None)
            for index, chunk in enumerate(chunks)
        ]

    def receipts(self, scored: Sequence[ScoredChunk]) -> list[Reference]:
        """The calls of these chunks that `finish` has not waited for."""
        return [self._receipts[part.targets] for part in scored if part.targets in self._receipts]

    def finish(self, scored: Sequence[ScoredChunk]) -> list[ScoredChunk]:
        """Wait until the teacher has read these chunks; their targets stay where they are.

        Raises: a scorer's own error; DeadlineError.
        """
        self.workers.finish(self.receipts(scored), what="teacher scores")
        return [self._settle(part) for part in scored]

    def read_logprobs(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """What the scorers, each of a share, say of the response tokens; see TeacherScorer."""
        members = self.workers.members[: len(trajectories)]
        shares = [trajectories[at :: len(members)] for at in range(len(members))]
        asked = [
            self.workers.start(member, "read_logprobs", list(share))
            for member, share in zip(members, shares, strict=True)
        ]
        read = self.workers.finish(asked, what="the scorers to read what the engines wrote")
        return [read[at % len(members)][at // len(members)] for at in range(len(trajectories))]

    def pop_shipped(self) -> Shipped:
        """What all scorers have handed on since this was last asked; a lost one's is lost."""
        members = self.workers.members
        asked = [self.workers.start(at, "shipped") for at in members]
        totals = dict(zip(members, self.workers.finish(asked, what="scorers' bytes"), strict=True))
        before, self._shipped = self._shipped, totals
        return sum(
            (total - before.get(at, Shipped()) for at, total in totals.items()), start=Shipped()
        )

    def _start(self, index: int, chunk: TrajectoryChunk, needs: TeacherNeeds) -> Reference:
        members = self.workers.members
        receipt, targets = self.workers.start_with_receipt(
            members[index % len(members)], "score_with_receipt", chunk, needs
        )
        self._receipts[targets] = receipt
        return targets

    def _settle(self, part: ScoredChunk) -> ScoredChunk:
        if self._receipts.pop(part.targets, None) is None:
            return part
        return replace(part, targets=self.workers.current(part.targets))

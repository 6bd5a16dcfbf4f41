"""The pool of teacher scorers: trajectories in -> chunks with a reference to their targets out."""

from __future__ import annotations

from collections.abc import Sequence

from distill_system.config.objective import TeacherNeeds
from distill_system.records import FloatArray, ScoredChunk, Stream, Trajectory, TrajectoryChunk
from distill_system.scoring.scorer import Shipped
from distill_system.workers import Reference, Workers


class ScoringPool:
    """Deals trajectories over the scorers."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers

    def start(
        self,
        trajectories: Sequence[Trajectory],
        stream: Stream,
        *,
        needs: TeacherNeeds,
        num_shares: int,
    ) -> list[ScoredChunk]:
        """Begin to score; the number of chunks is a multiple of num_shares (the learner's ranks).

        Does not wait: a learner call that takes the references waits for them itself.
        """
        per_share = -(-max(self.workers.count, num_shares) // num_shares)
        chunks = TrajectoryChunk.deal(trajectories, stream, per_share * num_shares)
        return [
            ScoredChunk(chunk, self._start(index, chunk, needs) if needs.anything else None)
            for index, chunk in enumerate(chunks)
        ]

    def _start(self, index: int, chunk: TrajectoryChunk, needs: TeacherNeeds) -> Reference:
        members = self.workers.members
        return self.workers.start(members[index % len(members)], "score", chunk, needs)

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

    def shipped(self) -> Shipped:
        """What all scorers have handed on since they started."""
        asked = [self.workers.start(at, "shipped") for at in self.workers.members]
        return sum(self.workers.finish(asked, what="the scorers' bytes"), start=Shipped())

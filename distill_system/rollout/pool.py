"""Many rollout workers as one: prompts are dealt out, trajectories come back in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distill_system.records import Prompt, Trajectory, count_occurrences
from distill_system.rollout.sampling import Sampling
from distill_system.workers import Reference, Workers


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingRollouts:
    """Rollouts under way: shards[i] holds the positions of the prompts that calls[i] answers."""

    calls: tuple[Reference, ...]
    shards: tuple[tuple[int, ...], ...]


class RolloutPool:
    """Rollout workers that hold the same model."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, label: str
    ) -> list[Trajectory]:
        """One trajectory per prompt, in the prompts' order; see RolloutWorker.generate."""
        return self.finish(self.start(prompts, sampling, seed, label))

    def start(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, label: str
    ) -> PendingRollouts:
        """Begin what generate does, and return at once.

        A prompt that stands in one call twice, as at the seam of two epochs, gets two samples.
        """
        prompts = count_occurrences(prompts)
        members = self.workers.members
        shards = deal_by_length([prompt.token_ids.size for prompt in prompts], self.workers.count)
        calls = tuple(
            self.workers.start(
                members[index % len(members)],
                "generate",
                [prompts[at] for at in shard],
                sampling,
                seed,
                label,
            )
            for index, shard in enumerate(shards)
        )
        return PendingRollouts(calls=calls, shards=shards)

    def finish(self, pending: PendingRollouts) -> list[Trajectory]:
        """Wait for rollouts that `start` began; trajectories in the order of its prompts."""
        results = self.workers.finish(pending.calls, what="rollouts")
        placed: dict[int, Trajectory] = {}
        for shard, trajectories in zip(pending.shards, results, strict=True):
            placed.update(zip(shard, trajectories, strict=True))
        return [placed[at] for at in range(len(placed))]


def deal_by_length(lengths: Sequence[int], num_workers: int) -> tuple[tuple[int, ...], ...]:
    """Positions for each worker, dealt like cards from the longest prompt to the shortest.

    Shards differ by at most one prompt, and their total lengths by at most the longest prompt; no
    shard is empty, so there may be fewer shards than workers.  Within a shard the prompts keep
    their order.
    """
    longest_first = sorted(range(len(lengths)), key=lambda at: (-lengths[at], at))
    num_shards = min(num_workers, len(lengths))
    return tuple(tuple(sorted(longest_first[at::num_shards])) for at in range(num_shards))

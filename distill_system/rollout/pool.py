"""Many rollout workers as one: prompts are dealt out, trajectories come back in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distill_system.errors import RepeatedLossError, WorkerLostError
from distill_system.records import Prompt, Trajectory, count_occurrences
from distill_system.rollout.sampling import Sampling
from distill_system.workers import Reference, Workers

LeaveOut = Callable[[Prompt, WorkerLostError], None]
"""Told of a prompt that is left out, and what it has cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingRollouts:
    """Rollouts under way: shards[i] holds the positions of the prompts that calls[i] answers.

    how: what `generate` takes beside the prompts.
    """

    prompts: tuple[Prompt, ...]
    how: tuple[Any, ...]
    calls: tuple[Reference, ...]
    shards: tuple[tuple[int, ...], ...]


class RolloutPool:
    """Rollout workers that hold the same model.

    leave_out: for prompts that cost a worker each time they are answered; None ends the run.
    """

    def __init__(self, workers: Workers, *, leave_out: LeaveOut | None = None) -> None:
        self.workers = workers
        self._leave_out = leave_out

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
        counted, how = tuple(count_occurrences(prompts)), (sampling, seed, label)
        shards = deal_by_length([prompt.token_ids.size for prompt in counted], self.workers.count)
        return self._ask(PendingRollouts(prompts=counted, how=how, calls=(), shards=()), shards)

    def finish(self, pending: PendingRollouts) -> list[Trajectory]:
        """Wait for rollouts that `start` began; trajectories in the order of its prompts.

        Raises: WorkerLostError that names a prompt which costs a worker each time.
        """
        return [written for written in self.finish_each(pending) if written is not None]

    def finish_each(self, pending: PendingRollouts) -> list[Trajectory | None]:
        """As `finish`, with None for each prompt that is left out."""
        while True:
            try:
                results = self.workers.finish(pending.calls, what="rollouts")
            except RepeatedLossError as lost:
                pending = self._isolate(pending, lost)
            else:
                break
        placed: dict[int, Trajectory] = {}
        for shard, trajectories in zip(pending.shards, results, strict=True):
            placed.update(zip(shard, trajectories, strict=True))
        return [placed.get(at) for at in range(len(pending.prompts))]

    def _ask(self, pending: PendingRollouts, shards: Sequence[tuple[int, ...]]) -> PendingRollouts:
        """With a call more for each of these shards."""
        members = self.workers.members
        calls = [
            self.workers.start(
                members[index % len(members)],
                "generate",
                [pending.prompts[at] for at in shard],
                *pending.how,
            )
            for index, shard in enumerate(shards)
        ]
        return replace(pending, calls=(*pending.calls, *calls), shards=(*pending.shards, *shards))

    def _isolate(self, pending: PendingRollouts, lost: RepeatedLossError) -> PendingRollouts:
        """Ask for each prompt of a call that costs workers alone; a prompt that was alone is it.

        Raises: WorkerLostError that names the prompt, unless such are left out.
        """
        index = pending.calls.index(lost.call)
        shard = pending.shards[index]
        rest = replace(
            pending,
            calls=pending.calls[:index] + pending.calls[index + 1 :],
            shards=pending.shards[:index] + pending.shards[index + 1 :],
        )
        if len(shard) > 1:
            return self._ask(rest, [(at,) for at in shard])
        prompt = pending.prompts[shard[0]]
        if self._leave_out is None:
            raise fatal_prompt(prompt, lost) from lost
        self._leave_out(prompt, lost)
        return rest


def fatal_prompt(prompt: Prompt, lost: WorkerLostError) -> WorkerLostError:
    """The error that names a prompt which costs a worker each time it is answered."""
    return WorkerLostError(
        f"prompt {prompt.prompt_id!r} costs a worker each time it is answered: {lost}. Leave it "
        "out of the data, or set faults.fatal_prompts=leave_out",
        lost.worker,
    )


def deal_by_length(lengths: Sequence[int], num_workers: int) -> tuple[tuple[int, ...], ...]:
    """Positions for each worker, dealt like cards from the longest prompt to the shortest.

    Shards differ by at most one prompt, and their total lengths by at most the longest prompt; no
    shard is empty, so there may be fewer shards than workers.  Within a shard the prompts keep
    their order.
    """
    longest_first = sorted(range(len(lengths)), key=lambda at: (-lengths[at], at))
    num_shards = min(num_workers, len(lengths))
    return tuple(tuple(sorted(longest_first[at::num_shards])) for at in range(num_shards))

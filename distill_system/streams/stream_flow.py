"""One stream on its way from prompts to scoring: who writes what, and which step learns from it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial

from distill_system.data import PromptFrontier
from distill_system.records import Author, Prompt, ScoredChunk, Stream, Trajectory
from distill_system.rollout import AsynchronousRollouts, GenerationRequest, Sampling
from distill_system.scoring import AsynchronousScoring
from distill_system.streams.window import StalenessWindow, Ticket
from distill_system.workers import Reference

LookUp = Callable[[int], Prompt | Trajectory]
"""What stands at an index of the frontier: a prompt to answer, or what is written already."""


class StreamFlow:
    """Gives out prompts as the window allows, and sorts what comes back into steps.

    sampling, seed: how every prompt is answered.
    ages: whether what is written grows old: the student's text does, the teacher's does not.
    """

    def __init__(
        self,
        stream: Stream,
        window: StalenessWindow,
        writer: AsynchronousRollouts,
        scoring: AsynchronousScoring,
        *,
        frontier: PromptFrontier,
        look_up: LookUp,
        sampling: Sampling,
        seed: int,
    ) -> None:
        self.stream = stream
        self.window = window
        self.writer = writer
        self.ages = stream is Stream.ON_POLICY
        self._author = Author.STUDENT if self.ages else Author.TEACHER
        self._scoring = scoring
        self._frontier = frontier
        self._look_up = look_up
        self._request = partial(GenerationRequest, sampling=sampling, seed=seed)
        self._first_number = window.next_step * window.batch_size
        self._tickets: dict[str, Ticket] = {}
        self._handed_back: dict[str, GenerationRequest] = {}
        self._written: dict[str, Ticket] = {}

    def give_out(self, now: float) -> None:
        """Every prompt that the window has room for, to the least loaded worker, one by one."""
        self._give_again()
        while (found := self.writer.find_free(self._suits)) is not None:
            worker, version = found
            dropped = self.window.pop_dropped()
            index = self._frontier.take(1)[0] if dropped is None else dropped
            newest = version if self.ages else self.window.next_step
            ticket = self.window.give(index, newest, again=dropped is not None)
            item = self._look_up(index)
            if isinstance(item, Prompt):
                number = self._first_number + ticket.number
                request = self._request(prompt=item, label=f"ticket_{number}")
                name = request.name(self._author)
                self._tickets[name] = ticket
                self.writer.give(worker, name, request)
            else:
                self._arrive(ticket, item, now)

    def hear_of(self, done: Sequence[Reference], now: float) -> Sequence[Trajectory]:
        """Slices are done: what they finished goes on to scoring, and is returned."""
        written = self.writer.collect(done, now)
        for trajectory in written:
            self._arrive(self._tickets.pop(trajectory.trajectory_id), trajectory, now)
        return written

    def take(self, step: int) -> list[ScoredChunk]:
        """What a step learns from, scored."""
        self.window.take()
        return self._consume(self._scoring.take(step, self.stream))

    def take_more(self, step: int, max_tokens: int) -> list[ScoredChunk]:
        """What is scored for a later step, of so many response tokens at most; if it ages."""
        more = self._scoring.take_some(step, self.stream, max_tokens)
        self.window.take_more(
            self._written[each.trajectory_id] for part in more for each in part.chunk.trajectories
        )
        return self._consume(more)

    def take_back(self, worker: int, now: float) -> None:
        """Let a worker go; its prompts are given to others."""
        self._handed_back |= self.writer.release(worker, now)

    def awaits_weights(self, newest: int) -> bool:
        """Whether a worker that held this version would be given a prompt."""
        return self.ages and (bool(self._handed_back) or self.window.can_give(newest))

    def _suits(self, version: int) -> bool:
        return self.window.can_give(version if self.ages else self.window.next_step)

    def _give_again(self) -> None:
        """What a worker left behind, under its old name, so that it becomes the same sample."""
        for name in list(self._handed_back):
            oldest = self._tickets[name].needs_version if self.ages else 0
            found = self.writer.find_free(partial(operator.le, oldest))
            if found is not None:
                self.writer.give(found[0], name, self._handed_back.pop(name))

    def _arrive(self, ticket: Ticket, trajectory: Trajectory, now: float) -> None:
        step = self.window.sort(ticket, trajectory.oldest_version if self.ages else None)
        if step is not None:
            if self.ages:  # rows of data may be under way twice, at the seam of two epochs
                self._written[trajectory.trajectory_id] = ticket
            self._scoring.add(step, self.stream, trajectory, now=now)
            if self.window.is_full(step):
                self._scoring.close(step, self.stream)

    def _consume(self, scored: list[ScoredChunk]) -> list[ScoredChunk]:
        for part in scored if self.ages else ():
            for trajectory in part.chunk.trajectories:
                del self._written[trajectory.trajectory_id]
        return scored

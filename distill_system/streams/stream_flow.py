"""One stream's prompts on their way to its writers, as the window has room for them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial

from distill_system.errors import WorkerLostError
from distill_system.records import Author, Prompt, Stream, Trajectory
from distill_system.rollout import GenerationRequest, LeaveOut, Sampling, fatal_prompt
from distill_system.streams.in_flight import FATAL, SUSPECT, Entry, InFlight
from distill_system.streams.writers import Writers

LookUp = Callable[[int], Prompt | Trajectory]
"""What stands at an index of the frontier: a prompt to answer, or what is written already."""


class StreamFlow:
    """Gives out prompts as the window allows; the buffer knows what becomes of them.

    draw: the index of the next prompt.  look_up: what stands there.
    sampling, seed: how every prompt is answered.
    leave_out: for prompts that cost a worker each time they are answered; None ends the run.
    clock: seconds that never run backwards.
    """

    def __init__(
        self,
        stream: Stream,
        buffer: InFlight,
        writers: Writers,
        *,
        draw: Callable[[], int],
        look_up: LookUp,
        sampling: Sampling,
        seed: int,
        leave_out: LeaveOut | None,
        clock: Callable[[], float],
    ) -> None:
        self.stream = stream
        self.buffer = buffer
        self.writers = writers
        self._author = Author.STUDENT if stream is Stream.ON_POLICY else Author.TEACHER
        self._draw = draw
        self._look_up = look_up
        self._request = partial(GenerationRequest, sampling=sampling, seed=seed)
        # Labels of a resumed run go on where an unbroken run would be, so that samples differ.
        self._first_number = buffer.window.first_step * buffer.window.batch_size
        self._leave_out = leave_out
        self._clock = clock

    def give_out(self) -> None:
        """Every prompt that the window has room for, to the least loaded worker, one by one."""
        if not self._write_again():
            return  # a worker is to become idle first
        while (found := self.writers.find_free(self.buffer.may_give)) is not None:
            worker, version = found
            self._begin(self.buffer.give(version, self._draw), worker)

    def awaits_weights(self, newest: int) -> bool:
        """Whether a worker that held this version would be given a prompt."""
        buffer = self.buffer
        return buffer.ages and (bool(buffer.handed_back()) or buffer.may_give(newest))

    def _begin(self, entry: Entry, worker: int) -> None:
        """Let a worker answer the entry's prompt, or take what stands there already."""
        item = self._look_up(entry.prompt)
        if isinstance(item, Prompt):
            label = f"ticket_{self._first_number + entry.number}"
            entry.request = self._request(prompt=item, label=label)
            entry.name = entry.request.name(self._author)
            self.writers.write(worker, entry)
        else:
            self.buffer.arrive(entry, item, self._clock())

    def _write_again(self) -> bool:
        """What a worker left behind, under its old name, so that it becomes the same sample.

        Returns whether nothing waits for a worker of its own.
        """
        for entry in sorted(self.buffer.handed_back(), key=lambda each: each.num_losses >= SUSPECT):
            suits = partial(operator.le, entry.needs_version)
            if entry.num_losses < SUSPECT:
                found = self.writers.find_free(suits)
                if found is not None:
                    self.writers.write(found[0], entry)
                continue
            idle = self.writers.find_idle(suits)
            if idle is None:
                return False
            if entry.num_losses >= FATAL:
                self._replace_prompt(entry, idle)
            else:
                self.writers.write(idle, entry)
        return True

    def _replace_prompt(self, entry: Entry, worker: int) -> None:
        """Another prompt for an entry whose own costs a worker each time it is answered.

        Raises: WorkerLostError that names the prompt, unless such are left out.
        """
        assert entry.request is not None, "it was written before"
        prompt = entry.request.prompt
        lost = WorkerLostError(
            f"{entry.num_losses} workers were lost while they answered it, the last two with "
            "nothing else"
        )
        if self._leave_out is None:
            raise fatal_prompt(prompt, lost)
        self._leave_out(prompt, lost)
        entry.prompt, entry.num_losses = self._draw(), 0
        self._begin(entry, worker)

"""One stream's prompts on their way to its writers, as the window has room for them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial

from distill_system.data import PromptFrontier
from distill_system.records import Author, Prompt, Stream, Trajectory
from distill_system.rollout import GenerationRequest, Sampling
from distill_system.streams.in_flight import InFlight
from distill_system.streams.writers import Writers

LookUp = Callable[[int], Prompt | Trajectory]
"""What stands at an index of the frontier: a prompt to answer, or what is written already."""


class StreamFlow:
    """Gives out prompts as the window allows; the buffer knows what becomes of them.

    sampling, seed: how every prompt is answered.  clock: seconds that never run backwards.
    """

    def __init__(
        self,
        stream: Stream,
        buffer: InFlight,
        writers: Writers,
        *,
        frontier: PromptFrontier,
        look_up: LookUp,
        sampling: Sampling,
        seed: int,
        clock: Callable[[], float],
    ) -> None:
        self.stream = stream
        self.buffer = buffer
        self.writers = writers
        self._author = Author.STUDENT if stream is Stream.ON_POLICY else Author.TEACHER
        self._frontier = frontier
        self._look_up = look_up
        self._request = partial(GenerationRequest, sampling=sampling, seed=seed)
        # Labels of a resumed run go on where an unbroken run would be, so that samples differ.
        self._first_number = buffer.window.first_step * buffer.window.batch_size
        self._clock = clock

    def give_out(self) -> None:
        """Every prompt that the window has room for, to the least loaded worker, one by one."""
        self._write_again()
        while (found := self.writers.find_free(self.buffer.may_give)) is not None:
            worker, version = found
            entry = self.buffer.give(version, self._draw)
            item = self._look_up(entry.prompt)
            if isinstance(item, Prompt):
                label = f"ticket_{self._first_number + entry.number}"
                entry.request = self._request(prompt=item, label=label)
                entry.name = entry.request.name(self._author)
                self.writers.write(worker, entry)
            else:
                self.buffer.arrive(entry, item, self._clock())

    def awaits_weights(self, newest: int) -> bool:
        """Whether a worker that held this version would be given a prompt."""
        buffer = self.buffer
        return buffer.ages and (bool(buffer.handed_back()) or buffer.may_give(newest))

    def _draw(self) -> int:
        return self._frontier.take(1)[0]

    def _write_again(self) -> None:
        """What a worker left behind, under its old name, so that it becomes the same sample."""
        for entry in self.buffer.handed_back():
            found = self.writers.find_free(partial(operator.le, entry.needs_version))
            if found is not None:
                self.writers.write(found[0], entry)

"""Bounded staleness: which prompts may be given out, and which step learns from what they became.

Step k learns under weight version k and makes version k + 1. It learns from a batch of B
trajectories; at most S + 1 batches are given out and not yet learned from. docs/concepts.md proves
that no trajectory is then more than S versions older than the student that learns from it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

TooOld = Literal["wait", "reissue", "weigh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """One prompt, given out once.

    number: counts tickets in the order of giving out.  prompt: the frontier's index.
    step: the step it is promised to; None if it goes to the first that has room once it is written.
    needs_version: whoever writes it must hold this weight version or a newer one.
    """

    number: int
    prompt: int
    step: int | None
    needs_version: int


@dataclass(slots=True)
class _Batch:
    """What a step learns from, by number: tickets promised to it, and those that are written."""

    promised: dict[int, Ticket] = field(default_factory=dict)
    written: dict[int, Ticket] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return len(self.promised) + len(self.written)


class StalenessWindow:
    """Gives out tickets, sorts what is written into batches, and says when a batch is whole.

    batch_size: B.  max_staleness: S.  first_step, end_step: feeds steps first .. end - 1.
    too_old: "wait" promises each ticket to a step as it is given out, so that every step learns
        from its own prompts. "reissue" and "weigh" fill batches in the order of finishing; what
        would be older than S is given out again, promised to a step this time, or taken as it is.
    min_share: a step may begin with this share of its batch, unless it waits for a promise.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        max_staleness: int,
        first_step: int,
        end_step: int,
        too_old: TooOld = "wait",
        min_share: float = 1.0,
    ) -> None:
        self.batch_size = batch_size
        self.max_staleness = max_staleness
        self.next_step, self.end_step = first_step, end_step
        self.too_old = too_old
        self.fewest = math.ceil(batch_size * min_share)
        self.num_given = 0
        self.num_dropped = 0
        self._num_learned = 0
        self._unsorted: dict[int, Ticket] = {}
        self._batches: dict[int, _Batch] = {}
        self._dropped: deque[int] = deque()

    @property
    def num_under_way(self) -> int:
        """Tickets given out and not learned from or dropped: at most (S + 1) B."""
        return self.num_given - self.num_dropped - self._num_learned

    def can_give(self, version: int) -> bool:
        """Whether a writer that holds this version may be given a prompt now.

        In the order of giving out the ticket is learned from by step next_step + under way // B.
        """
        step = self._step_to_give()
        return step <= version + self.max_staleness and step < self.end_step

    def pop_dropped(self) -> int | None:
        """The prompt of a dropped ticket, to be given out before any new one; None if none is."""
        return self._dropped.popleft() if self._dropped else None

    def give(self, prompt: int, version: int, *, again: bool = False) -> Ticket:
        """A ticket for this prompt, for a writer of whom can_give was asked.

        again: it was dropped before.
        """
        assert self.can_give(version), "ask can_give first"
        step = self._step_to_give()
        promised = self._room_until(version) if again else step if self._in_order else None
        ticket = Ticket(
            number=self.num_given,
            prompt=prompt,
            step=promised,
            needs_version=step - self.max_staleness,
        )
        self.num_given += 1
        if promised is None:
            self._unsorted[ticket.number] = ticket
        else:
            self._find(promised).promised[ticket.number] = ticket
        return ticket

    def sort(self, ticket: Ticket, oldest_version: int | None) -> int | None:
        """The step that learns from what was written for a ticket; None if it is dropped.

        oldest_version: of its tokens; None for what does not age.
        """
        step = ticket.step
        if step is None:
            del self._unsorted[ticket.number]
            step = self._first_room()
        else:
            del self._find(step).promised[ticket.number]
        is_late = oldest_version is not None and step - oldest_version > self.max_staleness
        if is_late and self.too_old == "reissue":
            assert ticket.step is None, "a promise is kept in time"
            self.num_dropped += 1
            self._dropped.append(ticket.prompt)
            return None
        assert not (is_late and self._in_order), "in order nothing is late"
        self._find(step).written[ticket.number] = ticket
        return step

    def is_full(self, step: int) -> bool:
        """Whether all that a step can learn from is written."""
        return len(self._batches.get(step, _Batch()).written) == self.batch_size

    def is_enough(self) -> bool:
        """Whether the next step may begin with what is written for it."""
        batch = self._batches.get(self.next_step, _Batch())
        return not batch.promised and len(batch.written) >= self.fewest

    def take(self) -> None:
        """The next step learns from its batch; the step after it comes next."""
        assert self.is_enough(), "ask is_enough first"
        self._num_learned += len(self._batches.pop(self.next_step).written)
        self.next_step += 1

    def take_more(self, tickets: Iterable[Ticket]) -> None:
        """Written tickets of a later step that are learned from now; others take their places."""
        for ticket in tickets:
            [holder] = [b for b in self._batches.values() if ticket.number in b.written]
            del holder.written[ticket.number]
            self._num_learned += 1

    def prompts_under_way(self) -> list[int]:
        """Prompts given out and not learned from, which a resumed run gives out before new ones."""
        tickets = dict(self._unsorted)
        for batch in self._batches.values():
            tickets |= batch.promised | batch.written
        return [*self._dropped, *(tickets[number].prompt for number in sorted(tickets))]

    @property
    def _in_order(self) -> bool:
        return self.too_old == "wait"

    def _step_to_give(self) -> int:
        return self.next_step + self.num_under_way // self.batch_size

    def _first_room(self) -> int:
        step = self.next_step
        while self._find(step).size >= self.batch_size:
            step += 1
        return step

    def _room_until(self, version: int) -> int:
        """The last step with room among those that are in time for a writer of this version.

        There is one: all that is under way has room in these steps, and this ticket is one more.
        """
        last = min(version + self.max_staleness, self.end_step - 1)
        steps = range(last, self.next_step - 1, -1)
        return next(step for step in steps if self._find(step).size < self.batch_size)

    def _find(self, step: int) -> _Batch:
        return self._batches.setdefault(step, _Batch())

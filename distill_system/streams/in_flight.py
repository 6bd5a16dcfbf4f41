"""Every trajectory of one stream on its way from prompt to learner: one entry, one state.

                  give                   arrive              score              heard
      frontier ---------> GIVEN         .-------> WRITTEN ---------> SCORING ---------> SCORED
                           |  ^         |            |                                     |
                     write |  | hand    |            | too old                       take  |
                           v  | back    |            v                                     v
                          WRITING ------'         DROPPED --- give (a new entry)        learner

| move | made by | when |
|---|---|---|
| give | StreamFlow | a writer is free and the window has room; a dropped prompt comes first |
| write | Writers | the prompt joins that worker's next slice |
| hand_back | Writers | the worker leaves or is lost: the same samples are written anew |
| arrive | Writers, or StreamFlow for rows of data | a slice has finished the text |
| score, scored | Scorers | a chunk goes to a scorer, and its call has ended |
| score_again | Scorers | the scorer is lost: SCORING -> WRITTEN |
| take, take_more | AsynchronousStreams | the learner's step begins |

An entry's step is fixed when it is given out (too_old: wait) or when its text arrives. A dropped
entry holds no place in the window; its prompt is the next to be given out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from distill_system.records import ScoredChunk, Trajectory
from distill_system.rollout import GenerationRequest
from distill_system.streams.window import StalenessWindow


class State(Enum):
    """Where a trajectory is; see the module's map."""

    GIVEN = auto()
    WRITING = auto()
    WRITTEN = auto()
    SCORING = auto()
    SCORED = auto()
    DROPPED = auto()


SUSPECT, FATAL = 2, 4
"""An entry that was written by so many lost workers may be the cause, and is written alone from
then on; after so many, it is."""

PROMISED = (State.GIVEN, State.WRITING)
ARRIVED = (State.WRITTEN, State.SCORING, State.SCORED)


@dataclass(slots=True, eq=False)
class Entry:
    """One prompt that was given out, and what has become of it.

    number: counts prompts in the order of giving out.  prompt: the frontier's index.
    step: the step that learns from it; None until that is known.
    needs_version: its writer must hold this weight version or a newer one.
    request, name: what a writer is asked for, and the name of the trajectory that answers it; none
        for a row of data.
    worker: the rollout worker that writes it, or wrote it.
    num_losses: workers that were lost while they wrote it.
    trajectory, arrived_at: the text, and when it was heard of (seconds of the streams' clock).
    chunk: what it is scored in.
    """

    number: int
    prompt: int
    step: int | None
    needs_version: int
    state: State = State.GIVEN
    request: GenerationRequest | None = None
    name: str = ""
    worker: int | None = None
    num_losses: int = 0
    trajectory: Trajectory | None = None
    arrived_at: float = 0.0
    chunk: ScoredChunk | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens; 0 before the text has arrived."""
        return 0 if self.trajectory is None else int(self.trajectory.token_ids.size)


class InFlight:
    """The buffer of one stream; the only place that knows where a trajectory is.

    window: the rule that says what may be given out and what is too old.
    ages: whether text grows old: the student's does, the teacher's does not.
    """

    def __init__(self, window: StalenessWindow, *, ages: bool) -> None:
        self.window = window
        self.ages = ages
        self.next_step = window.first_step
        self.num_given = 0
        self.num_dropped = 0
        self._num_in_flight = 0
        self._is_demanded = False
        self._had_suspects = False
        # Two views of the entries, kept by _put and _remove alone. Both keep the order in which
        # entries came to their state.
        self._by_state: dict[tuple[int | None, State], dict[int, Entry]] = {}
        self._by_worker: dict[int, dict[str, Entry]] = {}

    # What writers and scorers ask

    @property
    def num_in_flight(self) -> int:
        """Trajectories given out and not yet learned from or dropped: at most (S + 1) B."""
        return self._num_in_flight

    def may_give(self, version: int) -> bool:
        """Whether a writer that holds this version may be given a prompt now."""
        return self.window.may_give(self._step_to_give(), self._age_of(version))

    def handed_back(self) -> list[Entry]:
        """Entries whose writer has left, in the order of giving out."""
        found = [e for entries in self._in(State.GIVEN) for e in entries.values()]
        return sorted(found, key=lambda entry: entry.number)

    def holds_suspect(self, worker: int) -> bool:
        """Whether a worker writes what may be the cause of losses."""
        if not self._had_suspects:
            return False  # asked for every prompt that is given out
        return any(e.num_losses >= SUSPECT for e in self._by_worker.get(worker, {}).values())

    def num_writing(self, worker: int | None = None) -> int:
        """Entries that a worker writes; None counts those of all workers."""
        if worker is not None:
            return len(self._by_worker.get(worker, ()))
        return sum(map(len, self._by_worker.values()))

    def waiting(self) -> Iterable[tuple[int, Mapping[int, Entry]]]:
        """Steps with text that no scorer has yet, and that text in the order of its arrival."""
        for (step, state), entries in list(self._by_state.items()):
            if state is State.WRITTEN and entries:
                assert step is not None, "text that has arrived belongs to a step"
                yield step, entries

    def is_complete(self, step: int) -> bool:
        """Whether the text there need not wait for company: no more comes, or it is asked for."""
        is_full = self._count(step, ARRIVED) == self.window.batch_size
        return is_full or (self._is_demanded and step == self.next_step)

    # What the learner's side asks

    def has_enough(self) -> bool:
        """Whether the next step may begin with what is written for it."""
        promised = self._count(self.next_step, PROMISED)
        return promised == 0 and self._count(self.next_step, ARRIVED) >= self.window.fewest

    def demand(self) -> None:
        """The learner waits for the next step, which has enough: score what is there at once."""
        self._is_demanded = True

    def is_scored(self) -> bool:
        """Whether all that has arrived for the next step is scored."""
        return self._count(self.next_step, (State.WRITTEN, State.SCORING)) == 0

    def prompts(self) -> list[int]:
        """Prompts in flight; a resumed run gives them out, in this order, before new ones.

        Dropped ones come first, as they do in a run that goes on.
        """
        dropped = list(self._by_state.get((None, State.DROPPED), {}).values())
        others = [
            entry
            for (_, state), entries in self._by_state.items()
            if state is not State.DROPPED
            for entry in entries.values()
        ]
        others.sort(key=lambda entry: entry.number)
        return [entry.prompt for entry in [*dropped, *others]]

    # Moves

    def give(self, version: int, draw: Callable[[], int]) -> Entry:
        """A new entry, for a writer of whom may_give was asked; GIVEN.

        draw: the next prompt of the frontier; not called where a dropped one is to be given again.
        """
        assert self.may_give(version), "ask may_give first"
        step = self._step_to_give()
        dropped = next(iter(self._by_state.get((None, State.DROPPED), {}).values()), None)
        promised = step if self.window.in_order else None
        if dropped is not None:  # it must not come too late again: it gets a step at once
            self._remove(dropped)
            promised = self._room_in_time(version)
        prompt = draw() if dropped is None else dropped.prompt
        entry = Entry(
            number=self.num_given,
            prompt=prompt,
            step=promised,
            needs_version=self.window.needs_version(step) if self.ages else 0,
        )
        self.num_given += 1
        self._num_in_flight += 1
        self._put(entry)
        return entry

    def write(self, entry: Entry, worker: int) -> None:
        """GIVEN -> WRITING: a worker has the prompt."""
        entry.worker = worker
        self._move(entry, State.WRITING)

    def hand_back(self, worker: int, *, is_lost: bool = False) -> None:
        """WRITING -> GIVEN for all that a worker has: it leaves, or is lost."""
        for entry in list(self._by_worker.get(worker, {}).values()):
            self._move(entry, State.GIVEN)
            entry.worker = None
            entry.num_losses += is_lost
            self._had_suspects |= entry.num_losses >= SUSPECT

    def find_writing(self, worker: int, name: str) -> Entry:
        """The entry that a worker writes under this trajectory's name."""
        return self._by_worker[worker][name]

    def arrive(self, entry: Entry, trajectory: Trajectory, now: float) -> None:
        """GIVEN or WRITING -> WRITTEN, or DROPPED where the text is too old for its step."""
        self._remove(entry)
        step = self._first_room() if entry.step is None else entry.step
        oldest = trajectory.oldest_version if self.ages else None
        is_late = oldest is not None and self.window.is_too_old(step, oldest)
        assert not (is_late and entry.step is not None), "what is promised to a step is in time"
        if is_late and self.window.too_old == "reissue":
            entry.state = State.DROPPED
            self.num_dropped += 1
            self._num_in_flight -= 1
        else:
            entry.state, entry.step = State.WRITTEN, step
            entry.trajectory, entry.arrived_at = trajectory, now
        self._put(entry)

    def score(self, entries: Sequence[Entry], chunk: ScoredChunk) -> None:
        """WRITTEN -> SCORING, or SCORED at once where the teacher is asked for nothing."""
        state = State.SCORED if chunk.targets is None else State.SCORING
        for entry in entries:
            entry.chunk = chunk
            self._move(entry, state)

    def scored(self, entries: Sequence[Entry]) -> None:
        """SCORING -> SCORED."""
        for entry in entries:
            self._move(entry, State.SCORED)

    def score_again(self, entries: Sequence[Entry]) -> None:
        """SCORING -> WRITTEN: the scorer is lost, and what it read with it."""
        for entry in entries:
            entry.chunk = None
            self._move(entry, State.WRITTEN)

    def take(self) -> list[ScoredChunk]:
        """SCORED -> out: the next step learns from its batch, the largest chunk first."""
        assert self.has_enough(), "ask has_enough first"
        assert self.is_scored(), "ask is_scored first"
        chunks = self._take(self._by_state.get((self.next_step, State.SCORED), {}).values())
        self._by_state = {key: found for key, found in self._by_state.items() if found}
        self.next_step += 1
        self._is_demanded = False
        return sorted(chunks, key=lambda scored: -scored.chunk.num_tokens)

    def take_more(self, max_tokens: int) -> list[ScoredChunk]:
        """SCORED -> out for chunks of the step that comes next, of so many response tokens at most.

        Other text takes their places in that step.
        """
        taken: list[ScoredChunk] = []
        for entry in list(self._by_state.get((self.next_step, State.SCORED), {}).values()):
            assert entry.chunk is not None, "what is scored is in a chunk"
            is_taken = any(entry.chunk is chunk for chunk in taken)
            tokens = entry.chunk.chunk.num_response_tokens
            if not is_taken and tokens <= max_tokens:
                taken.append(entry.chunk)
                max_tokens -= tokens
        for chunk in taken:
            entries = self._by_state[self.next_step, State.SCORED].values()
            self._take([entry for entry in entries if entry.chunk is chunk])
        return taken

    def _take(self, entries: Iterable[Entry]) -> list[ScoredChunk]:
        chunks: dict[int, ScoredChunk] = {}
        # In the order of giving out: chunks of equal size are not left to the scorers' timing.
        for entry in sorted(entries, key=lambda entry: entry.number):
            assert entry.chunk is not None, "what is scored is in a chunk"
            chunks[id(entry.chunk)] = entry.chunk
            self._remove(entry)
            self._num_in_flight -= 1
        return list(chunks.values())

    def _step_to_give(self) -> int:
        return self.window.step_to_give(self.next_step, self._num_in_flight)

    def _age_of(self, version: int) -> int:
        """What does not age may always be written for the window's next steps."""
        return version if self.ages else self.next_step

    def _first_room(self) -> int:
        step = self.next_step
        while not self._has_room(step):
            step += 1
        return step

    def _room_in_time(self, version: int) -> int:
        """The last step with room among those that are in time for a writer of this version.

        There is one: all that is in flight has room in these steps, and this is one more.
        """
        last = self.window.last_step_in_time(self._age_of(version))
        steps = range(last, self.next_step - 1, -1)
        return next(step for step in steps if self._has_room(step))

    def _has_room(self, step: int) -> bool:
        return self._count(step, (*PROMISED, *ARRIVED)) < self.window.batch_size

    def _count(self, step: int, states: Iterable[State]) -> int:
        return sum(len(self._by_state.get((step, state), ())) for state in states)

    def _in(self, state: State) -> list[dict[int, Entry]]:
        return [found for (_, key), found in self._by_state.items() if key is state]

    def _move(self, entry: Entry, state: State) -> None:
        self._remove(entry)
        entry.state = state
        self._put(entry)

    def _put(self, entry: Entry) -> None:
        step = None if entry.state is State.DROPPED else entry.step
        self._by_state.setdefault((step, entry.state), {})[entry.number] = entry
        if entry.state is State.WRITING:
            assert entry.worker is not None, "somebody writes it"
            writing = self._by_worker.setdefault(entry.worker, {})
            assert entry.name not in writing, f"worker {entry.worker} writes {entry.name} already"
            writing[entry.name] = entry

    def _remove(self, entry: Entry) -> None:
        step = None if entry.state is State.DROPPED else entry.step
        del self._by_state[step, entry.state][entry.number]
        if entry.state is State.WRITING:
            assert entry.worker is not None, "somebody writes it"
            del self._by_worker[entry.worker][entry.name]

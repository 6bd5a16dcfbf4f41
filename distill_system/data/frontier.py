"""Which prompts come next: a seeded shuffle per source and epoch, sources in turn by weight.

In: the number of prompts of each source, weights and a seed.  Out: indices.  The position is a few
numbers, which a checkpoint stores.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate, groupby
from math import lcm
from typing import Any, NamedTuple, NotRequired

import numpy as np
import numpy.typing as npt
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from distill_system.data.kept_records import count_sources
from distill_system.errors import DataError, RunStateError
from distill_system.records import Prompt
from distill_system.seeds import derive_seed


class SourceShare(NamedTuple):
    """One source: its number of prompts, and its weight relative to the other sources."""

    name: str
    num_prompts: int
    weight: float = 1.0


def source_shares(prompts: Sequence[Prompt], weights: Mapping[str, float]) -> list[SourceShare]:
    """The sources of prompts that are sorted by source; weights by name, 1 where none is given."""
    counts = count_sources(prompts)
    if counts is None:
        groups = groupby(prompts, lambda prompt: prompt.source)
        counts = {name: sum(1 for _ in rows) for name, rows in groups}
    return [SourceShare(name, count, weights.get(name, 1.0)) for name, count in counts.items()]


class PromptFrontier:
    """Hands out prompt indices; each epoch of a source holds each of its prompts once.

    Sources take turns deterministically: after k indices, a source whose share of all weights is w
    has given between k w - 1 and k w + 1 of them. Each source has its own epochs and orders.

    prompts: the number of prompts, or the sources; their indices follow one another.
    seed: the run's seed.
    purpose: name of this use; two purposes get unrelated orders.
    Raises: DataError if a source has no prompts, or there is no source.
    """

    def __init__(self, prompts: int | Sequence[SourceShare], seed: int, purpose: str) -> None:
        shares = [SourceShare(purpose, prompts)] if isinstance(prompts, int) else list(prompts)
        counts = [share.num_prompts for share in shares]
        if not shares or min(counts) < 1:
            raise DataError(f"{purpose}: expected at least one prompt to draw, got {counts}")
        self._purpose = purpose
        alone = len(shares) == 1
        self._walks = {
            share.name: _SourceWalk(
                share.num_prompts, first, seed, purpose, "" if alone else share.name
            )
            for share, first in zip(shares, accumulate([0, *counts]), strict=False)
        }
        assert len(self._walks) == len(shares), f"{purpose}: two sources of one name"
        self._turns = _Turns([share.weight for share in shares])
        self._weights: list[float] | None = None  # once they are others than those given here
        self._since = [0] * len(shares)  # indices that each source had given when they came
        self._returned: deque[int] = deque()

    def take(self, count: int, *, weights: Sequence[float] | None = None) -> list[int]:
        """The next count indices: first those that were under way at a checkpoint, then new.

        weights: of the sources, in their order, from now on; None leaves them as they are.
        """
        if weights is not None and [*weights] != self._weights:
            self._reweigh(weights, [walk.num_taken for walk in self._walks.values()])
        return [self._next() for _ in range(count)]

    @property
    def num_taken(self) -> int:
        """Indices given out so far, without those that were given out again."""
        return sum(walk.num_taken for walk in self._walks.values())

    def state(self, *, under_way: Sequence[int] = ()) -> dict[str, Any]:
        """The position as a value for JSON.

        under_way: indices that were taken and not trained on yet. A run that resumes from this
            position takes them first, in this order.
        """
        return {
            "sources": {name: walk.state() for name, walk in self._walks.items()},
            "returned": [*under_way, *self._returned],
            **({} if self._weights is None else {"weights": self._weights, "since": self._since}),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a position that `state` returned.

        Raises: RunStateError if it is no position, or belongs to other sources or another number of
            prompts.
        """
        check_position(state)
        saved = {name: position["num_prompts"] for name, position in state["sources"].items()}
        present = {name: walk.num_prompts for name, walk in self._walks.items()}
        if list(saved.items()) != list(present.items()):  # their order matters too
            raise RunStateError(
                f"{self._purpose}: the checkpoint walks over {_counts(saved)} prompts, the data "
                f"now holds {_counts(present)}; resume with the data the run began with"
            )
        for name, position in state["sources"].items():
            self._walks[name].move_to(position["epoch"], position["position"])
        self._returned = deque(state["returned"])
        if "weights" in state:
            self._reweigh(state["weights"], state["since"])

    def _reweigh(self, weights: Sequence[float], since: Sequence[int]) -> None:
        """Take turns by other weights; what was given before does not count for them."""
        self._weights, self._since = [*weights], [*since]
        self._turns = _Turns(weights)

    def _next(self) -> int:
        if self._returned:
            return self._returned.popleft()
        walks = list(self._walks.values())
        taken = [walk.num_taken - before for walk, before in zip(walks, self._since, strict=True)]
        return walks[self._turns.next(taken)].take()


class _Walk(TypedDict):
    epoch: NonNegativeInt
    position: NonNegativeInt
    num_prompts: PositiveInt


class _Position(TypedDict):
    sources: dict[str, _Walk]
    returned: list[NonNegativeInt]
    weights: NotRequired[list[PositiveFloat]]
    since: NotRequired[list[NonNegativeInt]]


_POSITION_FORM = TypeAdapter(_Position)


def check_position(state: object) -> None:
    """Check that a value is a position that PromptFrontier.state may have returned.

    Raises: RunStateError that says what is not.
    """
    try:
        position = _POSITION_FORM.validate_python(state, strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        key = ".".join(map(str, found["loc"]))
        raise RunStateError(
            f"no position in the walk over the prompts: {key}: {found['msg']}, got "
            f"{found['input']!r}"
        ) from error
    walks = position["sources"].values()
    beyond = [walk for walk in walks if walk["position"] > walk["num_prompts"]]
    most = sum(walk["num_prompts"] for walk in walks)
    if beyond or any(index >= most for index in position["returned"]):
        raise RunStateError(
            f"no position in the walk over the prompts: beyond the last of {most} prompts"
        )


class _SourceWalk:
    """The order of one source's indices: a new shuffle in each epoch."""

    def __init__(self, num_prompts: int, first: int, seed: int, purpose: str, name: str) -> None:
        self.num_prompts = num_prompts
        self._first = first
        self._seed = seed
        self._purpose = (purpose, name) if name else (purpose,)
        self.move_to(0, 0)

    @property
    def num_taken(self) -> int:
        """Indices given so far, over all epochs."""
        return self._epoch * self.num_prompts + self._position

    def take(self) -> int:
        """The next index."""
        if self._position == self.num_prompts:
            self.move_to(self._epoch + 1, 0)
        self._position += 1
        return self._first + int(self._order[self._position - 1])

    def state(self) -> dict[str, int]:
        return {
            "epoch": self._epoch,
            "position": self._position,
            "num_prompts": self.num_prompts,
        }

    def move_to(self, epoch: int, position: int) -> None:
        self._epoch = epoch
        self._position = position
        self._order = self._shuffle(epoch)

    def _shuffle(self, epoch: int) -> npt.NDArray[np.int64]:
        purpose, *name = self._purpose
        generator = np.random.default_rng(derive_seed(self._seed, purpose, *name, epoch))
        return generator.permutation(self.num_prompts)


class _Turns:
    """Chooses the next of several weighted sources; exact integer arithmetic, without rounding.

    Source: R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980). Among the
    sources that are far enough behind their share, the one whose next turn has the earliest
    deadline. With n sources, none is ever further than 1 - 1/(2n - 2) turns from its share.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(weight) for weight in weights]
        unit = lcm(*(weight.denominator for weight in exact))
        self._weights = [int(weight * unit) for weight in exact]
        self._total = sum(self._weights)
        self._slack = max(1, 2 * len(weights) - 2)

    def next(self, taken: Sequence[int]) -> int:
        """The index of the next source.  taken: turns that each source has had."""
        if len(taken) == 1:
            return 0
        turn = sum(taken) + 1
        due = [
            (Fraction(self._slack * (count + 1) - 1, weight), source)
            for source, (count, weight) in enumerate(zip(taken, self._weights, strict=True))
            if self._slack * (weight * turn - count * self._total) >= self._total
        ]
        return min(due)[1]


def _counts(sources: Mapping[str, int]) -> str:
    """For a message: one number for a single source, otherwise each source's with its name."""
    if len(sources) == 1:
        return str(next(iter(sources.values())))
    return ", ".join(f"{count} of {name}" for name, count in sources.items())

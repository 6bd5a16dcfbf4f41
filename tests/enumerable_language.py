"""An enumerable language for tests: every response of one length, with exact sums.

Brute force on purpose: nothing here calls the code under test.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class EnumerableLanguage:
    """All responses of fixed length; a state is the tuple of tokens so far."""

    vocabulary: int
    length: int

    @property
    def states(self) -> list[tuple[int, ...]]:
        return [
            state
            for prefix in range(self.length)
            for state in itertools.product(range(self.vocabulary), repeat=prefix)
        ]

    @property
    def responses(self) -> list[tuple[int, ...]]:
        return list(itertools.product(range(self.vocabulary), repeat=self.length))

    def state_rows(self, response: tuple[int, ...]) -> list[int]:
        """Row of the state before each token of the response."""
        index = {state: row for row, state in enumerate(self.states)}
        return [index[response[:t]] for t in range(self.length)]

    def probability(self, response: tuple[int, ...], policy_SV: Tensor) -> Tensor:
        rows = self.state_rows(response)
        return torch.stack(
            [policy_SV[row, token] for row, token in zip(rows, response, strict=True)]
        ).prod()

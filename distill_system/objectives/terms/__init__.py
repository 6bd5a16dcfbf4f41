"""Additive terms on hidden states, one file each; they see no vocabulary.

A term belongs to one stream. It returns this rank's share of its loss, with graph to the student's
hidden states, and keeps what its next value depends on as its state.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from distill_system.config.objective.token_matching import (
    HiddenMatchingConfig,
    RelationalConfig,
    TermConfig,
)
from distill_system.objectives.importance import ImportanceWeights
from distill_system.objectives.rows import SumOverRanks, TokenRows
from distill_system.objectives.terms.hidden_matching import HiddenMatching
from distill_system.objectives.terms.relational import Relational

__all__ = ["Term", "build_term"]


@runtime_checkable
class Term(Protocol):
    """One additive part of a stream's loss."""

    def compute_loss(
        self,
        rows: TokenRows,
        sum_over_ranks: SumOverRanks,
        weights: ImportanceWeights | None = None,
    ) -> Float[Tensor, ""]:
        """This rank's share of the term, scalar with graph; the sum over ranks is the term."""

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that the next value depends on."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what state_dict gave."""


def build_term(config: TermConfig) -> Term:
    """The term that the configuration names, for one stream."""
    match config:
        case HiddenMatchingConfig():
            return HiddenMatching(config)
        case RelationalConfig():
            return Relational()

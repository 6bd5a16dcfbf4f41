"""Weights of the prompts' sources that follow how far the student is behind its teacher on each.

Perplexity ratios of some step in, the shares in which later steps draw from the sources out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from distill_system.config.data import TeacherGapConfig


class SourceWeights:
    """The weights of every step that has not been taken yet.

    With N sources, rho_i = min(cap, perplexity_student,i / perplexity_teacher,i) and smoothing a:

        r_i(0)   = exp(rho_i) / sum_j exp(rho_j)
        psi_i    = r_i(t) exp(rho_i(t + 1))
        r_i(t+1) = a psi_i / sum_j psi_j + (1 - a) / N

    Source: DDK, arXiv 2407.16154. Differs: rho is capped, since weights multiply over measurements;
    and steps whose prompts may be under way already, by the bound on staleness, keep theirs.

    names: of the sources, in their order.  delay: steps after which a measurement holds.
    """

    def __init__(self, config: TeacherGapConfig, names: Sequence[str], *, delay: int) -> None:
        self._config = config
        self._names = list(names)
        self._delay = delay
        self._from: list[tuple[int, list[float]]] = []  # first step, and its weights; by step

    def is_due(self, done: int) -> bool:
        """Whether the ratios are to be measured once so many steps are done."""
        return done % self._config.every == 0

    def observe(self, done: int, ratios: Mapping[str, float]) -> dict[str, float]:
        """Take in the ratios that were measured after so many steps; returns weights as metrics."""
        rho = [min(self._config.cap, ratios[name]) for name in self._names]
        before = self._from[-1][1] if self._from else [1.0] * len(rho)
        psi = [weight * math.exp(ratio) for weight, ratio in zip(before, rho, strict=True)]
        weights = [each / sum(psi) for each in psi]
        if self._from:
            a = self._config.smoothing
            weights = [a * weight + (1.0 - a) / len(rho) for weight in weights]
        holding = [each for each in self._from if each[0] <= done][-1:]
        later = [each for each in self._from if each[0] > done]
        self._from = [*holding, *later, (done + self._delay if done else 0, weights)]
        return {
            f"source_weight/{name}": weight
            for name, weight in zip(self._names, weights, strict=True)
        }

    def at(self, step: int) -> list[float] | None:
        """The weights by which this step's prompts are drawn; None: those that are configured."""
        return next((weights for first, weights in reversed(self._from) if first <= step), None)

    def state(self) -> list[list[Any]]:
        """What a checkpoint keeps, as a value for JSON."""
        return [[first, weights] for first, weights in self._from]

    def restore(self, state: Sequence[Sequence[Any]]) -> None:
        """Go on from what `state` returned."""
        self._from = [(int(first), [float(each) for each in weights]) for first, weights in state]

"""The significance of the difference between two objectives, over the same seeds and examples.

A difference d_si (seed s of S, example i of N) has three sources of chance: which seeds, which
examples, and their interaction.  The claim is about new seeds and new examples, so both count:

    V_seeds     variance over seeds of the mean difference, divided by S
    V_examples  variance over examples of the difference averaged over seeds, divided by N
    t = mean difference / sqrt(V_seeds + V_examples)

is compared with Student's t, whose degrees of freedom follow from S - 1, N - 1 by Satterthwaite's
rule.  Source: Clark 1973, "The language-as-fixed-effect fallacy": t is the square root of his
min F' for crossed designs.  The interaction is part of both variances, so that the test is
conservative.

Why no resampling: three seeds can be drawn in only ten ways.  A two-level bootstrap's 95% interval
then excludes zero whenever the three seeds agree in sign, which happens by chance one time in four;
and a permutation test of three seeds cannot give a p-value below 1/4.  Resampling only the examples
answers another question: whether these particular trained models differ.

A corpus score (BLEU) is not a mean over examples.  Its V_examples is the variance of the paired
bootstrap replicates, averaged over seeds; replicate r drew the same examples everywhere.

S seeds that both objectives have, N examples, R replicates, K splits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np

from distill_system.comparison.results import Score
from distill_system.comparison.student_t import critical_value, two_sided_p_value
from distill_system.standard_errors import FloatArray, standard_error

Basis = Literal["seeds and examples", "seeds", "examples", "none"]
LEVEL = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Ours minus theirs, in the score's own unit.

    stderr_seeds: standard error over seeds; None for one seed.
    stderr: over the sources of chance named by `basis`; None if the basis is "none".
    interval: 95%.
    basis: "seeds" if the examples cannot be paired; "examples" if there is only one seed, so that
    the result does not extend to other seeds; "none" if there are not two of either.
    """

    difference: float
    stderr_seeds: float | None
    stderr: float | None
    interval: tuple[float, float] | None
    p_value: float | None
    basis: Basis
    num_seeds: int
    num_examples: int | None

    @property
    def is_significant(self) -> bool:
        """Whether chance alone makes so large a difference less than once in twenty times."""
        return self.p_value is not None and self.p_value < LEVEL


@dataclass(frozen=True, slots=True)
class _Variance:
    """An estimated variance, and the degrees of freedom of the estimate."""

    value: float
    freedom: float


def compare_scores(
    ours: Mapping[int, Sequence[Score]], theirs: Mapping[int, Sequence[Score]]
) -> Difference | None:
    """The difference between two objectives, paired by seed and example.

    ours: seed -> the scores of the K splits whose average is compared; K = 1 for one split.
    theirs: the same, of the other objective; the same splits in the same order.
    Returns: None if they have no seed in common.  The splits are fixed, not a sample of splits.
    """
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return None
    differences_S = [
        sum(our.mean - their.mean for our, their in zip(ours[s], theirs[s], strict=True))
        / len(ours[s])
        for s in seeds
    ]
    our_splits = list(zip(*(ours[s] for s in seeds), strict=True))
    their_splits = list(zip(*(theirs[s] for s in seeds), strict=True))
    examples = _average(
        [_example_variance(a, b) for a, b in zip(our_splits, their_splits, strict=True)]
    )
    num_examples = sum(len(scores[0].prompt_ids) for scores in our_splits)
    return _conclude(differences_S, examples, num_examples=num_examples)


def _conclude(
    differences_S: Sequence[float], examples: _Variance | None, *, num_examples: int | None
) -> Difference:
    num_seeds = len(differences_S)
    difference = sum(differences_S) / num_seeds
    stderr_seeds = standard_error(differences_S)
    seeds = None if stderr_seeds is None else _Variance(stderr_seeds**2, num_seeds - 1)
    total = _add([variance for variance in (seeds, examples) if variance is not None])
    interval, p_value = _test(difference, total)
    return Difference(
        difference=difference,
        stderr_seeds=stderr_seeds,
        stderr=None if total is None else math.sqrt(total.value),
        interval=interval,
        p_value=p_value,
        basis=_name_basis(seeds, examples),
        num_seeds=num_seeds,
        num_examples=None if examples is None else num_examples,
    )


def _test(
    difference: float, variance: _Variance | None
) -> tuple[tuple[float, float] | None, float | None]:
    """95% interval and p-value."""
    if variance is None:
        return None, None
    if variance.value == 0:
        # All differences are equal. If they are 0, there is no difference; otherwise there is no
        # spread from which to estimate chance.
        return ((0.0, 0.0), 1.0) if difference == 0 else (None, None)
    stderr = math.sqrt(variance.value)
    reach = critical_value(variance.freedom, level=LEVEL) * stderr
    p_value = two_sided_p_value(difference / stderr, variance.freedom)
    return (difference - reach, difference + reach), p_value


def _name_basis(seeds: _Variance | None, examples: _Variance | None) -> Basis:
    if seeds is not None:
        return "seeds" if examples is None else "seeds and examples"
    return "none" if examples is None else "examples"


def _example_variance(ours: Sequence[Score], theirs: Sequence[Score]) -> _Variance | None:
    """V_examples of one split, from S scores of each; None if examples cannot be paired."""
    every = [*ours, *theirs]
    num_examples = len(every[0].prompt_ids)
    if num_examples < 2 or any(score.prompt_ids != every[0].prompt_ids for score in every):
        return None
    per_example_N = _mean_difference(
        [score.per_example_N for score in ours], [score.per_example_N for score in theirs]
    )
    if per_example_N is not None:
        return _Variance(float(np.var(per_example_N, ddof=1)) / num_examples, num_examples - 1)
    replicates_R = _mean_difference(
        [score.replicates_R for score in ours], [score.replicates_R for score in theirs]
    )
    if replicates_R is None:
        return None
    return _Variance(float(np.var(replicates_R, ddof=1)), num_examples - 1)


def _mean_difference(
    ours: Sequence[FloatArray | None], theirs: Sequence[FloatArray | None]
) -> FloatArray | None:
    """Mean over seeds of ours - theirs, element by element; None unless all have one length."""
    known = [values for values in chain(ours, theirs) if values is not None]
    if len(known) < len(ours) + len(theirs) or len({len(values) for values in known}) != 1:
        return None
    stacked = np.stack(known)  # [2S, N or R]
    return np.asarray(stacked[: len(ours)].mean(axis=0) - stacked[len(ours) :].mean(axis=0))


def _average(variances: Sequence[_Variance | None]) -> _Variance | None:
    """The variance of the mean of K independent splits; None if one of them is None."""
    known = [variance for variance in variances if variance is not None]
    if len(known) < len(variances):
        return None
    shares = [_Variance(v.value / len(known) ** 2, v.freedom) for v in known]
    return _add(shares)


def _add(variances: Sequence[_Variance]) -> _Variance | None:
    """The sum of independent estimates, its freedom by Satterthwaite 1946; None without any."""
    if not variances:
        return None
    total = sum(variance.value for variance in variances)
    spread = sum(variance.value**2 / variance.freedom for variance in variances)
    if spread == 0:  # all are zero, or so small that their squares are
        return _Variance(total, min(variance.freedom for variance in variances))
    return _Variance(total, total**2 / spread)

"""Standard errors of scores, and of the gain between two evaluations.

Used by evaluation, which computes scores, and by observe and comparison, which compare evaluations
made at different times.  N examples, K sums, R bootstrap replicates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from distill_system.errors import RecordError

FloatArray = npt.NDArray[np.float64]

NUM_REPLICATES = 1000
BOOTSTRAP_SEED = 20406
"""The seed of every bootstrap: replicate r of two evaluations of the same N prompts then draws the
same prompts, so that the difference of the two is a paired replicate."""


def standard_error(values: Sequence[float]) -> float | None:
    """Sample standard deviation (N - 1 in the denominator) divided by sqrt(N).

    Returns None for fewer than two values, which have no spread.
    """
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def bootstrap_replicates(
    statistics_NK: npt.NDArray[np.float64],
    compute: Callable[[FloatArray], float],
    *,
    num_replicates: int = NUM_REPLICATES,
    seed: int = BOOTSTRAP_SEED,
) -> FloatArray:
    """A corpus score on R resampled corpora; the score must be a function of sums over examples.

    statistics_NK: float64 [N, K], what each example adds to the K sums.
    compute: the score of a corpus from its float64 [K] sums.
    num_replicates: R.
    seed: the same seed and N draw the same examples.
    Returns: float64 [R].
    """
    num_examples = len(statistics_NK)
    shares_N = np.full(num_examples, 1.0 / num_examples)
    draws_RN = np.random.default_rng(seed).multinomial(num_examples, shares_N, size=num_replicates)
    sums_RK = draws_RN @ statistics_NK
    return np.array([compute(sums_K) for sums_K in sums_RK], dtype=np.float64)


def bootstrap_standard_error(replicates: Sequence[float]) -> float:
    """Standard deviation of the R bootstrap replicates of a score."""
    return float(np.std(replicates, ddof=1))


def paired_differences(before: Sequence[float], after: Sequence[float]) -> FloatArray:
    """after - before, example by example or replicate by replicate.

    Raises: RecordError if the two have different lengths and cannot be paired.
    """
    if len(before) != len(after):
        raise RecordError(
            f"paired comparison: expected as many values before as after, got {len(before)} and "
            f"{len(after)}; evaluate both on the same prompts"
        )
    return np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)


def paired_standard_error(before: Sequence[float], after: Sequence[float]) -> float | None:
    """Standard error of the mean gain, from the per-example differences of the same N prompts."""
    return standard_error(paired_differences(before, after).tolist())


def paired_bootstrap_standard_error(before: Sequence[float], after: Sequence[float]) -> float:
    """Standard error of a corpus score's gain, from replicates that drew the same examples."""
    return bootstrap_standard_error(paired_differences(before, after).tolist())

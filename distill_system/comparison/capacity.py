"""How large a teacher a student learns most from: the law of the capacity gap.

A student's score rises with its teacher's size and falls again (MiniMA, arXiv 2311.07052, whose
best teacher has 2.5 times the student's parameters). Fitted is, over all teachers and seeds,

    score = a + b log r + c (log r)^2        r: parameters of the teacher / of the student

and the best r is where its derivative is zero. Its error is by bootstrap of the fit's residuals,
widened for the three coefficients that were fitted to them.

Axes: N runs, one for each teacher and seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from distill_system.comparison.verdict import ColumnVerdict, Verdict
from distill_system.standard_errors import FloatArray

PUBLISHED_RATIO = 2.5
REPLICATES = 1000
LEAST_TEACHERS = 3
"""A parabola goes through any three sizes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityLaw:
    """The fit of one column.

    coefficients: a, b, c.  r_squared: share of the scores' variance that it explains.
    best_ratio: None where the parabola opens the wrong way, so that no size is best.
    interval: of 95 % of the replicates that have a best ratio; None where fewer than half have one,
    or where runs are no more than coefficients.
    is_inside: whether the best ratio lies between the smallest and the largest tried.
    """

    coefficients: tuple[float, float, float]
    r_squared: float
    best_ratio: float | None
    interval: tuple[float, float] | None
    is_inside: bool

    @property
    def holds_published(self) -> bool | None:
        """Whether 2.5 lies in the interval; None without one."""
        if self.interval is None:
            return None
        return self.interval[0] <= PUBLISHED_RATIO <= self.interval[1]


def fit_laws(verdict: Verdict) -> dict[str, CapacityLaw]:
    """The law of every metric that has a better side, on the mean of its splits.

    Empty unless the comparison is one of at least three teachers of different sizes.
    """
    ratios = verdict.comparison.plan.size_ratios
    firsts = [verdict.of_metric(metric)[0] for metric in verdict.metrics]
    return {
        column.column.metric: _fit_column(column, ratios)
        for column in firsts
        if len({ratios[name] for name in column.cells if name in ratios}) >= LEAST_TEACHERS
        and column.direction != 0
    }


def _fit_column(column: ColumnVerdict, ratios: Mapping[str, float]) -> CapacityLaw:
    runs = [
        (ratios[name], score)
        for name, cell in column.cells.items()
        if name in ratios
        for score in cell.per_seed.values()
    ]
    ratios_N, scores_N = np.array(runs, dtype=np.float64).T
    return fit_law(np.log(ratios_N), scores_N, direction=int(column.direction))


def fit_law(logs_N: FloatArray, scores_N: FloatArray, *, direction: int) -> CapacityLaw:
    """The fit and its error.

    logs_N: log r of each run.  scores_N: their scores.
    direction: 1 where more is better, -1 where less is.
    """
    fit = _fit(logs_N, scores_N)
    fitted_N = np.polyval(fit[::-1], logs_N)
    best = _best(fit, direction)
    spread = float(((scores_N - scores_N.mean()) ** 2).sum())
    residual = float(((scores_N - fitted_N) ** 2).sum())
    count, generator = len(scores_N), np.random.default_rng(0)
    residuals_N = (scores_N - fitted_N) * np.sqrt(count / max(1, count - 3))
    found = [
        _best(_fit(logs_N, fitted_N + generator.choice(residuals_N, count)), direction)
        for _ in range(REPLICATES)
    ]
    known = [ratio for ratio in found if ratio is not None]
    interval = None
    if count > 3 and 2 * len(known) >= REPLICATES:
        low, high = np.quantile(known, (0.025, 0.975))
        interval = (float(low), float(high))
    return CapacityLaw(
        coefficients=fit,
        r_squared=1.0 - residual / spread if spread > 0 else 0.0,
        best_ratio=best,
        interval=interval,
        is_inside=best is not None and bool(logs_N.min() <= np.log(best) <= logs_N.max()),
    )


def _fit(logs_N: FloatArray, scores_N: FloatArray) -> tuple[float, float, float]:
    c, b, a = np.polyfit(logs_N, scores_N, 2)
    return float(a), float(b), float(c)


def _best(fit: tuple[float, float, float], direction: int) -> float | None:
    _, b, c = fit
    if direction * c >= 0:
        return None
    exponent = -b / (2 * c)
    return float(np.exp(np.clip(exponent, -50.0, 50.0)))

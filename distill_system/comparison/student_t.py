"""Student's t distribution for any real number of degrees of freedom, without SciPy."""

from __future__ import annotations

import math

_TINY = 1e-300
_MAX_TERMS = 20_000


def two_sided_p_value(statistic: float, freedom: float) -> float:
    """The probability that |T| is at least |statistic| for T of Student's t distribution.

    statistic: an estimate divided by its standard error.
    freedom: degrees of freedom, above 0, not necessarily whole.

    Source: P = I_x(freedom / 2, 1 / 2) with x = freedom / (freedom + statistic**2), the regularised
    incomplete beta function (NIST Digital Library of Mathematical Functions, 8.17).
    """
    squared = statistic * statistic
    return _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + squared), squared)


def critical_value(freedom: float, *, level: float = 0.05) -> float:
    """The statistic whose two-sided p-value is `level`; it approaches 1.96 for large freedom."""
    low, high = 0.0, 1.0  # doubled until they enclose the value, then bisected
    while two_sided_p_value(high, freedom) > level:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p_value(middle, freedom) > level else (low, middle)
    return high


def _incomplete_beta(a: float, b: float, x: float, squared: float) -> float:
    """I_x(a, b); 1 - x is computed as squared / (2 a + squared), which is exact near x = 1."""
    rest = squared / (2 * a + squared)
    if rest == 0:  # also where the quotient of a tiny square is too small for a float
        return 1.0
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(log_front + a * math.log1p(-rest) + b * math.log(rest))
    # The continued fraction converges fast on this side; on the other, I_x(a,b) = 1 - I_1-x(b,a).
    if x < (a + 1) / (a + b + 2):
        return front * _continued_fraction(a, b, x) / a
    return 1.0 - front * _continued_fraction(b, a, rest) / b


def _continued_fraction(a: float, b: float, x: float) -> float:
    """DLMF 8.17.22, evaluated by the modified Lentz method."""
    numerator, denominator = 1.0, 1.0 / _away_from_zero(1.0 - (a + b) * x / (a + 1.0))
    value = denominator
    for m in range(1, _MAX_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        factor = 1.0
        for coefficient in (even, odd):
            denominator = 1.0 / _away_from_zero(1.0 + coefficient * denominator)
            numerator = _away_from_zero(1.0 + coefficient / numerator)
            factor = numerator * denominator
            value *= factor
        if abs(factor - 1.0) < 1e-14:
            return value
    raise ArithmeticError(f"the incomplete beta function did not converge at {a=}, {b=}, {x=}")


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY

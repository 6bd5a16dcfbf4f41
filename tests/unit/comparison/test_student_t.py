import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_system.comparison.student_t import critical_value, two_sided_p_value


@pytest.mark.parametrize(
    ("freedom", "printed"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_critical_values_are_those_of_the_printed_tables(freedom: int, printed: float) -> None:
    assert critical_value(freedom) == pytest.approx(printed, abs=5e-4)


def test_ninety_nine_percent_is_further_out_than_ninety_five() -> None:
    assert critical_value(2, level=0.01) == pytest.approx(9.925, abs=5e-4)


@given(st.floats(0.0, 1e4))
def test_one_and_two_degrees_of_freedom_have_closed_forms(statistic: float) -> None:
    cauchy = 1.0 if statistic == 0 else 2 / math.pi * math.atan2(1.0, statistic)
    assert two_sided_p_value(statistic, 1) == pytest.approx(cauchy, rel=1e-9)
    root = math.sqrt(2 + statistic**2)
    two = 2 / (root * (root + statistic))  # 1 - t / root without cancellation
    assert two_sided_p_value(statistic, 2) == pytest.approx(two, rel=1e-9)


@given(st.floats(-6.0, 6.0), st.floats(1.0, 60.0))
def test_the_density_integrates_to_the_p_value(statistic: float, freedom: float) -> None:
    # t = sqrt(freedom) tan(angle) makes the density cos(angle) ** (freedom - 1), up to a constant.
    nodes, weights = np.polynomial.legendre.leggauss(200)

    def integrate(start: float, stop: float) -> float:
        angles = (stop - start) / 2 * nodes + (stop + start) / 2
        return float((stop - start) / 2 * (weights * np.cos(angles) ** (freedom - 1)).sum())

    start = math.atan(abs(statistic) / math.sqrt(freedom))
    expected = integrate(start, math.pi / 2) / integrate(0.0, math.pi / 2)
    assert two_sided_p_value(statistic, freedom) == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("statistic", [0.0, 2e-162, -2e-162, 1e-150])
@pytest.mark.parametrize("freedom", [1.0, 60.0])
def test_next_to_no_difference_is_all_chance(statistic: float, freedom: float) -> None:
    """Of 2e-162 the square is the smallest float there is, and a sixtieth of it is none."""
    assert two_sided_p_value(statistic, freedom) == 1.0


@given(st.floats(0.01, 8.0))
def test_many_degrees_of_freedom_are_the_normal_distribution(statistic: float) -> None:
    normal = 2 * NormalDist().cdf(-statistic)
    assert two_sided_p_value(statistic, 1e6) == pytest.approx(normal, rel=3e-3)


@given(st.floats(1.0, 1e5), st.floats(1e-3, 0.5))
def test_the_critical_value_inverts_the_p_value(freedom: float, level: float) -> None:
    statistic = critical_value(freedom, level=level)
    assert two_sided_p_value(statistic, freedom) == pytest.approx(level, rel=1e-6)

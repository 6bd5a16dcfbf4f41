import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from distill_system.comparison.results import Score
from distill_system.comparison.significance import Difference, compare_scores
from distill_system.standard_errors import FloatArray, bootstrap_replicates


def score(values: Sequence[float] | FloatArray, first_id: str = "p0") -> Score:
    array = np.array(values, dtype=np.float64)
    ids = (first_id, *(f"p{index}" for index in range(1, len(array))))
    return Score(mean=float(array.mean()), prompt_ids=ids, per_example_N=array)


def compare(differences_SN: FloatArray) -> Difference:
    """Against an objective that scores 10 everywhere."""
    theirs = {seed: (score(np.full(row.shape, 10.0)),) for seed, row in enumerate(differences_SN)}
    ours = {seed: (score(10.0 + row),) for seed, row in enumerate(differences_SN)}
    found = compare_scores(ours, theirs)
    assert found is not None
    return found


def test_seeds_and_examples_both_count() -> None:
    # Means over examples 2 and 4, over seeds 2 and 4: either variance is 2 / 2 = 1, their sum 2,
    # with (1 + 1)^2 / (1 / 1 + 1 / 1) = 2 degrees of freedom.
    found = compare(np.array([[1.0, 3.0], [3.0, 5.0]]))
    t = 3 / math.sqrt(2)
    assert found.difference == pytest.approx(3.0)
    assert found.stderr_seeds == pytest.approx(1.0)
    assert found.stderr == pytest.approx(math.sqrt(2))
    assert found.p_value == pytest.approx(1 - t / math.sqrt(2 + t * t))
    # 4.302653: the 97.5% point of two degrees of freedom.
    reach = 4.302653 * math.sqrt(2)
    assert found.interval == pytest.approx((3 - reach, 3 + reach), rel=1e-6)
    assert (found.basis, found.num_seeds, found.num_examples) == ("seeds and examples", 2, 2)


def test_one_seed_is_the_paired_t_test_over_examples_and_says_so() -> None:
    found = compare(np.array([[1.0, 2.0, 3.0, 4.0]]))
    # mean 2.5, standard error sqrt((5 / 3) / 4), t 3.873 at 3 degrees of freedom
    assert found.p_value == pytest.approx(0.030466, abs=1e-6)
    assert (found.basis, found.stderr_seeds) == ("examples", None)


def test_scores_without_common_examples_are_paired_by_seed_alone() -> None:
    ours = {seed: (score([seed + 1.0] * 3, first_id="other"),) for seed in range(3)}
    theirs = {seed: (score([0.0] * 3),) for seed in range(3)}
    found = compare_scores(ours, theirs)
    assert found is not None
    # differences 1, 2, 3: t = 2 / (1 / sqrt(3)) at 2 degrees of freedom
    t = 2 * math.sqrt(3)
    assert found.p_value == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert (found.basis, found.num_examples) == ("seeds", None)


def test_a_score_without_examples_is_paired_by_seed() -> None:
    ours = {seed: (Score(mean=value),) for seed, value in enumerate((1.0, 2.0, 3.0))}
    found = compare_scores(ours, dict.fromkeys(ours, (Score(mean=0.0),)))
    assert found is not None
    assert (found.basis, found.difference) == ("seeds", pytest.approx(2.0))


def test_only_seeds_that_both_have_are_compared() -> None:
    ours = {0: (score([1.0, 2.0]),), 1: (score([5.0, 7.0]),), 2: (score([90.0, 99.0]),)}
    theirs = {0: (score([0.0, 0.0]),), 1: (score([1.0, 1.0]),), 7: (score([0.0, 0.0]),)}
    found = compare_scores(ours, theirs)
    assert found is not None
    assert (found.num_seeds, found.difference) == (2, pytest.approx((1.5 + 5.0) / 2))
    assert compare_scores({0: ours[0]}, {7: theirs[7]}) is None


def test_what_leaves_nothing_to_measure_chance_by_is_not_called_significant() -> None:
    same = compare(np.zeros((3, 4)))
    assert (same.p_value, same.interval) == (1.0, (0.0, 0.0))
    shifted = compare(np.full((3, 4), 2.0))
    assert (shifted.p_value, shifted.interval, shifted.is_significant) == (None, None, False)
    alone = compare(np.array([[2.0]]))
    assert (alone.basis, alone.stderr, alone.p_value) == ("none", None, None)


def test_a_corpus_score_is_paired_by_its_replicates() -> None:
    rng = np.random.default_rng(0)
    common_R = rng.normal(0, 30, size=200)  # what a drawn corpus does to every run alike
    noise_SR = rng.normal(0, 1, size=(2, 200))
    ids = tuple(map(str, range(50)))
    ours = {
        seed: (Score(mean=21.0 + seed, prompt_ids=ids, replicates_R=common_R + noise_SR[seed]),)
        for seed in range(2)
    }
    theirs = dict.fromkeys(ours, (Score(mean=20.0, prompt_ids=ids, replicates_R=common_R),))
    found = compare_scores(ours, theirs)
    assert found is not None
    # Means 1 and 2: V_seeds = 0.5 / 2.  Averaged noise has a variance of about 1 / 2.
    assert found.stderr == pytest.approx(math.sqrt(0.25 + 0.5), rel=0.1)
    assert (found.basis, found.num_examples) == ("seeds and examples", 50)


def test_four_replicates_have_the_variance_of_a_sample_of_four() -> None:
    ids = ("p0", "p1", "p2")
    ours = {0: (Score(mean=21.0, prompt_ids=ids, replicates_R=np.array([1.0, 2.0, 4.0, 9.0])),)}
    theirs = {0: (Score(mean=20.0, prompt_ids=ids, replicates_R=np.zeros(4)),)}
    found = compare_scores(ours, theirs)
    assert found is not None
    # about the mean of 4: 9 + 4 + 0 + 25, over 3
    assert found.stderr == pytest.approx(math.sqrt(38 / 3))
    assert (found.basis, found.difference, found.num_examples) == ("examples", 1.0, 3)


def test_replicates_of_a_mean_say_what_its_examples_say() -> None:
    rng = np.random.default_rng(1)
    by_example, by_replicate = ({}, {})
    for seed in range(3):
        values_N = rng.normal(1.0, 5.0, size=60)
        by_example[seed] = (score(values_N),)
        replicates_R = bootstrap_replicates(values_N[:, None], lambda sums: float(sums[0]) / 60)
        ids = by_example[seed][0].prompt_ids
        mean = float(values_N.mean())
        by_replicate[seed] = (Score(mean=mean, prompt_ids=ids, replicates_R=replicates_R),)
    zero = score(np.zeros(60))
    flat = Score(mean=0.0, prompt_ids=zero.prompt_ids, replicates_R=np.zeros(1000))
    one = compare_scores(by_example, dict.fromkeys(range(3), (zero,)))
    other = compare_scores(by_replicate, dict.fromkeys(range(3), (flat,)))
    assert one is not None
    assert other is not None
    assert other.stderr == pytest.approx(one.stderr, rel=0.05)


def test_the_average_over_splits_takes_each_split_as_independent() -> None:
    ours = {0: (score([1.0, 3.0]), score([0.0, 4.0, 8.0]))}
    theirs = {0: (score([0.0, 0.0]), score([0.0, 0.0, 0.0]))}
    found = compare_scores(ours, theirs)
    assert found is not None
    # variances of the two means 2 / 2 = 1 and 16 / 3, over 2^2
    assert found.difference == pytest.approx((2 + 4) / 2)
    assert found.stderr == pytest.approx(math.sqrt((1 + 16 / 3) / 4))
    assert found.num_examples == 5


DIFFERENCES = arrays(
    np.float64,
    st.tuples(st.integers(1, 4), st.integers(1, 5)),
    elements=st.integers(-3, 3).map(float),
)


@given(DIFFERENCES)
def test_the_other_way_round_is_the_opposite(differences_SN: FloatArray) -> None:
    one, other = compare(differences_SN), compare(-differences_SN)
    assert one.difference == pytest.approx(-other.difference, abs=1e-12)
    if one.interval is not None and other.interval is not None:
        assert one.interval == pytest.approx((-other.interval[1], -other.interval[0]), abs=1e-9)


@given(DIFFERENCES)
def test_the_interval_leaves_out_zero_exactly_if_the_difference_is_significant(
    differences_SN: FloatArray,
) -> None:
    found = compare(differences_SN)
    if found.interval is None or found.p_value is None or abs(found.p_value - 0.05) < 1e-6:
        return
    low, high = found.interval
    assert found.is_significant is (low > 0 or high < 0)


@pytest.mark.parametrize(
    ("seed_deviation", "example_deviation", "interaction_deviation"),
    [(1.0, 0.01, 0.01), (0.0, 1.0, 0.3), (0.0, 0.3, 1.0), (0.2, 1.0, 1.0)],
    ids=["seeds", "examples", "interaction", "all"],
)
def test_chance_alone_is_called_significant_about_once_in_twenty_times_or_less(
    seed_deviation: float, example_deviation: float, interaction_deviation: float
) -> None:
    # A two-level bootstrap of the same three seeds does so 27 times in 100 where seeds dominate.
    rng, trials, (S, N) = np.random.default_rng(2), 400, (3, 40)
    alarms = sum(
        compare(
            rng.normal(0, seed_deviation, (S, 1))
            + rng.normal(0, example_deviation, (1, N))
            + rng.normal(0, interaction_deviation, (S, N))
        ).is_significant
        for _ in range(trials)
    )
    # 0.05 and three standard errors of a share of 400.
    assert alarms / trials < 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)


def test_a_gain_that_seeds_and_examples_agree_on_is_found() -> None:
    rng = np.random.default_rng(3)
    found = compare(rng.normal(1.0, 1.0, size=(3, 200)) + rng.normal(0, 0.05, size=(3, 1)))
    assert found.is_significant
    assert found.difference == pytest.approx(1.0, abs=0.15)


def test_a_gain_that_one_seed_alone_brings_is_not() -> None:
    rng = np.random.default_rng(4)
    found = compare(rng.normal([[6.0], [0.0], [0.0]], 1.0, size=(3, 200)))
    assert found.difference > 1.5
    assert not found.is_significant

"""Every loss at a token against its formula in probabilities, float64, differentiated by torch."""

from __future__ import annotations

import math

import pytest
import torch
from two_policies import TwoPolicies, assert_same_reading

from distill_system.config.objective.token_losses import (
    AdaptiveClipKlConfig,
    CrossEntropyConfig,
    ForwardKlConfig,
    GeneralizedJsdConfig,
    InterpolatedCrossEntropyConfig,
    ReverseKlConfig,
    SkewKlConfig,
    SkewReverseKlConfig,
    TotalVariationConfig,
)

FORWARD_KL = ForwardKlConfig(type="forward_kl")
REVERSE_KL = ReverseKlConfig(type="reverse_kl")
TOTAL_VARIATION = TotalVariationConfig(type="total_variation")


def jsd(weight=0.5):
    return GeneralizedJsdConfig(type="generalized_jsd", mixture_weight=weight)


def clip(mass):
    return AdaptiveClipKlConfig(type="adaptive_clip_kl", mass=mass)


def interpolated(weight, schedule="constant"):
    return InterpolatedCrossEntropyConfig(
        type="interpolated_cross_entropy", teacher_weight=weight, schedule=schedule
    )


def kl(first, second):
    return (first * (first / second).log()).sum(-1)


def written(student, ids):
    return student[torch.arange(len(ids)), ids]


def dense_jsd(weight):
    def loss(teacher, student, ids):
        mixture = weight * teacher + (1 - weight) * student
        return weight * kl(teacher, mixture) + (1 - weight) * kl(student, mixture)

    return loss


def dense_interpolation(weight):
    def loss(teacher, student, ids):
        target = weight * teacher + (1 - weight) * torch.eye(teacher.shape[1])[ids]
        return -(target * student.log()).sum(-1)

    return loss


def dense_clip(mass):
    """Row by row: tokens from the most likely one on until they hold the mass; the rest as one."""

    def loss(teacher, student, ids):
        losses = []
        for p, q in zip(teacher, student, strict=True):
            dense, held = [], 0.0
            for token in sorted(range(len(p)), key=lambda token: -float(p[token])):
                dense.append(token)
                held += float(p[token])
                if held >= mass:
                    break
            rest = [token for token in range(len(p)) if token not in dense]
            buckets = [(p[token], q[token]) for token in dense]
            buckets += [(p[rest].sum(), q[rest].sum())] if rest else []
            losses.append(sum(a * (a / b).log() for a, b in buckets))
        return torch.stack(losses)

    return loss


CASES = {
    "cross_entropy": (
        CrossEntropyConfig(type="cross_entropy"),
        lambda p, q, ids: -written(q, ids).log(),
    ),
    "interpolated": (interpolated(0.3), dense_interpolation(0.3)),
    "forward_kl": (FORWARD_KL, lambda p, q, ids: kl(p, q)),
    "reverse_kl": (REVERSE_KL, lambda p, q, ids: kl(q, p)),
    "jsd": (jsd(), dense_jsd(0.5)),
    "jsd_of_a_small_weight": (jsd(0.1), dense_jsd(0.1)),
    "jsd_of_a_large_weight": (jsd(0.9), dense_jsd(0.9)),
    "total_variation": (TOTAL_VARIATION, lambda p, q, ids: 0.5 * (p - q).abs().sum(-1)),
    "skew_kl": (SkewKlConfig(type="skew_kl"), lambda p, q, ids: kl(p, 0.1 * p + 0.9 * q)),
    "skew_reverse_kl": (
        SkewReverseKlConfig(type="skew_reverse_kl", skew=0.2),
        lambda p, q, ids: kl(q, 0.8 * p + 0.2 * q),
    ),
    "clip_half": (clip(0.5), dense_clip(0.5)),
    "clip_little": (clip(0.95), dense_clip(0.95)),
    "clip_nothing": (clip(1.0), lambda p, q, ids: kl(p, q)),
}
DIVERGENCES = [name for name in CASES if name not in ("cross_entropy", "interpolated")]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_value_and_gradients_are_those_of_the_formula_in_float64(name, temperature):
    config, dense = CASES[name]
    for seed in (0, 1):
        policies = TwoPolicies(seed=seed)
        assert_same_reading(
            policies.read(config, temperature=temperature),
            policies.read_densely(dense, temperature=temperature),
        )


@pytest.mark.parametrize("name", CASES)
def test_chunk_size_changes_neither_values_nor_gradients(name):
    config, _ = CASES[name]
    whole = TwoPolicies().read(config, chunk=1000)
    for chunk in (1, 5, 13):
        assert_same_reading(TwoPolicies().read(config, chunk=chunk), whole)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(name):
    config, _ = CASES[name]
    reading = TwoPolicies(equal=True).read(config)
    assert reading.values.abs().max() < 1e-6
    # where the two are equal, the gradient of |p - q| is any of many: 0 is torch's
    assert reading.hidden_gradient.abs().max() < 1e-5
    assert reading.unembedding_gradient.abs().max() < 1e-5


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_are_never_negative(name):
    for seed in range(5):
        assert TwoPolicies(seed=seed).read(CASES[name][0]).values.min() >= 0


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_names_of_the_words_do_not_matter(name):
    config, _ = CASES[name]
    policies, renamed = TwoPolicies(), TwoPolicies()
    order = torch.randperm(23, generator=torch.Generator().manual_seed(2))
    renamed.unembedding = policies.unembedding[order]
    renamed.teacher_unembedding = policies.teacher_unembedding[order]
    ours, theirs = policies.read(config), renamed.read(config)
    torch.testing.assert_close(theirs.values, ours.values, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(theirs.hidden_gradient, ours.hidden_gradient, atol=1e-5, rtol=1e-4)


def scaled(scale):
    policies = TwoPolicies()
    policies.unembedding *= scale
    policies.teacher_unembedding *= scale
    return policies


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_bounds_hold_near_and_far(scale):
    policies = scaled(scale)
    rounding = 1e-5
    total_variation = policies.read(TOTAL_VARIATION).values
    assert total_variation.max() <= 1 + rounding
    assert policies.read(jsd()).values.max() <= math.log(2) + rounding
    for skew in (0.1, 0.5):
        for config in (
            SkewKlConfig(type="skew_kl", skew=skew),
            SkewReverseKlConfig(type="skew_reverse_kl", skew=skew),
        ):
            assert policies.read(config).values.max() <= -math.log(skew) + rounding
    for divergence in (FORWARD_KL, REVERSE_KL):  # Pinsker
        assert (2 * total_variation.square() <= policies.read(divergence).values + rounding).all()


def test_the_generalised_jsd_ends_at_the_two_kl_divergences():
    policies = scaled(0.3)
    near_forward = policies.read(jsd(1e-3)).values / 1e-3
    near_reverse = policies.read(jsd(1 - 1e-3)).values / 1e-3
    forward, reverse = policies.read(FORWARD_KL).values, policies.read(REVERSE_KL).values
    torch.testing.assert_close(near_forward, forward, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(near_reverse, reverse, rtol=2e-2, atol=2e-2)


def test_half_and_half_the_jsd_does_not_know_who_teaches():
    policies, swapped = TwoPolicies(), TwoPolicies()
    swapped.hidden, swapped.features = policies.features, policies.hidden
    swapped.unembedding = policies.teacher_unembedding
    swapped.teacher_unembedding = policies.unembedding
    torch.testing.assert_close(swapped.read(jsd()).values, policies.read(jsd()).values)


def test_disjoint_policies_have_finite_losses_and_gradients():
    policies = scaled(200.0)
    for config, _ in CASES.values():
        reading = policies.read(config)
        assert reading.values.isfinite().all()
        assert reading.hidden_gradient.isfinite().all()


def test_clipping_never_costs_more_than_the_whole_divergence():
    policies = TwoPolicies()
    whole = policies.read(FORWARD_KL).values
    for mass in (0.01, 0.3, 0.7, 0.99):
        clipped = policies.read(clip(mass)).values
        assert (clipped <= whole + 1e-6).all()
        assert (clipped < whole - 1e-3).any()


def test_mass_hidden_among_clipped_words_is_paid_for():
    """All of the student's mass on the teacher's least likely word: worse than any fair student."""
    policies = TwoPolicies()
    fair = policies.read(clip(0.5)).values
    least = policies.teacher().argmin(-1)
    policies.hidden = torch.nn.functional.one_hot(least, 23).float() * 9.0
    policies.unembedding = torch.eye(23)
    assert (policies.read(clip(0.5)).values > fair).all()


def test_interpolation_is_ground_truth_at_one_end_and_the_teacher_at_the_other():
    policies = TwoPolicies()
    truth = policies.read(CrossEntropyConfig(type="cross_entropy"))
    assert_same_reading(policies.read(interpolated(0.0)), truth)
    # the two differ by the teacher's entropy, which has no gradient
    teacher, forward = policies.read(interpolated(1.0)), policies.read(FORWARD_KL)
    torch.testing.assert_close(teacher.hidden_gradient, forward.hidden_gradient)
    probabilities = policies.teacher()
    entropy = -(probabilities * probabilities.log()).sum(-1)
    torch.testing.assert_close(
        (teacher.values - forward.values).double(), entropy, rtol=1e-4, atol=1e-5
    )


def test_the_teachers_share_grows_linearly_over_the_run():
    growing = interpolated(0.8, "linear")
    assert [growing.at(done).teacher_weight for done in (0.25, 0.5, 1.0)] == [0.2, 0.4, 0.8]
    assert growing.at(0.5).at(0.5).teacher_weight == 0.4
    assert interpolated(0.8).at(0.25).teacher_weight == 0.8

"""Objectives that know k of the teacher's probabilities: exact tails, and nowhere to hide mass."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from pydantic import ValidationError
from two_policies import TwoPolicies, assert_same_reading

from distill_system.config.objective import TeacherNeeds, TokenMatchingConfig
from distill_system.config.objective.token_losses import (
    CrossEntropyConfig,
    FirstConfig,
    ForwardKlConfig,
    GeneralizedJsdConfig,
    ReverseKlConfig,
    TokenLossConfig,
    TopKConfig,
)

VOCABULARY = 23
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
WHOLE: dict[str, TokenLossConfig] = {
    "forward_kl": ForwardKlConfig(type="forward_kl"),
    "reverse_kl": ReverseKlConfig(type="reverse_kl"),
    "jsd": GeneralizedJsdConfig(type="generalized_jsd"),
}


def top_k(k, divergence):
    return TopKConfig(type="top_k", k=k, divergence=divergence)


def divergence_of(name, p, q):
    def kl(first, second):
        return (first * (first / second).log()).sum(-1)

    if name == "jsd":
        return 0.5 * kl(p, 0.5 * (p + q)) + 0.5 * kl(q, 0.5 * (p + q))
    return kl(p, q) if name == "forward_kl" else kl(q, p)


def dense(name, k):
    def loss(teacher, student, ids):
        best = teacher.topk(k).indices
        in_top = torch.zeros_like(teacher).scatter(1, best, 1.0)
        p, q = (
            torch.cat([x.gather(1, best), (x * (1 - in_top)).sum(-1, keepdim=True)], dim=1)
            for x in (teacher, student)
        )
        return divergence_of(name, p, q)

    return loss


def heavy_tailed(seed=0):
    """Teacher tails above 1e-2: 1 minus a sum of float32 probabilities is good to 1e-7."""
    policies = TwoPolicies(seed=seed)
    policies.teacher_unembedding *= 0.3
    return policies


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("k", [1, 4, 20])
def test_value_and_gradients_are_those_of_the_k_plus_one_buckets(k, divergence):
    policies = heavy_tailed()
    for chunk in (1, 5, 100):
        ours = policies.read(top_k(k, divergence), k=k, chunk=chunk)
        assert_same_reading(ours, policies.read_densely(dense(divergence, k)))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_with_every_word_in_a_bucket_it_is_the_whole_divergence(divergence):
    policies = TwoPolicies()
    ours = policies.read(top_k(VOCABULARY, divergence), k=VOCABULARY)
    assert_same_reading(ours, policies.read(WHOLE[divergence]))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_more_buckets_see_more_and_never_more_than_the_whole(divergence):
    for seed in range(3):
        policies = heavy_tailed(seed)
        seen = [policies.read(top_k(k, divergence), k=k).values for k in (1, 2, 5, 12, 22)]
        seen.append(policies.read(WHOLE[divergence]).values)
        for fewer, more in itertools.pairwise(seen):
            assert (fewer <= more + 1e-5).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(divergence):
    reading = TwoPolicies(equal=True).read(top_k(4, divergence), k=4)
    assert reading.values.abs().max() < 1e-6
    assert reading.hidden_gradient.abs().max() < 1e-5


def student_of(policies, probabilities):
    """The same teacher with a student of these probabilities at every token."""
    policies.hidden = probabilities.log().float()
    policies.unembedding = torch.eye(VOCABULARY)
    return policies


def moved_out(probabilities, best, share):
    """This share of the mass on the best words goes to the other ones, by their own shares."""
    inside = torch.zeros_like(probabilities).scatter(1, best, 1.0)
    kept, other = probabilities * inside, probabilities * (1 - inside)
    moved = share * kept.sum(-1, keepdim=True)
    return (1 - share) * kept + other * (1 + moved / other.sum(-1, keepdim=True))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_student_pays_for_what_it_has_outside_beyond_the_teacher(divergence):
    """A thousand random students: at least the divergence of the two tail masses, brute force."""
    k, generator = 4, torch.Generator().manual_seed(0)
    for _ in range(80):
        policies = TwoPolicies()
        teacher = policies.teacher()
        best = teacher.topk(k).indices
        scores = torch.randn(13, VOCABULARY, generator=generator, dtype=torch.float64)
        student = moved_out((scores * 2).softmax(-1), best, 0.9)
        tails = [1 - x.gather(1, best).sum(-1) for x in (teacher, student)]
        assert (tails[1] > tails[0]).all()
        floor = divergence_of(divergence, *(torch.stack([t, 1 - t], dim=1) for t in tails))
        values = student_of(policies, student).read(top_k(k, divergence), k=k).values
        assert (values >= floor - 1e-5).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_pushing_mass_out_of_the_teachers_top_words_only_raises_the_loss(divergence):
    policies = TwoPolicies()
    teacher = policies.teacher()
    best = teacher.topk(4).indices
    last = torch.zeros(13)
    for share in (0.05, 0.2, 0.5, 0.9, 0.999):
        student = moved_out(teacher, best, share)
        values = student_of(TwoPolicies(), student).read(top_k(4, divergence), k=4).values
        assert (values > last).all()
        last = values


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_gradient_brings_hidden_mass_back(divergence):
    """With half of the mass pushed out, descent raises every top word and lowers every other."""
    teacher = TwoPolicies().teacher()
    best = teacher.topk(4).indices
    policies = student_of(TwoPolicies(), moved_out(teacher, best, 0.5))
    into_logits = policies.read(top_k(4, divergence), k=4).hidden_gradient
    inside = torch.zeros_like(into_logits).scatter(1, best, 1.0).bool()
    assert (into_logits[inside] < 0).all()
    assert (into_logits[~inside] > 0).all()


def test_a_teacher_certain_to_the_last_digit_leaves_losses_finite():
    policies = TwoPolicies()
    policies.teacher_unembedding *= 100.0
    for divergence in DIVERGENCES:
        reading = policies.read(top_k(4, divergence), k=4)
        assert reading.values.isfinite().all()
        assert reading.hidden_gradient.isfinite().all()


def test_first_is_the_cross_entropy_to_the_recalibrated_top_words():
    def loss(teacher, student, ids):
        best = teacher.topk(5)
        sharpened = best.values ** (1 / 0.5)
        targets = sharpened / sharpened.sum(-1, keepdim=True)
        return -(targets * student.gather(1, best.indices).log()).sum(-1)

    config = FirstConfig(type="first", k=5, recalibration_temperature=0.5)
    policies = TwoPolicies()
    for chunk in (1, 5, 100):
        assert_same_reading(policies.read(config, k=5, chunk=chunk), policies.read_densely(loss))


def test_first_rises_when_mass_is_pushed_out_by_exactly_its_logarithm():
    config = FirstConfig(type="first", k=4)
    teacher = TwoPolicies().teacher()
    best = teacher.topk(4).indices
    before, after = (
        student_of(TwoPolicies(), moved_out(teacher, best, share)).read(config, k=4).values
        for share in (0.0, 0.75)
    )
    torch.testing.assert_close(after - before, torch.full((13,), math.log(4.0)), rtol=1e-4, atol=0)


def test_first_is_least_at_the_recalibrated_target_itself():
    config = FirstConfig(type="first", k=VOCABULARY, recalibration_temperature=2.0)
    target = TwoPolicies().teacher(temperature=2.0)
    reading = student_of(TwoPolicies(), target).read(config, k=VOCABULARY)
    entropy = -(target * target.log()).sum(-1)
    torch.testing.assert_close(reading.values.double(), entropy, rtol=1e-5, atol=1e-5)
    assert reading.hidden_gradient.abs().max() < 1e-5


def test_the_teacher_is_asked_for_k_words_and_nothing_else():
    config = TokenMatchingConfig(
        type="token_matching",
        off_policy=top_k(7, "jsd"),
        on_policy=CrossEntropyConfig(type="cross_entropy"),
    )
    assert config.teacher_needs("off_policy") == TeacherNeeds(top_k=7)
    assert not config.teacher_needs("on_policy").anything
    assert not config.needs_teacher_distribution


def test_k_words_cannot_be_brought_to_another_temperature():
    with pytest.raises(ValidationError, match="set temperature to 1"):
        TokenMatchingConfig(type="token_matching", off_policy=top_k(7, "jsd"), temperature=2.0)

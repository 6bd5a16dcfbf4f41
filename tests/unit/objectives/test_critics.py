from __future__ import annotations

from typing import Any

import pytest
import torch

from distill_system.config.objective.ammd import ClosedFormCritic, GradientCritic
from distill_system.objectives.critics import (
    AscentCritic,
    best_response,
    build_critic,
    moment_distance,
    polar_factor,
    project,
)


def _moment(features=6, embedding=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(features, embedding, generator=generator, dtype=torch.float64)


def _norm(matrix, ball):
    return float(torch.linalg.matrix_norm(matrix, 2 if ball == "spectral" else "fro"))


@pytest.mark.parametrize("shape", [(6, 5), (5, 6), (1, 4), (4, 4)])
def test_newton_schulz_gives_the_polar_factor_of_the_svd(shape):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(polar_factor(matrix), left @ right, atol=1e-10, rtol=0)


@pytest.mark.parametrize("spread", [1e-1, 1e-4, 1e-12], ids=["mild", "steep", "rank one"])
def test_float32_polar_factors_reach_the_distance_and_stay_in_the_ball(spread):
    """One large singular value, as a language model's moments have, and many small ones."""
    left = torch.linalg.qr(_moment(24, 24)).Q
    right = torch.linalg.qr(_moment(30, 24, seed=3)).Q.T
    singular = torch.cat([torch.ones(1), torch.full((23,), spread)]).double()
    moment = (left * singular) @ right
    factor = polar_factor(moment.float()).double()
    assert _norm(factor, "spectral") <= 1 + 1e-6
    assert float((factor * moment).sum()) == pytest.approx(float(singular.sum()), rel=2e-6)


@pytest.mark.parametrize("ball", ["spectral", "frobenius"])
def test_gradient_ascent_on_the_critics_own_entries_ends_at_the_best_response(ball):
    """An independent oracle: Adam on X, where phi = C X / |X| is in the ball whatever X is."""
    moment, radius = _moment(), 2.0
    order = 2 if ball == "spectral" else "fro"
    free = torch.randn(6, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    free.requires_grad_()
    optimizer = torch.optim.Adam([free], lr=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    for _ in range(600):
        value = radius * (free * moment).sum() / torch.linalg.matrix_norm(free, order)
        optimizer.zero_grad()
        (-value).backward()
        optimizer.step()
        scheduler.step()
    reached = float(value.detach())
    best = float((best_response(moment, ball=ball, radius=radius) * moment).sum())
    assert reached <= best * (1 + 1e-9)
    assert reached == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("ball", ["spectral", "frobenius"])
def test_best_response_reaches_the_distance_and_no_random_critic_beats_it(ball):
    moment, radius = _moment(), 1.7
    best = best_response(moment, ball=ball, radius=radius)
    assert _norm(best, ball) <= radius * (1 + 1e-9)
    distance = moment_distance(moment, ball=ball, radius=radius)
    assert float((best * moment).sum()) == pytest.approx(distance, rel=1e-9)
    generator = torch.Generator().manual_seed(2)
    for _ in range(500):
        rival = torch.randn(6, 5, generator=generator, dtype=torch.float64)
        rival *= radius / _norm(rival, ball)
        assert float((rival * moment).sum()) <= distance


@pytest.mark.parametrize("ball", ["spectral", "frobenius"])
def test_long_ascent_ends_at_the_closed_form(ball):
    moment = _moment()
    config = GradientCritic(type="gradient_ascent", ball=ball, steps=400, step_size=0.5, radius=2.0)
    reached = AscentCritic(config).respond(moment)
    assert _norm(reached, ball) <= 2.0 * (1 + 1e-9)
    value = float((reached * moment).sum())
    assert value == pytest.approx(moment_distance(moment, ball=ball, radius=2.0), rel=1e-4)


def test_kept_ascent_continues_and_fresh_ascent_starts_over():
    moment = _moment()
    shared: dict[str, Any] = {"type": "gradient_ascent", "steps": 1, "step_size": 0.1}
    keeps = AscentCritic(GradientCritic(**shared, keep=True))
    fresh = AscentCritic(GradientCritic(**shared, keep=False))
    first = (
        float((keeps.respond(moment) * moment).sum()),
        float((fresh.respond(moment) * moment).sum()),
    )
    second = (
        float((keeps.respond(moment) * moment).sum()),
        float((fresh.respond(moment) * moment).sum()),
    )
    assert first[0] == pytest.approx(first[1])
    assert second[0] == pytest.approx(2 * first[0])
    assert second[1] == pytest.approx(first[1])


def test_ascent_critic_continues_from_its_saved_state():
    moment = _moment()
    config = GradientCritic(type="gradient_ascent", steps=2, step_size=0.05)
    unbroken, stopped = AscentCritic(config), AscentCritic(config)
    unbroken.respond(moment)
    stopped.respond(moment)
    resumed = AscentCritic(config)
    resumed.load_state_dict({k: v.clone() for k, v in stopped.state_dict().items()})
    assert torch.equal(resumed.respond(-moment), unbroken.respond(-moment))


def test_spectral_projection_clips_singular_values_alone():
    left = torch.linalg.qr(_moment(5, 5)).Q
    right = torch.linalg.qr(_moment(5, 5, seed=3)).Q
    singular = torch.tensor([3.0, 1.5, 1.0, 0.5, 0.1], dtype=torch.float64)
    projected = project(left @ singular.diag() @ right, ball="spectral", radius=1.0)
    expected = left @ singular.clamp_max(1.0).diag() @ right
    torch.testing.assert_close(projected, expected)


def test_norms_are_ordered_frobenius_then_nuclear_then_gap_then_total_variation():
    generator = torch.Generator().manual_seed(4)
    actions = torch.nn.functional.normalize(torch.randn(17, 5, generator=generator), dim=-1)
    features = torch.nn.functional.normalize(torch.randn(50, 6, generator=generator), dim=-1)
    student, teacher = (
        (2 * torch.randn(50, 17, generator=generator)).softmax(-1) for _ in range(2)
    )
    gap = (teacher - student) @ actions
    moment = features.T @ gap / 50
    frobenius = moment_distance(moment, ball="frobenius", radius=1.0)
    nuclear = moment_distance(moment, ball="spectral", radius=1.0)
    total_variation = 0.5 * float((teacher - student).abs().sum(-1).mean())
    assert 0 < frobenius <= nuclear <= float(gap.norm(dim=-1).mean()) <= 2 * total_variation


@pytest.mark.parametrize("ball", ["spectral", "frobenius"])
def test_a_zero_moment_has_distance_zero_and_a_finite_critic(ball):
    moment = torch.zeros(4, 3)
    critic = build_critic(ClosedFormCritic(ball=ball)).respond(moment)
    assert moment_distance(moment, ball=ball, radius=1.0) == 0.0
    assert torch.equal(critic, torch.zeros(4, 3))

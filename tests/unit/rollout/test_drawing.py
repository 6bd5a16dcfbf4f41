"""Tokens drawn from logits, against the distribution computed in numpy and by counting."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill_system.rollout.drawing import Truncation, draw_tokens, draw_uniforms

LOGITS = torch.tensor([[2.0, -1.0, 0.5, 1.9, -torch.inf, 0.0]])


def _draw(
    uniforms: np.ndarray,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 6,
    min_p: float = 0.0,
):
    count = len(uniforms)
    truncation = Truncation(
        top_ps_B=torch.full((count,), top_p),
        top_ks_B=torch.full((count,), top_k),
        min_ps_B=torch.full((count,), min_p),
        num_told=3,
    )
    return draw_tokens(
        LOGITS.expand(count, -1),
        torch.from_numpy(uniforms),
        torch.full((count,), temperature),
        None if (top_p, top_k, min_p) == (1.0, 6, 0.0) else truncation,
    )


def _truth(temperature: float, top_p: float, top_k: int = 6, min_p: float = 0.0) -> np.ndarray:
    """The truncated distribution, token by token from the most likely on."""
    weights = np.exp(LOGITS[0].double().numpy() / temperature)
    weights[weights < min_p * weights.max()] = 0.0
    weights[np.argsort(-weights)[top_k:]] = 0.0
    weights /= weights.sum()
    kept, reached = np.zeros_like(weights), 0.0
    for token in np.argsort(-weights):
        kept[token] = weights[token]
        reached += weights[token]
        if reached >= top_p:
            break
    return kept / kept.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.6, 0.01])
def test_tokens_come_as_often_as_their_probability_says_and_say_it(temperature, top_p) -> None:
    uniforms = (np.arange(20_000) + 0.5) / 20_000  # the inverse of a distribution function, probed
    tokens, logprobs, _ = _draw(uniforms, temperature=temperature, top_p=top_p)
    truth = _truth(temperature, top_p)
    shares = np.bincount(tokens.numpy(), minlength=6) / 20_000
    np.testing.assert_allclose(shares, truth, atol=1e-4)
    np.testing.assert_allclose(logprobs, np.log(truth[tokens.numpy()]), atol=1e-5)


@pytest.mark.parametrize("how", [(1.0, 2, 0.0), (1.0, 6, 0.3), (0.7, 3, 0.0), (0.9, 5, 0.1)])
def test_what_is_cut_off_is_never_drawn_and_what_is_left_is_told(how) -> None:
    """min_p cuts first, then top_k, then top_p of the mass that is left."""
    top_p, top_k, min_p = how
    uniforms = (np.arange(20_000) + 0.5) / 20_000
    tokens, logprobs, kept = _draw(uniforms, top_p=top_p, top_k=top_k, min_p=min_p)
    truth = _truth(1.0, top_p, top_k, min_p)
    np.testing.assert_allclose(np.bincount(tokens, minlength=6) / 20_000, truth, atol=1e-4)
    np.testing.assert_allclose(logprobs, np.log(truth[tokens.numpy()]), atol=1e-5)
    left = [int(token) for token in np.argsort(-truth, kind="stable") if truth[token] > 0]
    assert kept[0].tolist() == [*left, -1, -1, -1][:3]


def test_the_ends_of_the_unit_interval_draw_tokens_that_have_mass() -> None:
    tokens, logprobs, _ = _draw(np.array([0.0, np.nextafter(1.0, 0.0)]))
    assert tokens.tolist() == [0, 5]
    assert logprobs.isfinite().all()


def test_temperature_0_takes_the_most_likely_token_and_says_its_probability_at_1() -> None:
    tokens, logprobs, _ = _draw(np.array([0.999]), temperature=0.0, top_p=0.1)
    assert tokens.tolist() == [0]
    assert logprobs.item() == pytest.approx(np.log(_truth(1.0, 1.0)[0]), abs=1e-6)


def test_each_row_has_its_own_temperature_and_truncation() -> None:
    uniforms = torch.full((3,), 0.7, dtype=torch.float64)
    temperatures, top_ps = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.6, 1.0, 1.0])
    all_of_them, none = torch.full((3,), 6), torch.zeros(3)
    truncation = Truncation(top_ps_B=top_ps, top_ks_B=all_of_them, min_ps_B=none)
    tokens, logprobs, _ = draw_tokens(LOGITS.expand(3, -1), uniforms, temperatures, truncation)
    for row, (temperature, top_p) in enumerate([(1.0, 0.6), (0.0, 1.0), (2.0, 1.0)]):
        token, logprob, _ = _draw(np.array([0.7]), temperature=temperature, top_p=top_p)
        assert (tokens[row], logprobs[row]) == (token[0], logprob[0])


def test_the_numbers_of_a_request_follow_from_its_seed_and_are_uniform() -> None:
    numbers = draw_uniforms(2**62 + 1, 4000)
    assert np.array_equal(numbers[:9], draw_uniforms(2**62 + 1, 9)), "whatever the length"
    assert not np.array_equal(numbers, draw_uniforms(2**62, 4000))
    assert 0.0 <= numbers.min() < 0.01
    assert 0.99 < numbers.max() < 1.0
    assert numbers.mean() == pytest.approx(0.5, abs=0.03)

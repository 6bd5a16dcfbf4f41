"""The products of low precision that only a GPU makes: float32 results of bfloat16 factors."""

from __future__ import annotations

import pytest
import torch

from distill_system.objectives.divergences import kl_divergence
from distill_system.objectives.vocabulary import (
    TeacherDistribution,
    read_vocabulary,
    sum_over_vocabulary,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
TOKENS, HIDDEN, FEATURES, VOCABULARY = 300, 64, 96, 5000


def _draw(*shape, seed):
    """Exact in bfloat16, so that rounding the factors changes nothing."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.bfloat16().double()


def _read(device, dtype, read):
    leaves = [
        _draw(*shape, seed=seed).to(device, dtype).requires_grad_()
        for seed, shape in enumerate([(TOKENS, HIDDEN), (VOCABULARY, HIDDEN)])
    ]
    total = read(*leaves)
    return [total.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(total, leaves))]


def _dense_reverse_kl(hidden, unembedding):
    features, head = _draw(TOKENS, FEATURES, seed=2), _draw(VOCABULARY, FEATURES, seed=3)
    teacher = (features @ head.T).log_softmax(-1)
    return kl_divergence((hidden @ unembedding.T).log_softmax(-1), teacher).mean()


def _reverse_kl(hidden, unembedding):
    teacher = TeacherDistribution(
        features_NF=_draw(TOKENS, FEATURES, seed=2).to("cuda", torch.float32),
        unembedding_VF=_draw(VOCABULARY, FEATURES, seed=3).to("cuda", torch.bfloat16),
    )
    with torch.autocast("cuda", dtype=torch.bfloat16):
        return sum_over_vocabulary(
            hidden,
            torch.zeros(TOKENS, dtype=torch.int64, device="cuda"),
            unembedding,
            torch.full((TOKENS,), 1 / TOKENS, device="cuda"),
            lambda chunk: kl_divergence(chunk.student_logprobs_cV, chunk.teacher_logprobs_cV),
            teacher=teacher,
            chunk_tokens=128,
        ).total


def _dense_embedding(hidden, unembedding):
    actions = _draw(VOCABULARY, FEATURES, seed=4)
    return ((hidden @ unembedding.T).softmax(-1) @ actions).square().mean()


def _embedding(hidden, unembedding):
    with torch.autocast("cuda", dtype=torch.bfloat16):
        rows = read_vocabulary(
            hidden,
            torch.zeros(TOKENS, dtype=torch.int64, device="cuda"),
            unembedding,
            _draw(VOCABULARY, FEATURES, seed=4).to("cuda", torch.float32),
            chunk_tokens=128,
        )
    return rows.expected_embedding_NE.square().mean()


@pytest.mark.parametrize(
    ("ours", "dense"), [(_reverse_kl, _dense_reverse_kl), (_embedding, _dense_embedding)]
)
def test_bfloat16_on_a_gpu_stays_near_float64(ours, dense):
    """The loss keeps float32 logits; its gradient passes through bfloat16 once."""
    exact = _read("cpu", torch.float64, dense)
    rough = _read("cuda", torch.float32, ours)
    for tolerance, got, expected in zip((5e-3, 1e-2, 1e-2), rough, exact, strict=True):
        assert got.dtype == torch.float32
        assert (got - expected).norm() < tolerance * expected.norm()


def test_logits_of_bfloat16_factors_are_not_rounded():
    exact = _read("cpu", torch.float64, _dense_reverse_kl)[0]
    assert abs(_read("cuda", torch.float32, _reverse_kl)[0] - exact) < 1e-4 * exact

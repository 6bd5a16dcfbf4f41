"""Our divergences against TRL's own functions (trl 1.16, pinned), values and gradients.

TRL has them twice: `ChunkedDivergenceFunction` of its distillation trainer reads hidden states in
tiles, `GKDTrainer.generalized_jsd_loss` reads whole logits. Its beta is 0 for the forward KL, 1 for
the reverse KL, and between them the teacher's share of the mixture.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from token_rows import make_token_rows
from trl.kernels.chunked_divergence import VOCAB_CHUNK_SIZE, ChunkedDivergenceFunction

from distill_system.config.objective.token_losses import (
    ForwardKlConfig,
    GeneralizedJsdConfig,
    ReverseKlConfig,
    TokenLossConfig,
)
from distill_system.objectives.token_losses import bind_token_loss
from distill_system.objectives.vocabulary import TeacherDistribution, sum_over_vocabulary

LOSSES: dict[float, TokenLossConfig] = {
    0.0: ForwardKlConfig(type="forward_kl"),
    0.1: GeneralizedJsdConfig(type="generalized_jsd", mixture_weight=0.1),
    0.5: GeneralizedJsdConfig(type="generalized_jsd", mixture_weight=0.5),
    0.9: GeneralizedJsdConfig(type="generalized_jsd", mixture_weight=0.9),
    1.0: ReverseKlConfig(type="reverse_kl"),
}
every_beta = pytest.mark.parametrize("beta", LOSSES)


class Problem:
    """Hidden states and unembeddings of both policies, and a weight for each token."""

    def __init__(self, *, tokens=37, vocabulary=501, hidden=16, features=24):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=generator)

        self.hidden = draw(tokens, hidden)
        self.unembedding = draw(vocabulary, hidden) / 2
        self.features = draw(tokens, features)
        self.teacher_unembedding = draw(vocabulary, features) / 2
        self.weights = torch.rand(tokens, generator=generator) + 0.5

    def leaves(self, dtype=torch.float32):
        pair = self.hidden, self.unembedding
        return [tensor.to(dtype, copy=True).requires_grad_() for tensor in pair]

    def rows(self, hidden):
        """One sequence of all tokens, which these losses do not look at."""
        count = len(hidden)
        return make_token_rows(hidden, torch.zeros(count, dtype=torch.int64), [count])

    def ours(self, beta, *, temperature=1.0):
        """Token losses and the gradients of hidden states and unembedding."""
        hidden, unembedding = leaves = self.leaves()
        result = sum_over_vocabulary(
            hidden,
            torch.zeros(len(hidden), dtype=torch.int64),
            unembedding,
            self.weights,
            bind_token_loss(LOSSES[beta], self.rows(hidden)),
            teacher=TeacherDistribution(
                features_NF=self.features, unembedding_VF=self.teacher_unembedding
            ),
            temperature=temperature,
            chunk_tokens=16,
        )
        return result.values_N, *torch.autograd.grad(result.total, leaves)

    def chunked_by_trl(self, beta, *, temperature=1.0):
        hidden, unembedding = leaves = self.leaves()
        values, _ = ChunkedDivergenceFunction.apply(
            hidden,
            unembedding,
            None,
            self.features,
            self.teacher_unembedding,
            None,
            beta,
            temperature,
        )
        return values.detach(), *torch.autograd.grad((values * self.weights).sum(), leaves)

    def dense_by_trl(self, generalized_jsd_loss, beta, *, temperature=1.0):
        """In float64; TRL's function gives [N, V], whose rows sum to the token losses."""
        hidden, unembedding = leaves = self.leaves(torch.float64)
        values = generalized_jsd_loss(
            hidden @ unembedding.T,
            self.features.double() @ self.teacher_unembedding.double().T,
            beta=beta,
            temperature=temperature,
            reduction="none",
        ).sum(-1)
        return values.detach(), *torch.autograd.grad((values * self.weights).sum(), leaves)


def _assert_close(ours, theirs, *, tolerance):
    for name, mine, other in zip(
        ("values", "hidden states", "unembedding"), ours, theirs, strict=True
    ):
        error = float((mine.double() - other.double()).norm() / other.double().norm())
        assert error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.fixture(scope="module")
def generalized_jsd_loss():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is experimental
        from trl.experimental.gkd.gkd_trainer import GKDTrainer
    return GKDTrainer.generalized_jsd_loss


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@every_beta
def test_values_and_gradients_equal_the_chunked_divergence(beta, temperature):
    problem = Problem()
    ours = problem.ours(beta, temperature=temperature)
    assert ours[0].min() > 0.01  # far enough from zero for a relative error to mean something
    _assert_close(ours, problem.chunked_by_trl(beta, temperature=temperature), tolerance=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@every_beta
def test_values_and_gradients_equal_the_dense_function_in_float64(
    beta, temperature, generalized_jsd_loss
):
    problem = Problem()
    dense = problem.dense_by_trl(generalized_jsd_loss, beta, temperature=temperature)
    _assert_close(problem.ours(beta, temperature=temperature), dense, tolerance=1e-5)


@every_beta
def test_a_vocabulary_of_several_of_their_tiles_gives_the_same(beta):
    problem = Problem(tokens=5, vocabulary=VOCAB_CHUNK_SIZE + 1001)
    _assert_close(problem.ours(beta), problem.chunked_by_trl(beta), tolerance=1e-5)


@every_beta
def test_bfloat16_autocast_is_as_near_to_float32_as_theirs(beta):
    """Both round the factors; on a CPU we round their product as well, and they do not."""
    problem = Problem()
    exact = problem.ours(beta)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = problem.ours(beta), problem.chunked_by_trl(beta)
    assert not torch.equal(ours[0], exact[0])
    _assert_close(ours, exact, tolerance=2e-2)
    _assert_close(ours, theirs, tolerance=2e-2)

"""A student and a teacher drawn at random, and the same loss read through the seam and densely."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from token_rows import make_token_rows
from torch import Tensor

from distill_system.config.objective.token_losses import TokenLossConfig
from distill_system.objectives.rows import PolicyHeads, TeacherRows, TokenRows
from distill_system.objectives.token_losses import bind_token_loss
from distill_system.objectives.vocabulary import read_top_k

DenseLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(teacher probabilities [N, V], student probabilities [N, V], token ids [N]) -> losses [N]."""


@dataclass(frozen=True)
class Reading:
    """A weighted sum of losses, the losses, and the gradients of hidden states and unembedding."""

    total: Tensor
    values: Tensor
    hidden_gradient: Tensor
    unembedding_gradient: Tensor


class TwoPolicies:
    """13 tokens of responses of 6, 1 and 6; 23 words; hidden sizes 6 (student) and 5 (teacher)."""

    def __init__(self, *, seed: int = 0, vocabulary: int = 23, equal: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.hidden, self.unembedding = draw(13, 6), draw(vocabulary, 6)
        self.features = self.hidden.clone() if equal else draw(13, 5)
        self.teacher_unembedding = self.unembedding.clone() if equal else draw(vocabulary, 5)
        self.ids = torch.randint(vocabulary, (13,), generator=generator)
        self.weights = torch.rand(13, generator=generator) + 0.5

    def rows(self, *, k: int = 0, hidden: Tensor | None = None) -> TokenRows:
        teacher = TeacherRows(features_NF=self.features)
        if k:
            ids, logprobs = read_top_k(self.features, self.teacher_unembedding, k=k, chunk_tokens=4)
            teacher = replace(teacher, top_k_ids_NK=ids, top_k_logprobs_NK=logprobs)
        own = self.hidden if hidden is None else hidden
        return make_token_rows(own, self.ids, (6, 1, 6), teacher=teacher)

    def heads(self, *, chunk: int = 4, unembedding: Tensor | None = None) -> PolicyHeads:
        student = self.unembedding if unembedding is None else unembedding
        return PolicyHeads(
            unembedding_VH=student,
            action_embeddings_VE=torch.zeros(len(student), 2),
            teacher_unembedding_VF=self.teacher_unembedding,
            chunk_tokens=chunk,
        )

    def read(
        self, config: TokenLossConfig, *, chunk: int = 4, temperature: float = 1.0, k: int = 0
    ) -> Reading:
        """Through PolicyHeads.sum, in float32."""
        hidden = self.hidden.clone().requires_grad_()
        unembedding = self.unembedding.clone().requires_grad_()
        rows = self.rows(k=k, hidden=hidden)
        result = self.heads(chunk=chunk, unembedding=unembedding).sum(
            rows,
            bind_token_loss(config, rows),
            self.weights,
            temperature=temperature,
            tokens_together=config.tokens_together,
        )
        result.total.backward()
        return Reading(result.total.detach(), result.values_N, *_gradients(hidden, unembedding))

    def read_densely(self, loss: DenseLoss, *, temperature: float = 1.0) -> Reading:
        """From whole tables of probabilities, in float64."""
        hidden = self.hidden.double().requires_grad_()
        unembedding = self.unembedding.double().requires_grad_()
        student = (hidden @ unembedding.T / temperature).softmax(-1)
        values = loss(self.teacher(temperature), student, self.ids)
        total = (values * self.weights.double()).sum()
        total.backward()
        return Reading(total.detach(), values.detach(), *_gradients(hidden, unembedding))

    def teacher(self, temperature: float = 1.0) -> Tensor:
        """Its probabilities, float64 [N, V]."""
        logits = self.features.double() @ self.teacher_unembedding.double().T
        return (logits / temperature).softmax(-1)


def _gradients(hidden: Tensor, unembedding: Tensor) -> tuple[Tensor, Tensor]:
    assert hidden.grad is not None
    assert unembedding.grad is not None
    return hidden.grad, unembedding.grad


def assert_same_reading(ours: Reading, expected: Reading, *, tolerance: float = 1e-5) -> None:
    """Each of the four tensors within this relative error, by its Euclidean norm."""
    for name in ("total", "values", "hidden_gradient", "unembedding_gradient"):
        got, wanted = getattr(ours, name).double(), getattr(expected, name).double()
        error = float((got - wanted).norm() / wanted.norm())
        assert error < tolerance, f"{name}: relative error {error:.1e}"

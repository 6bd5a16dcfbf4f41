"""Adversarial action-value moment matching on two streams (AMMD, NeurIPS 2024, arXiv 2406.02959).

    min_theta max_{phi1, phi2}  (1 - beta) L_off(theta, phi1) + beta L_on(theta, phi2)

| paper, docs/objectives.md | here |
|---|---|
| pi_theta, pi* | student, teacher |
| beta, gamma | on_policy_weight, discount |
| f1, phi1 | off_critic: f1(s, y) = g(h_theta)^T phi1 e(y) |
| f2, phi2 | on_critic: f2(s, y) = g(h*)^T phi2 e(y) |
| e(y) | action embedding: a unit row of the teacher's input embeddings |
| ebar_pi(s) | expected embedding: sum_y pi(y | s) e(y) |
| c_t | cost: f2's expectation under the teacher minus its value at the token written |

Differs from the paper: critics are bilinear in normalised features instead of two small networks,
so the inner maximum has a closed form; both sides of a moment are expectations by default.
Axes: N tokens, F feature size, E action-embedding size.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from distill_system.config.objective import AmmdConfig
from distill_system.objectives.critics import build_critic, moment_distance
from distill_system.objectives.returns import compute_baseline, cost_to_go, future_cost_to_go
from distill_system.objectives.rows import (
    ObjectiveOutput,
    PolicyHeads,
    SumOverRanks,
    TokenRows,
    stream_mean,
)
from distill_system.objectives.vocabulary import VocabularyRows, unit_rows


class Ammd:
    """The min-max game on one step's rows; the critics are its only state."""

    def __init__(self, config: AmmdConfig, *, max_response_tokens: int) -> None:
        self.config = config
        self.max_response_tokens = max_response_tokens
        self.off_critic = build_critic(config.critic)
        self.on_critic = build_critic(config.critic)

    def compute_loss(
        self,
        heads: PolicyHeads,
        off_policy: TokenRows | None,
        on_policy: TokenRows | None,
        sum_over_ranks: SumOverRanks,
    ) -> ObjectiveOutput:
        """(1 - beta) L_off + beta L_on; a stream of weight zero may be absent (None)."""
        beta = self.config.on_policy_weight
        terms: list[ObjectiveOutput] = []
        if off_policy is not None and beta < 1.0:
            terms.append(self._off_policy_term(heads, off_policy, sum_over_ranks))
        if on_policy is not None and beta > 0.0:
            terms.append(self._on_policy_term(heads, on_policy, sum_over_ranks))
        return _merge(terms)

    def _off_policy_term(
        self, heads: PolicyHeads, rows: TokenRows, sum_over_ranks: SumOverRanks
    ) -> ObjectiveOutput:
        """Differentiated directly through the student's expectation of f1 (docs/objectives.md)."""
        student = heads.read(rows)
        weight = 1.0 - self.config.on_policy_weight
        features_NF = unit_rows(rows.hidden_NH.detach())
        _, expected_NE = _teacher(rows)
        target_NE = self._target(expected_NE, heads.action_embeddings_VE[rows.token_ids_N])
        gap_NE = target_NE - student.expected_embedding_NE
        moment_FE = self._moment(features_NF, gap_NE.detach(), rows, sum_over_ranks)
        critic_FE = self.off_critic.respond(moment_FE)
        scores_NE = features_NF @ critic_FE
        loss = weight * self._discounted_mean((scores_NE * gap_NE).sum(dim=-1), rows)
        cross_entropy = -stream_mean(student.logprobs_N, rows)
        if self.config.language_model_weight > 0:
            loss = loss + self.config.language_model_weight * cross_entropy
        return ObjectiveOutput(
            loss_share=loss,
            metric_shares={"cross_entropy": cross_entropy.detach()},
            metrics={"off_policy_distance": float((critic_FE * moment_FE).sum())},
        )

    def _on_policy_term(
        self, heads: PolicyHeads, rows: TokenRows, sum_over_ranks: SumOverRanks
    ) -> ObjectiveOutput:
        """Policy gradient on costs of f2, whose immediate part is known in expectation."""
        student = heads.read(rows)
        teacher_features_NF, expected_NE = _teacher(rows)
        features_NF = unit_rows(teacher_features_NF)
        gap_NE = expected_NE - student.expected_embedding_NE
        written_NE = heads.action_embeddings_VE[rows.token_ids_N]
        sampled_gap_NE = expected_NE - written_NE
        expected = self.config.moment_target == "expected"
        moment_gap_NE = gap_NE.detach() if expected else sampled_gap_NE
        moment_FE = self._moment(features_NF, moment_gap_NE, rows, sum_over_ranks)
        critic_FE = self.on_critic.respond(moment_FE)
        scores_NE = features_NF @ critic_FE
        sampled_costs_N = (scores_NE * sampled_gap_NE).sum(dim=-1)
        expected_costs_N = (scores_NE * gap_NE).sum(dim=-1)
        loss = self.config.on_policy_weight * self._policy_loss(
            student, expected_costs_N, sampled_costs_N, rows, sum_over_ranks
        )
        first_N = cost_to_go(sampled_costs_N, rows, discount=self.config.discount)
        reward_to_go = -first_N[rows.positions_N == 0].sum() / rows.num_global_sequences
        return ObjectiveOutput(
            loss_share=loss,
            metric_shares={"reward_to_go": reward_to_go},
            metrics={"on_policy_distance": float((critic_FE * moment_FE).sum())},
            student_logprobs_N=student.logprobs_N.detach(),
        )

    def _policy_loss(
        self,
        student: VocabularyRows,
        expected_costs_N: Tensor,
        sampled_costs_N: Tensor,
        rows: TokenRows,
        sum_over_ranks: SumOverRanks,
    ) -> Tensor:
        """A share whose gradient estimates that of E_{tau ~ pi_theta} sum gamma^t c_t / N."""
        config = self.config
        if config.policy_gradient == "reward_to_go":
            returns_N = cost_to_go(sampled_costs_N, rows, discount=config.discount)
            advantages_N = returns_N - self._baseline(returns_N, rows, sum_over_ranks)
            return self._discounted_mean(student.logprobs_N * advantages_N, rows)
        immediate = self._discounted_mean(expected_costs_N, rows)
        if config.policy_gradient == "immediate":
            return immediate
        future_N = future_cost_to_go(
            expected_costs_N.detach(),
            rows,
            discount=config.discount,
            normalise=config.normalise_future,
        )
        advantages_N = future_N - self._baseline(future_N, rows, sum_over_ranks)
        return immediate + config.future_weight * self._discounted_mean(
            student.logprobs_N * advantages_N, rows
        )

    def _baseline(self, returns_N: Tensor, rows: TokenRows, sum_over_ranks: SumOverRanks) -> Tensor:
        return compute_baseline(
            self.config.baseline, returns_N, rows, sum_over_ranks, longest=self.max_response_tokens
        )

    def _target(self, expected_NE: Tensor, written_NE: Tensor) -> Tensor:
        return expected_NE if self.config.moment_target == "expected" else written_NE

    def _discounts(self, rows: TokenRows) -> Tensor:
        return torch.pow(
            torch.tensor(self.config.discount, device=rows.positions_N.device),
            rows.positions_N.float(),
        )

    def _discounted_mean(self, values_N: Tensor, rows: TokenRows) -> Tensor:
        return stream_mean(self._discounts(rows) * values_N, rows)

    def _moment(
        self,
        features_NF: Tensor,
        gap_NE: Tensor,
        rows: TokenRows,
        sum_over_ranks: SumOverRanks,
    ) -> Tensor:
        return compute_moment(
            features_NF, gap_NE, self._discounts(rows), rows.num_global_tokens, sum_over_ranks
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Both critics, where they have state."""
        critics = {"off_critic": self.off_critic, "on_critic": self.on_critic}
        return {
            f"{name}.{key}": value
            for name, critic in critics.items()
            for key, value in critic.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back both critics."""
        for name, critic in (("off_critic", self.off_critic), ("on_critic", self.on_critic)):
            prefix = f"{name}."
            critic.load_state_dict(
                {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
            )


def compute_moment(
    features_NF: Tensor,
    gap_NE: Tensor,
    weights_N: Tensor,
    num_global_tokens: int,
    sum_over_ranks: SumOverRanks,
) -> Tensor:
    """M = (1/N) sum_t w_t g_t d_t^T over all ranks, float32 [F, E], detached."""
    share_FE = features_NF.detach().T @ (weights_N[:, None] * gap_NE.detach())
    return sum_over_ranks(share_FE) / num_global_tokens


def measure_distance(
    heads: PolicyHeads,
    rows: TokenRows,
    sum_over_ranks: SumOverRanks,
    *,
    stream: Literal["off_policy", "on_policy"],
    ball: str = "spectral",
    radius: float = 1.0,
) -> float:
    """d_off or d_on of the whole critic class on these rows: the closed-form inner maximum.

    Both sides in expectation, undiscounted, so it is exactly zero where student equals teacher.
    off_policy reads the student's features on teacher text, on_policy the teacher's features on
    student text.
    """
    teacher_features_NF, expected_NE = _teacher(rows)
    features_NF = rows.hidden_NH if stream == "off_policy" else teacher_features_NF
    gap_NE = expected_NE - heads.read(rows).expected_embedding_NE
    ones_N = torch.ones(gap_NE.shape[0], device=gap_NE.device)
    moment_FE = compute_moment(
        unit_rows(features_NF), gap_NE, ones_N, rows.num_global_tokens, sum_over_ranks
    )
    return moment_distance(moment_FE, ball=ball, radius=radius)


def _teacher(rows: TokenRows) -> tuple[Tensor, Tensor]:
    """The teacher's features [N, F] and expected embeddings [N, E]."""
    teacher = rows.teacher
    assert teacher is not None, "AMMD declares MOMENTS; the learner must bring them"
    assert teacher.features_NF is not None, "MOMENTS hold the features"
    assert teacher.expected_embedding_NE is not None, "MOMENTS hold the expected embeddings"
    return teacher.features_NF, teacher.expected_embedding_NE


def _merge(terms: list[ObjectiveOutput]) -> ObjectiveOutput:
    assert terms, "the configuration guarantees a stream of positive weight"
    return ObjectiveOutput(
        loss_share=torch.stack([term.loss_share for term in terms]).sum(),
        metric_shares={k: v for term in terms for k, v in term.metric_shares.items()},
        metrics={k: v for term in terms for k, v in term.metrics.items()},
        student_logprobs_N=terms[-1].student_logprobs_N,
    )

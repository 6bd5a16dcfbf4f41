"""MiniLLM: the reverse KL of whole responses, by policy gradient (arXiv 2306.08543).

    grad KL(pi_theta || pi*) = E_{y ~ pi_theta} sum_t  grad KL_t  +  F_t grad log pi_theta(y_t)

Both parts are one pass over the vocabulary, after one without gradient that gives F and w.

| paper | here |
|---|---|
| q_theta, p | student pi_theta, teacher pi* |
| alpha | teacher_mixture: share of the responses that the teacher writes |
| r_t | minus the cost c_t = log pi_theta(y_t) - log pi*(y_t) |
| single-step part | KL_t = KL(pi_theta || pi*) at s_t, its exact gradient |
| R_(t+1), R^Norm_(t+1) | minus the future F_t: later costs of the response, summed or averaged |
| w_t | importance weight of sampling from the mixture |
| L_PT | the next-token loss of language_model_weight |

Differs from the paper: it draws each token from alpha pi* + (1 - alpha) pi_theta, which no two
engines can do together; here each response is written by one of them, and w_t keeps the paper's
form on both streams. Each sample is learned from once, so the probability ratio that the paper
clips after PPO is 1 and there is nothing to clip. L_PT reads the off-policy stream; on a corpus it
is distill.language_model. Axes: N tokens, S responses, T longest response, b tokens of a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from distill_system.config.objective import MinillmConfig, StreamName
from distill_system.objectives.importance import UNWEIGHTED, Importance, ImportanceWeights
from distill_system.objectives.language_model import language_model_loss
from distill_system.objectives.returns import future_cost_to_go
from distill_system.objectives.rows import (
    ObjectiveOutput,
    PolicyHeads,
    SumOverRanks,
    TokenRows,
    pad_rows,
    stream_mean,
    weigh,
)
from distill_system.objectives.vocabulary import VocabularyChunk, VocabularyRows


@dataclass(frozen=True, slots=True, kw_only=True)
class _Coefficients:
    """What each token's KL_t and log pi_theta(y_t) are multiplied by, detached [N]."""

    step_N: Float[Tensor, " N"]
    score_N: Float[Tensor, " N"]


class Minillm:
    """A mean over the tokens of alpha x teacher's text + (1 - alpha) x student's text."""

    def __init__(self, config: MinillmConfig, *, importance: Importance = UNWEIGHTED) -> None:
        self.config = config
        self.importance = importance

    def compute_loss(
        self,
        heads: PolicyHeads,
        off_policy: TokenRows | None,
        on_policy: TokenRows | None,
        sum_over_ranks: SumOverRanks,
    ) -> ObjectiveOutput:
        """The value is the surrogate's, not the divergence: read the metrics for that."""
        assert on_policy is not None, "MiniLLM reads the student's own text"
        student = _read_written(heads, on_policy)
        share = self._token_share("on_policy", off_policy, on_policy)
        losses, metrics = [], {}
        loss, metrics["on_policy_reverse_kl"], _ = self._term(
            heads, on_policy, student, share, language_model_weight=0.0
        )
        losses.append(loss)
        if off_policy is not None:
            loss, off_metrics = self._off_policy_term(heads, off_policy, on_policy)
            losses.append(loss)
            metrics |= off_metrics
        return ObjectiveOutput(
            loss_share=torch.stack(losses).sum(),
            metric_shares=metrics,
            student_logprobs_N=student.behaviour_logprobs_N,
        )

    def _off_policy_term(
        self, heads: PolicyHeads, rows: TokenRows, on_policy: TokenRows
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher's share of the mixture and the language-model loss, in one pass."""
        weight = self.config.language_model_weight
        if self.config.teacher_mixture == 0.0:
            loss = language_model_loss(heads, rows)
            return weight * loss, {"cross_entropy": loss.detach()}
        student = _read_written(heads, rows)
        share = self._token_share("off_policy", rows, on_policy)
        loss, reverse_kl, importance = self._term(
            heads, rows, student, share, language_model_weight=weight
        )
        return loss, {
            "off_policy_reverse_kl": reverse_kl,
            "off_policy_importance": importance,
            "cross_entropy": -stream_mean(student.logprobs_N, rows),
        }

    def _term(
        self,
        heads: PolicyHeads,
        rows: TokenRows,
        student: VocabularyRows,
        share: float,
        *,
        language_model_weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One stream's loss share, its mean KL_t, and its mean coefficient of KL_t."""
        weights = self.importance.read(rows, student.behaviour_logprobs_N)
        coefficients = self._coefficients(rows, student.logprobs_N, weights)
        language_model = language_model_weight / rows.num_global_tokens
        score_N = share * coefficients.score_N - language_model
        divergence_N = torch.empty_like(student.logprobs_N)

        def chunk_loss(chunk: VocabularyChunk) -> Tensor:
            student_bV = chunk.student_logprobs_cV
            divergence_b = (student_bV.exp() * (student_bV - chunk.teacher_logprobs_cV)).sum(-1)
            divergence_N[chunk.rows] = divergence_b.detach()
            step_b = share * coefficients.step_N[chunk.rows]
            return step_b * divergence_b + score_N[chunk.rows] * chunk.written_logprobs_c

        # The coefficients stand in the chunk's losses: two losses share one pass, of weight 1.
        part = heads.sum(rows, chunk_loss, torch.ones_like(student.logprobs_N))
        counted_N = weigh(divergence_N, None if weights is None else weights.states_N)
        return part.total, stream_mean(counted_N, rows), stream_mean(coefficients.step_N, rows)

    def _coefficients(
        self, rows: TokenRows, logprobs_N: Float[Tensor, " N"], weights: ImportanceWeights | None
    ) -> _Coefficients:
        """token: w_t and w_t F_t. prefix: w of the tokens before t, and the future of w_k c_k.

        Exact in expectation is prefix, with normalise_length off; its weights stay below
        1/(1 - alpha), for each response is of the mixture itself. Text of an older student is first
        made the student's own by the weights, then read as such: both multiply.
        """
        assert rows.teacher is not None, "MiniLLM declares features and log-probabilities"
        assert rows.teacher.logprobs_N is not None, "MiniLLM declares log-probabilities"
        costs_N = logprobs_N - rows.teacher.logprobs_N
        normalise = self.config.normalise_length
        states_N = None if weights is None else weights.states_N
        tokens_N = None if weights is None else weights.tokens_N
        # a product of ratios up to each later cost is that cost's own; a token's ratio is the sum's
        later_N, sum_N = (tokens_N, None) if self.importance.kind == "state" else (None, tokens_N)
        if self.config.importance == "token":
            mixture_N = self._importance(-costs_N)
            future_N = future_cost_to_go(
                weigh(costs_N, later_N), rows, discount=1.0, normalise=normalise
            )
            # with a teacher's share the factor of KL_t reads the token as well
            step_N = weigh(mixture_N, tokens_N if self.config.teacher_mixture else states_N)
            return _Coefficients(step_N=step_N, score_N=weigh(mixture_N * future_N, sum_N))
        # log of pi*/pi_theta over each prefix, its last token included; minus that token's share it
        # is the prefix before it, which is what a state depends on
        ratios_N = pad_rows(-costs_N, rows).cumsum(dim=1)[rows.sequence_ids_N, rows.positions_N]
        weighted_N = weigh(self._importance(ratios_N) * costs_N, later_N)
        future_N = future_cost_to_go(weighted_N, rows, discount=1.0, normalise=normalise)
        return _Coefficients(
            step_N=weigh(self._importance(ratios_N + costs_N), states_N),
            score_N=weigh(future_N, sum_N),
        )

    def _importance(self, log_ratios_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """pi_theta / (alpha pi* + (1 - alpha) pi_theta), from log(pi* / pi_theta)."""
        alpha = self.config.teacher_mixture
        if alpha == 0.0:
            return torch.ones_like(log_ratios_N)
        # 1 / (alpha pi*/pi_theta + 1 - alpha), in logarithms: the ratio alone may overflow
        student = torch.full_like(log_ratios_N, math.log1p(-alpha))
        return (-torch.logaddexp(log_ratios_N + math.log(alpha), student)).exp()

    def _token_share(
        self, stream: StreamName, off_policy: TokenRows | None, on_policy: TokenRows
    ) -> float:
        """What one token of the stream counts in the mean over the mixture's tokens.

        A stream's responses count as alpha or 1 - alpha of all, however many there are of them.
        """
        alpha = self.config.teacher_mixture
        if off_policy is None or alpha == 0.0:
            return 1.0 / on_policy.num_global_tokens
        shares = {"off_policy": (alpha, off_policy), "on_policy": (1.0 - alpha, on_policy)}
        mean_tokens = sum(
            share * rows.num_global_tokens / rows.num_global_sequences
            for share, rows in shares.values()
        )
        share, rows = shares[stream]
        return share / rows.num_global_sequences / mean_tokens

    def state_dict(self) -> dict[str, Tensor]:
        """Empty: stateless."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to take back."""


@torch.no_grad()
def _read_written(heads: PolicyHeads, rows: TokenRows) -> VocabularyRows:
    """log pi_theta(y_t | s_t), nats: one product with the unembedding, no gradient."""
    return heads.read_written(rows)

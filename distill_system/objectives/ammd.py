"""Adversarial action-value moment matching on two streams (AMMD, NeurIPS 2024, arXiv 2406.02959).

    min_theta max_{phi1, phi2}  (1 - beta) L_off(theta, phi1) + beta L_on(theta, phi2)

| paper, docs/objectives.md | here |
|---|---|
| pi_theta, pi* | student, teacher |
| beta, gamma | on_policy_weight, discount |
| f1, phi1 | off_critic: f1(s, y) = g(h_theta)^T phi1 e(y) |
| f2, phi2 | on_critic: f2(s, y) = g(h*)^T phi2 e(y) |
| g(h) | state features (state_features.py): unit rows |
| e(y) | action embedding (action_space.py): a unit row of the teacher's input embeddings |
| ebar_pi(s) | expected embedding: sum_y pi(y | s) e(y) |
| c_t | cost: f2's expectation under the teacher minus its value at the token written |

Differs from the paper as we infer it (its body has not been read): critics are bilinear in
normalised features instead of two small networks,
so the inner maximum has a closed form; both sides of a moment are expectations by default; the
class can be widened by one more action feature (advantage.py); text of an older student is weighed
(importance.py), critics' moments as well: they too are means over the student's own text.
Axes: N tokens, F feature size, E action-embedding size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill_system.config.objective import AmmdConfig, StreamName
from distill_system.objectives.advantage import AdvantageRows, read_advantage
from distill_system.objectives.critics import Critic, build_critic
from distill_system.objectives.distances import compute_moment, read_teacher
from distill_system.objectives.importance import UNWEIGHTED, Importance, ImportanceWeights
from distill_system.objectives.returns import compute_baseline, cost_to_go, future_cost_to_go
from distill_system.objectives.rows import (
    ObjectiveOutput,
    PolicyHeads,
    SumOverRanks,
    TokenRows,
    stream_mean,
    stream_weights,
    weigh,
)
from distill_system.objectives.state_features import build_features
from distill_system.objectives.vocabulary import VocabularyRows


class Ammd:
    """The min-max game on one step's rows; critics and their features are its only state."""

    def __init__(
        self,
        config: AmmdConfig,
        *,
        max_response_tokens: int,
        importance: Importance = UNWEIGHTED,
    ) -> None:
        self.config = config
        self.importance = importance
        self.max_response_tokens = max_response_tokens
        self.off_features = build_features(config.features)
        self.on_features = build_features(config.features)
        self.off_critic = build_critic(config.critic)
        self.on_critic = build_critic(config.critic)

    def compute_loss(
        self,
        heads: PolicyHeads,
        off_policy: TokenRows | None,
        on_policy: TokenRows | None,
        sum_over_ranks: SumOverRanks,
    ) -> ObjectiveOutput:
        """(1 - beta) L_off + beta L_on; a stream alone counts 1."""
        play = {"off_policy": self._off_policy_term, "on_policy": self._on_policy_term}
        streams = stream_weights(self.config, off_policy, on_policy)
        return _merge(
            [
                play[name](heads, rows, weight, sum_over_ranks)
                for name, (rows, weight) in streams.items()
            ]
        )

    def _off_policy_term(
        self, heads: PolicyHeads, rows: TokenRows, weight: float, sum_over_ranks: SumOverRanks
    ) -> ObjectiveOutput:
        """Differentiated directly through the student's expectation of f1 (docs/objectives.md)."""
        student = heads.read(rows)
        advantage = self._read_advantage("off_policy", heads, rows, None, learns=True)
        with _full_precision(rows):
            features_NF = self.off_features.extract(
                rows.hidden_NH, rows.num_global_tokens, sum_over_ranks
            )
            if self.config.moment_target == "expected":
                target_NE = read_teacher(rows)[1]
            else:
                target_NE = heads.action_embeddings_VE[rows.token_ids_N]
            gap_NE = target_NE - student.expected_embedding_NE
            scores_NE, distance = self._play(
                self.off_critic, features_NF, gap_NE.detach(), rows, None, sum_over_ranks
            )
            game = self._discounted_mean((scores_NE * gap_NE).sum(dim=-1), rows)
            if advantage is not None:
                game = game + advantage.total
            loss = weight * game
        cross_entropy = -stream_mean(student.logprobs_N, rows)
        if self.config.language_model_weight > 0:
            loss = loss + self.config.language_model_weight * cross_entropy
        return ObjectiveOutput(
            loss_share=loss,
            metric_shares={
                "cross_entropy": cross_entropy.detach(),
                **_advantage_share("off_policy", advantage),
            },
            metrics={"off_policy_distance": distance},
        )

    def _on_policy_term(
        self, heads: PolicyHeads, rows: TokenRows, weight: float, sum_over_ranks: SumOverRanks
    ) -> ObjectiveOutput:
        """Policy gradient on costs of f2, whose immediate part is known in expectation."""
        student = heads.read(rows)
        weights = self.importance.read(rows, student.behaviour_logprobs_N)
        immediate = self.config.policy_gradient != "reward_to_go"
        advantage = self._read_advantage("on_policy", heads, rows, weights, learns=immediate)
        with _full_precision(rows):
            teacher_features_NF, expected_NE = read_teacher(rows)
            features_NF = self.on_features.extract(
                teacher_features_NF, rows.num_global_tokens, sum_over_ranks, _states(weights)
            )
            gap_NE = expected_NE - student.expected_embedding_NE
            sampled_gap_NE = expected_NE - heads.action_embeddings_VE[rows.token_ids_N]
            expected = self.config.moment_target == "expected"
            scores_NE, distance = self._play(
                self.on_critic,
                features_NF,
                gap_NE.detach() if expected else sampled_gap_NE,
                rows,
                _states(weights) if expected else _tokens(weights),
                sum_over_ranks,
            )
            sampled_costs_N = (scores_NE * sampled_gap_NE).sum(dim=-1)
            if advantage is not None:
                sampled_costs_N = sampled_costs_N + advantage.sampled_costs_N
            expected_costs_N = (scores_NE * gap_NE).sum(dim=-1)
            loss = weight * self._policy_loss(
                student, expected_costs_N, sampled_costs_N, advantage, rows, weights, sum_over_ranks
            )
        # For the metric alone: the return from each response's first token.
        counted_N = weigh(sampled_costs_N, _tokens(weights))
        first_N = cost_to_go(counted_N, rows, discount=self.config.discount)
        reward_to_go = -first_N[rows.positions_N == 0].sum() / rows.num_global_sequences
        return ObjectiveOutput(
            loss_share=loss,
            metric_shares={
                "reward_to_go": reward_to_go,
                **_advantage_share("on_policy", advantage),
            },
            metrics={"on_policy_distance": distance},
            student_logprobs_N=student.behaviour_logprobs_N,
        )

    def _read_advantage(
        self,
        stream: StreamName,
        heads: PolicyHeads,
        rows: TokenRows,
        weights: ImportanceWeights | None,
        *,
        learns: bool,
    ) -> AdvantageRows | None:
        """The extra feature's part, None where the stream's critic has no such feature."""
        config = self.config.advantage
        if config.type == "none" or stream not in config.streams:
            return None
        weights_N = weigh(self._discounts(rows), _states(weights)) / rows.num_global_tokens
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            return read_advantage(config, heads, rows, weights_N)

    def _play(
        self,
        critic: Critic,
        features_NF: Tensor,
        gap_NE: Tensor,
        rows: TokenRows,
        weights_N: Tensor | None,
        sum_over_ranks: SumOverRanks,
    ) -> tuple[Tensor, float]:
        """The critic's answer at each state, g^T phi [N, E], and the distance <phi, M> it finds."""
        counted_N = weigh(self._discounts(rows), weights_N)
        moment_FE = compute_moment(
            features_NF, gap_NE, counted_N, rows.num_global_tokens, sum_over_ranks
        )
        # Held fixed where the gap is differentiated: at a maximum the critic's own change is of
        # second order (envelope theorem).
        critic_FE = critic.respond(moment_FE)
        return features_NF @ critic_FE, float((critic_FE * moment_FE).sum())

    def _policy_loss(
        self,
        student: VocabularyRows,
        expected_costs_N: Tensor,
        sampled_costs_N: Tensor,
        advantage: AdvantageRows | None,
        rows: TokenRows,
        weights: ImportanceWeights | None,
        sum_over_ranks: SumOverRanks,
    ) -> Tensor:
        """A share whose gradient estimates that of E_{tau ~ pi_theta} sum gamma^t c_t / N."""
        config = self.config
        if config.policy_gradient == "reward_to_go":
            returns_N = cost_to_go(
                self._later(sampled_costs_N, _tokens(weights)), rows, discount=config.discount
            )
            advantages_N = self._advantages(returns_N, rows, weights, sum_over_ranks)
            return self._discounted_mean(student.logprobs_N * advantages_N, rows)
        immediate = self._discounted_mean(weigh(expected_costs_N, _states(weights)), rows)
        costs_N = expected_costs_N.detach()
        if advantage is not None:
            immediate = immediate + advantage.total
            costs_N = costs_N + advantage.expected_costs_N
        if config.policy_gradient == "immediate":
            return immediate
        future_N = future_cost_to_go(
            self._later(costs_N, _states(weights)),
            rows,
            discount=config.discount,
            normalise=config.normalise_future,
        )
        advantages_N = self._advantages(future_N, rows, weights, sum_over_ranks)
        return immediate + config.future_weight * self._discounted_mean(
            student.logprobs_N * advantages_N, rows
        )

    def _later(self, costs_N: Tensor, weights_N: Tensor | None) -> Tensor:
        """Costs as they enter a return: by the product of ratios up to each, or as they are."""
        return weigh(costs_N, weights_N if self.importance.kind == "state" else None)

    def _advantages(
        self,
        returns_N: Tensor,
        rows: TokenRows,
        weights: ImportanceWeights | None,
        sum_over_ranks: SumOverRanks,
    ) -> Tensor:
        """What log pi(y_t) is multiplied by: returns less their baseline, [N].

        The costs of a return have products of ratios of their own, the baseline needs one; a ratio
        of the token alone weighs both.
        """
        baseline_N = compute_baseline(
            self.config.baseline, returns_N, rows, sum_over_ranks, longest=self.max_response_tokens
        )
        if self.importance.kind == "state":
            return returns_N - weigh(baseline_N, _tokens(weights))
        return weigh(returns_N - baseline_N, _tokens(weights))

    def _discounts(self, rows: TokenRows) -> Tensor:
        return torch.pow(self.config.discount, rows.positions_N.float())

    def _discounted_mean(self, values_N: Tensor, rows: TokenRows) -> Tensor:
        return stream_mean(self._discounts(rows) * values_N, rows)

    def state_dict(self) -> dict[str, Tensor]:
        """Critics and features, where they have state."""
        return {
            f"{name}.{key}": value
            for name in _STATEFUL
            for key, value in getattr(self, name).state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back critics and features."""
        for name in _STATEFUL:
            prefix = f"{name}."
            getattr(self, name).load_state_dict(
                {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
            )


_STATEFUL = ("off_critic", "on_critic", "off_features", "on_features")


def _states(weights: ImportanceWeights | None) -> Tensor | None:
    return None if weights is None else weights.states_N


def _tokens(weights: ImportanceWeights | None) -> Tensor | None:
    return None if weights is None else weights.tokens_N


def _full_precision(rows: TokenRows) -> torch.autocast:
    """Moments, polar factors and scores in float32, whatever the model computes in."""
    return torch.autocast(rows.hidden_NH.device.type, enabled=False)


def _advantage_share(stream: StreamName, advantage: AdvantageRows | None) -> dict[str, Tensor]:
    if advantage is None:
        return {}
    return {f"{stream}_advantage_distance": advantage.total.detach()}


def _merge(terms: list[ObjectiveOutput]) -> ObjectiveOutput:
    return ObjectiveOutput(
        loss_share=torch.stack([term.loss_share for term in terms]).sum(),
        metric_shares={k: v for term in terms for k, v in term.metric_shares.items()},
        metrics={k: v for term in terms for k, v in term.metrics.items()},
        student_logprobs_N=terms[-1].student_logprobs_N,
    )

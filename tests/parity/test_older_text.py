"""Text of an older student, weighed: means over all 27 responses of a small language.

A batch of one response at a time, its loss and gradient times the probability that the older
student writes it, add up to an exact mean. Up to the cap it must be the mean over the text of the
current student, which the other tests of this folder compare with brute force.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from enumerable_language import EnumerableLanguage
from fakes.fixed_critic import FixedCritic
from token_rows import make_token_rows

from distill_system.config.objective import AmmdConfig, MinillmConfig, TokenMatchingConfig
from distill_system.config.objective.token_losses import ForwardKlConfig
from distill_system.config.objective.token_matching import RelationalConfig
from distill_system.objectives import Importance, build_objective
from distill_system.objectives.ammd import Ammd
from distill_system.objectives.rows import PolicyHeads, TeacherRows
from distill_system.objectives.vocabulary import read_top_k

LANGUAGE = EnumerableLanguage(vocabulary=3, length=3)
V, T, NUM_STATES = LANGUAGE.vocabulary, LANGUAGE.length, len(LANGUAGE.states)
STATE = Importance(kind="state")


class World:
    """Tables of logits of a student, of the older student that writes, and of a teacher.

    top_k: how many of its likeliest tokens the older student samples from, in each state.
    """

    def __init__(self, seed=0, temperature=1.0, top_k=V):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator)

        self.student_SV = draw(NUM_STATES, V).requires_grad_()
        self.older_SV, self.teacher_SV = draw(NUM_STATES, V), draw(NUM_STATES, V)
        self.actions_VE = torch.nn.functional.normalize(draw(V, 2), dim=-1)
        self.critic_FE = draw(V, 2)
        self.temperature = temperature
        self.kept = [row.argsort(descending=True)[:top_k].tolist() for row in self.older_SV]

    def written(self, table_SV, response, temperature=1.0):
        """log pi(y_t | s_t), float64 [T]."""
        states = LANGUAGE.state_rows(response)
        logprobs_SV = (table_SV.detach().double() / temperature).log_softmax(-1)
        return logprobs_SV[states, list(response)]

    def sampled(self, table_SV, response):
        """log pi(y_t | s_t) among the tokens that the older student keeps, float64 [T]."""
        chances = []
        for state, token in zip(LANGUAGE.state_rows(response), response, strict=True):
            weights = (table_SV[state].detach().double() / self.temperature).exp().tolist()
            share = weights[token] / sum(weights[kept] for kept in self.kept[state])
            chances.append(share if token in self.kept[state] else 0.0)
        return torch.tensor(chances, dtype=torch.float64).log()

    def chance(self, table_SV, response):
        return self.sampled(table_SV, response).sum().exp()

    def heads(self):
        return PolicyHeads(
            unembedding_VH=torch.eye(V),
            action_embeddings_VE=self.actions_VE,
            chunk_tokens=2,
            teacher_unembedding_VF=torch.eye(V),
        )

    def rows(self, response, *, known, told=False):
        states = LANGUAGE.state_rows(response)
        logits_TV = self.teacher_SV[states]
        top_k = read_top_k(logits_TV, torch.eye(V), k=2, chunk_tokens=9)
        behaviour_T = self.sampled(self.older_SV, response).float()
        kept = [[*self.kept[state], -1] for state in states]
        kept_TK = torch.tensor(kept, dtype=torch.int32)
        return make_token_rows(
            self.student_SV[states],
            response,
            [T],
            teacher=TeacherRows(
                features_NF=logits_TV,
                expected_embedding_NE=logits_TV.softmax(-1) @ self.actions_VE,
                logprobs_N=self.written(self.teacher_SV, response).float(),
                top_k_ids_NK=top_k[0],
                top_k_logprobs_NK=top_k[1],
            ),
            behaviour_logprobs_N=behaviour_T if known else None,
            behaviour_temperature=self.temperature if known else 1.0,
            behaviour_kept_NK=kept_TK if known and told else None,
        )

    def build(self, config, importance):
        settings = {"max_response_tokens": T, "total_steps": 1, "importance": importance}
        objective = build_objective(config, **settings)
        if isinstance(objective, Ammd):
            objective.on_critic = FixedCritic(self.critic_FE)
        return objective

    def means(self, config, writer_SV, importance=None, *, told=False):
        """Loss, gradient and moment of the critic, averaged over what a table writes.

        told: whether the objective hears which tokens truncation left.
        """
        totals = [torch.zeros((), dtype=torch.float64), torch.zeros(NUM_STATES, V), 0.0]
        for response in LANGUAGE.responses:
            chance = self.chance(writer_SV, response)
            if chance == 0.0:
                continue  # nobody writes it
            objective = self.build(config, importance or Importance())
            rows = self.rows(response, known=importance is not None, told=told)
            off = self.rows((2, 0, 1), known=False) if config.reads("off_policy") else None
            share = objective.compute_loss(self.heads(), off, rows, lambda x: x).loss_share
            [gradient_SV] = torch.autograd.grad(share, self.student_SV)
            critic = objective.on_critic if isinstance(objective, Ammd) else None
            moment = critic.moment_FE if isinstance(critic, FixedCritic) else 0.0
            parts = (share.detach().double(), gradient_SV, moment)
            totals = [total + chance * part for total, part in zip(totals, parts, strict=True)]
        return totals


def _matching(kind, **settings):
    loss = {"type": kind, **settings}
    form = {"type": "token_matching", "on_policy": loss, "on_policy_weight": 1.0}
    return TokenMatchingConfig.model_validate(form)


def _ammd(**settings):
    return AmmdConfig(on_policy_weight=1.0, baseline="none", discount=0.9, **settings)


def _minillm(**settings):
    settings = {"teacher_mixture": 0.0, "normalise_length": False, **settings}
    return MinillmConfig(type="minillm", **settings)


FUTURE = {"policy_gradient": "immediate_plus_future", "normalise_future": False}
STATE_LOSSES = {
    "immediate": _ammd(),
    "log_ratio": _ammd(advantage={"type": "log_ratio", "clip": 2.0}),
    "reverse_kl": _matching("reverse_kl"),
    "forward_kl": _matching("forward_kl"),
    "jsd": _matching("generalized_jsd"),
    "total_variation": _matching("total_variation"),
    "top_k": _matching("top_k", k=2),
    "first": _matching("first", k=2),
}
TOKEN_LOSSES = {
    "sampled": _ammd(moment_target="sampled"),
    "reward_to_go": _ammd(policy_gradient="reward_to_go"),
    "soft_advantage": _ammd(policy_gradient="reward_to_go", advantage={"type": "soft_advantage"}),
    "future": _ammd(**FUTURE),
    "normalised_future": _ammd(policy_gradient="immediate_plus_future"),
    "cross_entropy": _matching("cross_entropy"),
    "interpolated": _matching("interpolated_cross_entropy", schedule="constant"),
    "minillm": _minillm(),
    "minillm_by_length": _minillm(normalise_length=True),
    "minillm_token_mixture": _minillm(teacher_mixture=0.3),
    "minillm_prefix_mixture": _minillm(teacher_mixture=0.3, importance="prefix"),
    "relational": TokenMatchingConfig(
        type="token_matching",
        on_policy=ForwardKlConfig(type="forward_kl"),
        on_policy_weight=1.0,
        terms=(RelationalConfig(type="relational", weight=3.0),),
    ),
}


def _assert_same(means, expected):
    for ours, theirs in zip(means, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("name", [*STATE_LOSSES, *TOKEN_LOSSES])
def test_products_of_ratios_make_older_text_the_students_own(name):
    """Loss, gradient and the critics' moments, of every objective."""
    config, world = (STATE_LOSSES | TOKEN_LOSSES)[name], World()
    exact = world.means(config, world.student_SV)
    _assert_same(world.means(config, world.older_SV, STATE), exact)
    unweighted = world.means(config, world.older_SV)
    assert (unweighted[1] - exact[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", [*STATE_LOSSES, *TOKEN_LOSSES])
def test_truncated_text_is_made_that_of_the_student_among_the_tokens_that_were_left(name):
    """The writer samples two of three tokens; the student itself would keep others."""
    config, world = (STATE_LOSSES | TOKEN_LOSSES)[name], World(seed=8, temperature=1.3, top_k=2)
    exact = world.means(config, world.student_SV)
    _assert_same(world.means(config, world.older_SV, STATE, told=True), exact)


def test_ratios_to_the_whole_distribution_would_lose_the_mass_that_was_cut_off():
    """As importance weights of other trainers have it: each token too light by what was kept."""
    config, world = STATE_LOSSES["reverse_kl"], World(seed=8, temperature=1.3, top_k=2)
    exact = world.means(config, world.student_SV)[0]
    blind = world.means(config, world.older_SV, STATE)[0]
    assert float(blind) < 0.95 * float(exact)


@pytest.mark.parametrize("name", ["immediate", "log_ratio", "reverse_kl", "total_variation"])
def test_ratios_are_taken_at_the_temperature_that_the_text_was_sampled_at(name):
    world = World(seed=1, temperature=1.7)
    exact = world.means(STATE_LOSSES[name], world.student_SV)
    _assert_same(world.means(STATE_LOSSES[name], world.older_SV, STATE), exact)


def test_a_loss_at_another_temperature_is_weighed_by_the_same_ratios():
    config = STATE_LOSSES["reverse_kl"].model_copy(update={"temperature": 2.0})
    for temperature in (1.0, 1.7, 2.0):
        world = World(seed=2, temperature=temperature)
        exact = world.means(config, world.student_SV)
        _assert_same(world.means(config, world.older_SV, STATE), exact)


@pytest.mark.parametrize("name", STATE_LOSSES)
def test_ratios_of_single_tokens_leave_losses_of_states_as_they_are_in_the_mean(name):
    world, config = World(seed=3), STATE_LOSSES[name]
    weighed = world.means(config, world.older_SV, Importance(kind="token"))
    _assert_same(weighed, world.means(config, world.older_SV))


def test_ratios_of_single_tokens_correct_the_token_and_not_how_its_state_was_reached():
    """In the first state there is nothing before the token: its ratio is all that is to correct."""
    world, config = World(seed=4), TOKEN_LOSSES["interpolated"]
    ours = world.means(config, world.older_SV, Importance(kind="token"))[1]
    exact = world.means(config, world.student_SV)[1]
    torch.testing.assert_close(ours[0], exact[0], atol=2e-6, rtol=1e-4)
    unweighted = world.means(config, world.older_SV)[1]
    assert (unweighted - exact)[0].abs().max() > 1e-2
    assert (ours - exact)[1:].abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["token", "state"])
@pytest.mark.parametrize("cap", [1.0, 1.3])
@pytest.mark.parametrize("name", ["reverse_kl", "cross_entropy"])
def test_a_cap_leaves_the_bias_that_the_formula_says(kind, cap, name):
    """The loss by hand: sum over responses and tokens of mu(y) min(cap, ratios) l_t / T."""
    world = World(seed=5)
    teacher_SV, student_SV = (
        table.detach().double().log_softmax(-1) for table in (world.teacher_SV, world.student_SV)
    )
    divergence_S = (student_SV.exp() * (student_SV - teacher_SV)).sum(-1)
    expected = 0.0
    for response in LANGUAGE.responses:
        own = world.written(world.student_SV, response).tolist()
        other = world.written(world.older_SV, response).tolist()
        for t, state in enumerate(LANGUAGE.state_rows(response)):
            inclusive = kind == "token" or name == "cross_entropy"
            first, last = (t if kind == "token" else 0), t + inclusive
            ratio = math.exp(sum(own[first:last]) - sum(other[first:last]))
            loss = -own[t] if name == "cross_entropy" else float(divergence_S[state])
            expected += math.exp(sum(other)) * min(cap, ratio) * loss / T
    config = (STATE_LOSSES | TOKEN_LOSSES)[name]
    loss = world.means(config, world.older_SV, Importance(kind=kind, cap=cap))[0]
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(loss) != pytest.approx(
        float(world.means(config, world.older_SV, Importance(kind=kind))[0]), rel=1e-3
    )


def test_a_baseline_of_the_other_response_stays_unbiased_when_returns_are_weighed():
    """Pairs of responses: the mean gradient is that of pairs of the student's own."""
    world = World(seed=6)
    config = TOKEN_LOSSES["reward_to_go"].model_copy(update={"baseline": "leave_one_out"})
    exact = _mean_over_pairs(world, config, world.student_SV, None)
    ours = _mean_over_pairs(world, config, world.older_SV, STATE)
    torch.testing.assert_close(ours, exact, atol=5e-6, rtol=1e-3)


def _mean_over_pairs(world, config, writer_SV, importance):
    mean_SV = torch.zeros(NUM_STATES, V)
    for first in LANGUAGE.responses:
        for second in LANGUAGE.responses:
            pair = [world.rows(r, known=importance is not None) for r in (first, second)]
            objective = world.build(config, importance or Importance())
            share = objective.compute_loss(world.heads(), None, _join(pair), lambda x: x).loss_share
            [gradient_SV] = torch.autograd.grad(share, world.student_SV)
            chance = world.chance(writer_SV, first) * world.chance(writer_SV, second)
            mean_SV += chance.float() * gradient_SV
    return mean_SV


def _join(pair):
    def cat(name, of=lambda rows: rows):
        parts = [getattr(of(rows), name) for rows in pair]
        return None if parts[0] is None else torch.cat(parts)

    teacher = TeacherRows(
        features_NF=cat("features_NF", lambda rows: rows.teacher),
        expected_embedding_NE=cat("expected_embedding_NE", lambda rows: rows.teacher),
        logprobs_N=cat("logprobs_N", lambda rows: rows.teacher),
    )
    return replace(
        pair[0],
        hidden_NH=cat("hidden_NH"),
        token_ids_N=cat("token_ids_N"),
        sequence_ids_N=torch.arange(2).repeat_interleave(T),
        positions_N=cat("positions_N"),
        num_global_tokens=2 * T,
        num_global_sequences=2,
        teacher=teacher,
        behaviour_logprobs_N=cat("behaviour_logprobs_N"),
    )

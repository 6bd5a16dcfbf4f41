"""Policy-gradient estimators against the exact gradient of a language of 625 responses.

The language has vocabulary 5 and length 4. A student is a table of logits, one row a state, so an
estimator's mean over every response is the sum of each row's gradient times the probability of the
response that it belongs to: one call of the code under test, and no sampling error. Everything it
is compared with is differentiated by autograd from sums over all responses.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from enumerable_language import EnumerableLanguage
from fakes.fixed_critic import FixedCritic
from token_rows import make_token_rows

from distill_system.config.objective import AmmdConfig, MinillmConfig
from distill_system.objectives import build_objective
from distill_system.objectives.ammd import Ammd
from distill_system.objectives.rows import PolicyHeads, TeacherRows

LANGUAGE = EnumerableLanguage(vocabulary=5, length=4)
V, T = LANGUAGE.vocabulary, LANGUAGE.length
STATES = torch.tensor([LANGUAGE.state_rows(response) for response in LANGUAGE.responses])
TOKENS = torch.tensor(LANGUAGE.responses)
NUM_STATES, NUM_RESPONSES = len(LANGUAGE.states), len(LANGUAGE.responses)


class World:
    """Tables of logits of a student and of a teacher, and a critic in the teacher's features."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator)

        self.student_SV = draw(NUM_STATES, V).requires_grad_()
        self.teacher_SV = draw(NUM_STATES, V)
        self.actions_VE = torch.nn.functional.normalize(draw(V, 3), dim=-1)
        self.critic_FE = draw(V, 3)

    def response_logprobs(self, table_SV):
        """log pi(y_t | s_t) of every response, [R, T]."""
        return table_SV.log_softmax(-1)[STATES].gather(2, TOKENS[..., None]).squeeze(2)

    def values_SV(self):
        """f of every state and token: g(h*)^T phi e(y)."""
        features_SV = torch.nn.functional.normalize(self.teacher_SV, dim=-1)
        return features_SV @ self.critic_FE @ self.actions_VE.T

    def heads(self):
        return PolicyHeads(
            unembedding_VH=torch.eye(V),
            action_embeddings_VE=self.actions_VE,
            chunk_tokens=700,
            teacher_unembedding_VF=torch.eye(V),
        )

    def rows(self, *, tokens_of_a_response):
        """Every response once; hidden states are a leaf of their own, the logits of each state."""
        states_N = STATES.reshape(-1)
        return make_token_rows(
            self.student_SV.detach()[states_N].requires_grad_(),
            TOKENS.reshape(-1),
            [T] * NUM_RESPONSES,
            num_global_tokens=tokens_of_a_response,
            num_global_sequences=1,
            teacher=TeacherRows(
                features_NF=self.teacher_SV[states_N],
                expected_embedding_NE=self.teacher_SV.softmax(-1)[states_N] @ self.actions_VE,
                logprobs_N=self.response_logprobs(self.teacher_SV).reshape(-1),
            ),
        )

    def expected_gradient(self, objective, authors):
        """Mean of the estimator, each stream's responses weighed by their author's table."""
        streams = {name: self.rows(tokens_of_a_response=T) for name in authors}
        objective.compute_loss(
            self.heads(), streams.get("off_policy"), streams.get("on_policy"), lambda x: x
        ).loss_share.backward()
        mean_SV = torch.zeros(NUM_STATES, V)
        for name, table_SV in authors.items():
            weights_R = self.response_logprobs(table_SV).sum(1).exp().detach()
            weighted_NV = streams[name].hidden_NH.grad * weights_R.repeat_interleave(T)[:, None]
            mean_SV.index_add_(0, STATES.reshape(-1), weighted_NV)
        return mean_SV

    def exact_gradient(self, costs_RT, *, discount=1.0):
        """d/dtheta of the mean over the student's responses of sum_t gamma^t c_t / T."""
        discounts_T = discount ** torch.arange(T)
        probabilities_R = self.response_logprobs(self.student_SV).sum(1).exp()
        total = (probabilities_R * (costs_RT * discounts_T).sum(1)).sum() / T
        return torch.autograd.grad(total, self.student_SV)[0]

    def ammd(self, **settings):
        config = AmmdConfig(on_policy_weight=1.0, baseline="none", **settings)
        objective = Ammd(config, max_response_tokens=T)
        objective.on_critic = FixedCritic(self.critic_FE)
        return objective


FORMS: dict[str, dict[str, Any]] = {
    "reward_to_go": {"policy_gradient": "reward_to_go"},
    "immediate_plus_future": {
        "policy_gradient": "immediate_plus_future",
        "future_weight": 1.0,
        "normalise_future": False,
    },
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", [0, 1])
def test_ammds_policy_gradients_are_exact_in_expectation(form, seed):
    world = World(seed)
    values_SV, teacher_SV = world.values_SV(), world.teacher_SV.softmax(-1)
    costs_RT = (teacher_SV * values_SV).sum(-1)[STATES] - values_SV[STATES, TOKENS]
    objective = world.ammd(discount=0.9, **FORMS[form])
    torch.testing.assert_close(
        world.expected_gradient(objective, {"on_policy": world.student_SV}),
        world.exact_gradient(costs_RT, discount=0.9),
        atol=2e-6,
        rtol=1e-4,
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["soft_advantage", "log_ratio"])
def test_the_widened_class_has_exact_policy_gradients_too(form, kind):
    world, clip, weight = World(2), 1.5, 0.7
    teacher_SV, student_SV = (
        table.log_softmax(-1).detach() for table in (world.teacher_SV, world.student_SV)
    )
    if kind == "soft_advantage":
        feature_SV = teacher_SV.clamp(min=-clip) / clip
        gap_S = ((teacher_SV.exp() - student_SV.exp()) * feature_SV).sum(-1)
        feature_SV = gap_S.sign()[:, None] * feature_SV
    else:
        feature_SV = (teacher_SV - student_SV).clamp(-clip, clip) / clip
    values_SV = world.values_SV() + weight * feature_SV
    costs_RT = (teacher_SV.exp() * values_SV).sum(-1)[STATES] - values_SV[STATES, TOKENS]
    objective = world.ammd(
        discount=0.9, advantage={"type": kind, "clip": clip, "weight": weight}, **FORMS[form]
    )
    torch.testing.assert_close(
        world.expected_gradient(objective, {"on_policy": world.student_SV}),
        world.exact_gradient(costs_RT, discount=0.9),
        atol=2e-6,
        rtol=1e-4,
    )


def _minillm(**settings):
    config = MinillmConfig(type="minillm", normalise_length=False, **settings)
    return build_objective(config, max_response_tokens=T, total_steps=1)


def _reverse_kl_gradient(world):
    """d/dtheta of KL(pi_theta || pi*) over whole responses, a token."""
    student_R, teacher_R = (
        world.response_logprobs(table).sum(1) for table in (world.student_SV, world.teacher_SV)
    )
    total = (student_R.exp() * (student_R - teacher_R)).sum() / T
    return torch.autograd.grad(total, world.student_SV)[0]


@pytest.mark.parametrize("seed", [0, 1])
def test_minillm_on_the_students_own_text_is_the_gradient_of_the_reverse_kl(seed):
    world = World(seed)
    torch.testing.assert_close(
        world.expected_gradient(_minillm(teacher_mixture=0.0), {"on_policy": world.student_SV}),
        _reverse_kl_gradient(world),
        atol=2e-6,
        rtol=1e-4,
    )


def _mixture_gradient(world, importance):
    """The streams' shares 0.3 and 0.7 are the objective's own business: authors weigh 1 each."""
    objective = _minillm(teacher_mixture=0.3, importance=importance)
    authors = {"off_policy": world.teacher_SV, "on_policy": world.student_SV}
    return world.expected_gradient(objective, authors)


def test_prefix_importance_weights_make_the_mixture_exact_and_token_weights_do_not():
    world = World(3)
    exact_SV = _reverse_kl_gradient(world)
    torch.testing.assert_close(_mixture_gradient(world, "prefix"), exact_SV, atol=2e-6, rtol=1e-4)
    assert (_mixture_gradient(world, "token") - exact_SV).abs().max() > 1e-2


def test_normalising_the_length_leaves_the_single_step_part_alone_at_the_last_token():
    """The last token has no future: its state's gradient is exact either way, others' are not."""
    world = World(4)
    exact_SV = _reverse_kl_gradient(world)
    config = MinillmConfig(type="minillm", teacher_mixture=0.0)
    objective = build_objective(config, max_response_tokens=T, total_steps=1)
    ours_SV = world.expected_gradient(objective, {"on_policy": world.student_SV})
    last = torch.tensor([len(state) == T - 1 for state in LANGUAGE.states])
    torch.testing.assert_close(ours_SV[last], exact_SV[last], atol=2e-6, rtol=1e-4)
    assert (ours_SV - exact_SV)[~last].abs().max() > 1e-2


def test_sampled_responses_agree_with_the_exact_gradient_within_their_error():
    """What a run does: draw responses, average; 40 batches give the standard error."""
    world = World(5)
    exact_SV = _reverse_kl_gradient(world)
    generator = torch.Generator().manual_seed(6)
    probabilities_R = world.response_logprobs(world.student_SV).sum(1).exp().detach()
    means = []
    for _ in range(40):
        drawn = torch.multinomial(probabilities_R, 500, replacement=True, generator=generator)
        means.append(_batch_gradient(world, drawn))
    means_KSV = torch.stack(means)
    error_SV = means_KSV.std(0) / 40**0.5
    seen = error_SV > 1e-4  # states that the student reaches often enough to judge
    assert seen.sum() > 50
    deviations = ((means_KSV.mean(0) - exact_SV) / error_SV)[seen]
    assert deviations.abs().max() < 5.0
    assert deviations.square().mean() < 2.0


def _batch_gradient(world, drawn):
    states_N, tokens_N = STATES[drawn].reshape(-1), TOKENS[drawn].reshape(-1)
    rows = make_token_rows(
        world.student_SV[states_N],
        tokens_N,
        [T] * len(drawn),
        teacher=TeacherRows(
            features_NF=world.teacher_SV[states_N],
            logprobs_N=world.response_logprobs(world.teacher_SV)[drawn].reshape(-1),
        ),
    )
    loss = _minillm(teacher_mixture=0.0).compute_loss(world.heads(), None, rows, lambda x: x)
    return torch.autograd.grad(loss.loss_share, world.student_SV)[0]

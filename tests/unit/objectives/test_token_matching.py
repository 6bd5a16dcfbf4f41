"""Losses on two streams, their terms, and the way through a run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from two_policies import TwoPolicies

from distill_system.config.objective import TokenMatchingConfig
from distill_system.config.objective.needs import DISTRIBUTION, NOTHING
from distill_system.config.objective.token_losses import (
    CrossEntropyConfig,
    ForwardKlConfig,
    InterpolatedCrossEntropyConfig,
    ReverseKlConfig,
)
from distill_system.config.objective.token_matching import HiddenMatchingConfig, RelationalConfig
from distill_system.objectives import build_objective
from distill_system.objectives.terms import build_term

CROSS_ENTROPY = CrossEntropyConfig(type="cross_entropy")
FORWARD_KL = ForwardKlConfig(type="forward_kl")
REVERSE_KL = ReverseKlConfig(type="reverse_kl")
TERMS = (
    HiddenMatchingConfig(type="hidden_matching", weight=0.5),
    RelationalConfig(type="relational", weight=2.0),
)


def identity(tensor):
    return tensor


def matching(total_steps=10, **settings):
    config = TokenMatchingConfig(type="token_matching", **settings)
    return build_objective(config, max_response_tokens=6, total_steps=total_steps)


def loss_of(objective, off_policy=None, on_policy=None, *, policies=None):
    heads = (policies or TwoPolicies()).heads()
    return objective.compute_loss(heads, off_policy, on_policy, identity)


def stream_loss(config, policies):
    return float(policies.read(config).values.mean())


@pytest.mark.parametrize("beta", [0.25, 0.9])
def test_streams_are_mixed_by_beta(beta):
    policies = TwoPolicies()
    objective = matching(off_policy=FORWARD_KL, on_policy=REVERSE_KL, on_policy_weight=beta)
    output = loss_of(objective, policies.rows(), policies.rows())
    off, on = stream_loss(FORWARD_KL, policies), stream_loss(REVERSE_KL, policies)
    assert float(output.loss_share.detach()) == pytest.approx(
        (1 - beta) * off + beta * on, rel=1e-5
    )
    assert float(output.metric_shares["off_policy_loss"]) == pytest.approx(off, rel=1e-5)
    assert float(output.metric_shares["on_policy_loss"]) == pytest.approx(on, rel=1e-5)


def test_a_stream_alone_has_all_the_weight():
    policies = TwoPolicies()
    objective = matching(off_policy=FORWARD_KL, on_policy=REVERSE_KL, on_policy_weight=0.3)
    output = loss_of(objective, None, policies.rows())
    assert float(output.loss_share.detach()) == pytest.approx(
        stream_loss(REVERSE_KL, policies), rel=1e-5
    )


@pytest.mark.parametrize(("beta", "read"), [(0.0, "off_policy"), (1.0, "on_policy")])
def test_a_stream_without_weight_is_not_read(beta, read):
    policies = TwoPolicies()
    losses = {"off_policy": FORWARD_KL, "on_policy": REVERSE_KL}
    objective = matching(**losses, on_policy_weight=beta)
    assert [stream for stream in losses if objective.config.reads(stream)] == [read]
    output = loss_of(objective, policies.rows(), policies.rows())
    loss = float(output.loss_share.detach())
    assert loss == pytest.approx(stream_loss(losses[read], policies), rel=1e-5)
    assert "off_policy_loss" not in output.metric_shares or read == "off_policy"


def test_the_teachers_distribution_is_rebuilt_for_streams_that_are_read_alone():
    config = TokenMatchingConfig(
        type="token_matching",
        off_policy=CROSS_ENTROPY,
        on_policy=REVERSE_KL,
        on_policy_weight=0.0,
    )
    assert not config.needs_teacher_distribution


@pytest.mark.parametrize(("name", "beta"), [("off_policy", 0.0), ("on_policy", 1.0)])
def test_a_stream_without_a_loss_is_not_read_though_it_is_there(name, beta):
    policies, other = TwoPolicies(), TwoPolicies(seed=1)
    streams = {"off_policy": other.rows(), "on_policy": other.rows(), name: policies.rows()}
    objective = matching(**{name: FORWARD_KL}, on_policy_weight=beta)
    output = loss_of(objective, **streams)
    expected = stream_loss(FORWARD_KL, policies)
    assert float(output.loss_share.detach()) == pytest.approx(expected, rel=1e-5)
    losses = [metric for metric in output.metric_shares if metric.endswith("_loss")]
    assert losses == [f"{name}_loss"]


def test_without_a_configuration_it_is_the_next_token_loss_on_data_and_asks_no_teacher():
    policies = TwoPolicies()
    objective = build_objective(None, max_response_tokens=6, total_steps=10)
    heads = replace(policies.heads(), teacher_unembedding_VF=None)
    rows = replace(policies.rows(), teacher=None)
    loss = objective.compute_loss(heads, rows, None, identity).loss_share
    expected = stream_loss(CROSS_ENTROPY, policies)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_the_cross_entropy_of_the_off_policy_text_is_told_whatever_its_loss():
    policies, other = TwoPolicies(), TwoPolicies(seed=1)
    objective = matching(off_policy=FORWARD_KL, on_policy=REVERSE_KL)
    both = loss_of(objective, policies.rows(), other.rows()).metric_shares
    assert float(both["cross_entropy"]) == pytest.approx(
        stream_loss(CROSS_ENTROPY, policies), rel=1e-5
    )
    assert "cross_entropy" not in loss_of(objective, None, other.rows()).metric_shares


def test_terms_are_added_to_each_stream_with_the_weight_of_both():
    policies = TwoPolicies()
    plain, extended = (
        matching(off_policy=FORWARD_KL, on_policy=CROSS_ENTROPY, on_policy_weight=0.25, terms=terms)
        for terms in ((), TERMS)
    )
    before = loss_of(plain, policies.rows(), policies.rows())
    after = loss_of(extended, policies.rows(), policies.rows())
    # both streams carry the same rows here, so that their weights add up to 1
    added = sum(
        term.weight * float(build_term(term).compute_loss(policies.rows(), identity))
        for term in TERMS
    )
    assert float(after.loss_share - before.loss_share.detach()) == pytest.approx(added, rel=1e-4)
    assert set(after.metric_shares) - set(before.metric_shares) == {
        f"{stream}_{name}"
        for stream in ("off_policy", "on_policy")
        for name in ("hidden_matching", "relational")
    }


def test_two_terms_of_one_type_add_up_in_the_loss_and_under_their_one_name():
    rows = TwoPolicies().rows()
    terms = [
        HiddenMatchingConfig(type="hidden_matching", distance="squared", weight=0.5),
        HiddenMatchingConfig(type="hidden_matching", distance="cosine", weight=3.0),
    ]
    alone = [term.weight * float(build_term(term).compute_loss(rows, identity)) for term in terms]
    assert min(alone) > 0.01
    plain, extended = (
        loss_of(matching(off_policy=FORWARD_KL, on_policy_weight=0.0, terms=each), rows)
        for each in ((), tuple(terms))
    )
    assert float(extended.metric_shares["off_policy_hidden_matching"]) == pytest.approx(
        sum(alone), rel=1e-5
    )
    added = extended.loss_share - plain.loss_share
    assert float(added.detach()) == pytest.approx(sum(alone), rel=1e-4)


def test_terms_reach_the_hidden_states():
    hidden = TwoPolicies().hidden.clone().requires_grad_()
    policies = TwoPolicies(equal=True)
    rows = policies.rows(hidden=hidden)
    objective = matching(off_policy=FORWARD_KL, on_policy_weight=0.0, terms=TERMS)
    loss_of(objective, rows, policies=policies).loss_share.backward()
    plain = TwoPolicies(equal=True).read(FORWARD_KL).hidden_gradient
    assert plain.abs().max() < 1e-5 < hidden.grad.abs().max()


def test_terms_need_the_teachers_states_of_each_stream_that_is_read():
    config = TokenMatchingConfig(
        type="token_matching", off_policy=CROSS_ENTROPY, on_policy_weight=0.0, terms=TERMS
    )
    assert config.teacher_needs("off_policy") == DISTRIBUTION
    assert config.teacher_needs("on_policy") == NOTHING
    assert not config.needs_teacher_distribution


def growing(total_steps):
    loss = InterpolatedCrossEntropyConfig(
        type="interpolated_cross_entropy", teacher_weight=1.0, schedule="linear"
    )
    return matching(total_steps, off_policy=loss, on_policy_weight=0.0)


def test_a_schedule_goes_from_the_first_step_to_the_last_and_no_further():
    policies = TwoPolicies()
    truth = stream_loss(CROSS_ENTROPY, policies)
    teacher = -(policies.teacher() * _student(policies).log()).sum(-1).mean()
    objective = growing(total_steps=4)
    shares = [0.25, 0.5, 0.75, 1.0, 1.0]
    losses = [float(loss_of(objective, policies.rows()).loss_share.detach()) for _ in shares]
    expected = [(1 - w) * truth + w * float(teacher) for w in shares]
    assert losses == pytest.approx(expected, rel=1e-5)


def test_a_resumed_run_takes_up_schedule_and_averages_where_they_were():
    policies = TwoPolicies()
    loss = InterpolatedCrossEntropyConfig(type="interpolated_cross_entropy")
    run, resumed = (
        matching(4, off_policy=loss, on_policy=REVERSE_KL, terms=TERMS) for _ in range(2)
    )
    loss_of(run, policies.rows(), policies.rows())
    resumed.load_state_dict(run.state_dict())
    other = TwoPolicies(seed=1)
    results = [
        float(loss_of(objective, other.rows(), policies.rows()).loss_share.detach())
        for objective in (run, resumed)
    ]
    assert results[0] == results[1]
    assert all(tensor.dtype == torch.float32 for tensor in run.state_dict().values())


def _student(policies):
    return (policies.hidden.double() @ policies.unembedding.double().T).softmax(-1)

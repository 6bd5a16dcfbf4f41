"""AMMD's options, alone and together: distances, bounds, unbiased baselines, kept state."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from fakes.fixed_critic import FixedCritic
from hypothesis import given, settings
from hypothesis import strategies as st
from token_rows import make_token_rows

from distill_system.config.objective import AmmdConfig
from distill_system.config.objective.ammd import ClosedFormCritic, GradientCritic
from distill_system.objectives.ammd import Ammd
from distill_system.objectives.rows import PolicyHeads, TeacherRows

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "frobenius": {"critic": ClosedFormCritic(ball="frobenius")},
    "averaged": {"critic": ClosedFormCritic(average=0.5)},
    "ascent": {"critic": GradientCritic(type="gradient_ascent", ball="spectral", steps=3)},
    "whitened": {"features": {"type": "whitened"}},
    "projected": {"features": {"type": "projected", "dimension": 3}},
    "soft_advantage": {"advantage": {"type": "soft_advantage", "weight": 0.5}},
    "log_ratio": {"advantage": {"type": "log_ratio", "clip": 2.0, "weight": 2.0}},
    "one_stream": {"advantage": {"type": "log_ratio", "streams": ("on_policy",)}},
    "reward_to_go": {"policy_gradient": "reward_to_go", "baseline": "leave_one_out"},
    "everything": {
        "critic": ClosedFormCritic(average=0.3, radius=2.0),
        "features": {"type": "whitened"},
        "advantage": {"type": "soft_advantage"},
        "policy_gradient": "immediate_plus_future",
        "baseline": "leave_one_out",
        "discount": 0.9,
        "language_model_weight": 0.1,
    },
}


def identity(tensor):
    return tensor


class Streams:
    """Rows whose hidden states are logits: the student's and the teacher's, [N, V] each."""

    def __init__(self, seed, *, vocabulary=7, lengths=(3, 1, 4, 4), scale=2.0, equal=False):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator)

        num_tokens = sum(lengths)
        self.lengths, self.vocabulary = lengths, vocabulary
        frozen = torch.randn(vocabulary, 4, generator=torch.Generator().manual_seed(99))
        self.actions_VE = torch.nn.functional.normalize(frozen, dim=-1)
        self.teacher = {name: scale * draw(num_tokens, vocabulary) for name in ("off", "on")}
        self.student = {
            name: (logits.clone() if equal else scale * draw(num_tokens, vocabulary))
            for name, logits in self.teacher.items()
        }
        self.tokens_N = torch.randint(vocabulary, (num_tokens,), generator=generator)

    def heads(self):
        return PolicyHeads(
            unembedding_VH=torch.eye(self.vocabulary),
            action_embeddings_VE=self.actions_VE,
            chunk_tokens=5,
            teacher_unembedding_VF=torch.eye(self.vocabulary),
        )

    def rows(self, name):
        return make_token_rows(
            self.student[name].requires_grad_(),
            self.tokens_N,
            self.lengths,
            teacher=TeacherRows(
                features_NF=self.teacher[name],
                expected_embedding_NE=self.teacher[name].softmax(-1) @ self.actions_VE,
            ),
        )

    def play(self, objective):
        return objective.compute_loss(self.heads(), self.rows("off"), self.rows("on"), identity)

    def total_variation(self, name):
        gap = self.student[name].softmax(-1) - self.teacher[name].softmax(-1)
        return 0.5 * float(gap.detach().abs().sum(-1).mean())


def _ammd(**options):
    return Ammd(AmmdConfig(**options), max_response_tokens=4)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_both_distances_are_reported_and_everything_is_zero_at_student_equals_teacher(options):
    streams = Streams(0, equal=True)
    output = streams.play(_ammd(**options))
    assert set(output.metrics) == {"off_policy_distance", "on_policy_distance"}
    assert output.metrics == pytest.approx(dict.fromkeys(output.metrics, 0.0), abs=1e-6)
    gaps = {k: float(v) for k, v in output.metric_shares.items() if k.endswith("_distance")}
    assert gaps == pytest.approx(dict.fromkeys(gaps, 0.0), abs=1e-6)
    if options.get("language_model_weight", 0.0) == 0.0:
        output.loss_share.backward()
        for name in ("off", "on"):
            assert float(streams.student[name].grad.abs().max()) < 1e-6


@settings(max_examples=60, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.01, 0.5, 3.0, 20.0]),
    name=st.sampled_from(sorted(OPTIONS)),
)
def test_distances_are_bounded_by_total_variation_whatever_the_options(seed, scale, name):
    streams, options = Streams(seed, scale=scale), OPTIONS[name]
    objective = _ammd(**options)
    radius = objective.config.critic.radius
    weight = objective.config.advantage.weight
    output = streams.play(objective)
    for stream in ("off", "on"):
        bound = 2.0 * streams.total_variation(stream) + 1e-5
        assert output.metrics[f"{stream}_policy_distance"] <= radius * bound
        extra = output.metric_shares.get(f"{stream}_policy_advantage_distance")
        if extra is not None:
            assert -1e-6 <= float(extra) <= weight * bound


def test_the_extra_feature_has_its_distance_on_the_streams_that_have_the_feature():
    both = Streams(0).play(_ammd(advantage={"type": "soft_advantage"})).metric_shares
    one = Streams(0).play(_ammd(**OPTIONS["one_stream"])).metric_shares
    assert {"off_policy_advantage_distance", "on_policy_advantage_distance"} <= set(both)
    assert "on_policy_advantage_distance" in one
    assert "off_policy_advantage_distance" not in one


@pytest.mark.parametrize("stream", ["off", "on"])
@pytest.mark.parametrize("ball", ["spectral", "frobenius"])
def test_the_widened_distances_gradient_is_that_of_the_distance_itself(stream, ball):
    """Envelope theorem: phi and kappa are held fixed while the distance is differentiated."""
    streams, weight, clip = Streams(1), 0.7, 1.5
    objective = _ammd(
        on_policy_weight=float(stream == "on"),
        critic=ClosedFormCritic(ball=ball),
        advantage={"type": "soft_advantage", "weight": weight, "clip": clip},
    )
    output = streams.play(objective)
    output.loss_share.backward()

    logits = streams.student[stream].detach().clone().requires_grad_()
    teacher = streams.teacher[stream].softmax(-1)
    hidden = streams.teacher[stream] if stream == "on" else logits.detach()
    features = torch.nn.functional.normalize(hidden, dim=-1)
    policy_gap = teacher - logits.softmax(-1)
    moment = features.T @ (policy_gap @ streams.actions_VE) / len(logits)
    distance = torch.linalg.svdvals(moment).sum() if ball == "spectral" else moment.norm()
    feature = (teacher.log() / clip).clamp(min=-1.0)
    distance = distance + weight * (policy_gap * feature).sum(-1).abs().mean()
    [exact] = torch.autograd.grad(distance, logits)
    torch.testing.assert_close(streams.student[stream].grad, exact, atol=1e-6, rtol=1e-3)
    assert float(output.loss_share.detach()) == pytest.approx(float(distance.detach()), rel=1e-4)


def test_the_log_ratio_is_held_fixed_while_its_gap_is_differentiated():
    streams, weight, clip = Streams(2), 0.7, 1.5
    options = {"type": "log_ratio", "weight": weight, "clip": clip}
    with_feature, without = (
        torch.autograd.grad(
            streams.play(_ammd(on_policy_weight=1.0, **extra)).loss_share, streams.student["on"]
        )[0]
        for extra in ({"advantage": options}, {})
    )
    logits = streams.student["on"].detach().clone().requires_grad_()
    teacher, student = (x.log_softmax(-1) for x in (streams.teacher["on"], logits))
    ratio = (teacher - student.detach()).clamp(-clip, clip) / clip
    gap = ((teacher.exp() - student.exp()) * ratio).sum(-1).mean()
    [exact] = torch.autograd.grad(weight * gap, logits)
    torch.testing.assert_close(with_feature - without, exact, atol=1e-6, rtol=1e-3)


def test_a_constant_added_to_the_soft_advantage_would_change_nothing():
    """Why it is not centred: a term of the state has the same mean under both policies."""
    streams = Streams(3)
    teacher, student = (
        x["on"].log_softmax(-1).detach() for x in (streams.teacher, streams.student)
    )
    plain = ((teacher.exp() - student.exp()) * teacher).sum(-1)
    centred = ((teacher.exp() - student.exp()) * (teacher - teacher.mean(-1, True))).sum(-1)
    torch.testing.assert_close(plain, centred, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["averaged", "ascent", "whitened", "everything"])
def test_a_resumed_objective_plays_on_as_the_unbroken_one(name):
    unbroken, resumed = _ammd(**OPTIONS[name]), _ammd(**OPTIONS[name])
    for seed in range(3):
        Streams(seed).play(unbroken)
    state = unbroken.state_dict()
    assert state
    assert all(value.dtype is torch.float32 for value in state.values())
    resumed.load_state_dict({key: value.clone() for key, value in state.items()})
    losses = [float(Streams(7).play(ours).loss_share.detach()) for ours in (unbroken, resumed)]
    assert losses[0] == losses[1]
    fresh = float(Streams(7).play(_ammd(**OPTIONS[name])).loss_share.detach())
    assert fresh != pytest.approx(losses[0], rel=1e-6)


def test_an_averaged_critic_answers_the_mean_moment_and_is_scored_on_this_steps():
    """One step of moment M, one of -M at decay 0.5: the mean is -M/3, the answer that to -M."""
    critic = _ammd(critic=ClosedFormCritic(average=0.5)).off_critic
    moment = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    first = critic.respond(moment)
    torch.testing.assert_close(critic.respond(-moment), -first, atol=1e-5, rtol=1e-5)
    # A step of M/5 brings the sum to -M/8 + M/10, which still points down: the critic lags.
    torch.testing.assert_close(critic.respond(moment / 5), -first, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["log_ratio", "soft_advantage"])
def test_a_written_tokens_cost_of_the_extra_feature_is_part_of_the_return(kind):
    """With a critic of zero it is the whole return: w kappa (E_{pi*} l - l(y_t)), discounted."""
    streams, weight, clip, discount = Streams(4), 0.7, 1.5, 0.9
    objective = _ammd(
        on_policy_weight=1.0,
        policy_gradient="reward_to_go",
        discount=discount,
        advantage={"type": kind, "weight": weight, "clip": clip},
    )
    objective.on_critic = FixedCritic(torch.zeros(streams.vocabulary, 4))
    output = streams.play(objective)
    teacher, student = (
        x["on"].detach().log_softmax(-1) for x in (streams.teacher, streams.student)
    )
    if kind == "log_ratio":
        feature = (teacher - student).clamp(-clip, clip) / clip
        signs = torch.ones(len(teacher))
    else:
        feature = teacher.clamp(min=-clip) / clip
        signs = ((teacher.exp() - student.exp()) * feature).sum(-1).sign()
    written = feature.gather(1, streams.tokens_N[:, None])[:, 0]
    costs = weight * signs * ((teacher.exp() * feature).sum(-1) - written)
    places = torch.cat([torch.arange(length) for length in streams.lengths])
    expected = -float((discount**places * costs).sum()) / len(streams.lengths)
    assert abs(expected) > 0.01
    assert float(output.metric_shares["reward_to_go"]) == pytest.approx(expected, rel=1e-4)


def test_the_extra_features_expected_cost_is_part_of_what_a_token_is_blamed_for_later():
    """With a critic of zero the loss is its gaps, and log pi(y_t) times the gaps after t."""
    streams, weight, clip, discount = Streams(4), 0.7, 1.5, 0.9
    objective = _ammd(
        on_policy_weight=1.0,
        policy_gradient="immediate_plus_future",
        baseline="none",
        future_weight=0.5,
        normalise_future=False,
        discount=discount,
        advantage={"type": "log_ratio", "weight": weight, "clip": clip},
    )
    objective.on_critic = FixedCritic(torch.zeros(streams.vocabulary, 4))
    loss = float(streams.play(objective).loss_share.detach())
    teacher, student = (
        x["on"].detach().log_softmax(-1) for x in (streams.teacher, streams.student)
    )
    feature = (teacher - student).clamp(-clip, clip) / clip
    gaps = (weight * ((teacher.exp() - student.exp()) * feature).sum(-1)).tolist()
    written = student.gather(1, streams.tokens_N[:, None])[:, 0].tolist()
    expected, start = 0.0, 0
    for length in streams.lengths:
        for t in range(length):
            later = sum(discount ** (k - t) * gaps[start + k] for k in range(t + 1, length))
            expected += discount**t * (gaps[start + t] + 0.5 * written[start + t] * later)
        start += length
    assert loss == pytest.approx(expected / start, rel=1e-4)


@pytest.mark.parametrize(
    ("baseline", "share_of_exact"), [("none", 1.0), ("leave_one_out", 1.0), ("position", 0.5)]
)
def test_leave_one_out_is_unbiased_over_every_pair_of_responses(baseline, share_of_exact):
    """The mean that includes the token itself loses one part in the number averaged: a half."""
    vocabulary, length = 3, 2
    responses = list(itertools.product(range(vocabulary), repeat=length))
    prefixes = [(), *((token,) for token in range(vocabulary))]
    generator = torch.Generator().manual_seed(0)
    student_SV, teacher_SV = (torch.randn(4, vocabulary, generator=generator) for _ in range(2))
    student_SV.requires_grad_()
    actions_VE = torch.nn.functional.normalize(
        torch.randn(vocabulary, 2, generator=generator), dim=-1
    )
    critic_FE = torch.randn(vocabulary, 2, generator=generator)

    def probability(response):
        steps = (
            student_SV.softmax(-1)[prefixes.index(response[:t]), response[t]] for t in range(length)
        )
        return torch.stack(list(steps)).prod()

    values_SV = torch.nn.functional.normalize(teacher_SV, dim=-1) @ critic_FE @ actions_VE.T
    expected_S = (teacher_SV.softmax(-1) * values_SV).sum(-1)
    total = sum(
        probability(response)
        * sum(
            expected_S[prefixes.index(response[:t])]
            - values_SV[prefixes.index(response[:t]), response[t]]
            for t in range(length)
        )
        for response in responses
    )
    [exact] = torch.autograd.grad(total / length, student_SV)

    objective = _ammd(on_policy_weight=1.0, policy_gradient="reward_to_go", baseline=baseline)
    objective.on_critic = FixedCritic(critic_FE)
    heads = PolicyHeads(
        unembedding_VH=torch.eye(vocabulary), action_embeddings_VE=actions_VE, chunk_tokens=9
    )
    mean = torch.zeros_like(exact)
    for pair in itertools.product(responses, repeat=2):
        states = [prefixes.index(response[:t]) for response in pair for t in range(length)]
        rows = make_token_rows(
            student_SV[states],
            [token for response in pair for token in response],
            [2, 2],
            teacher=TeacherRows(
                features_NF=teacher_SV[states],
                expected_embedding_NE=teacher_SV.softmax(-1)[states] @ actions_VE,
            ),
        )
        loss = objective.compute_loss(heads, None, rows, identity).loss_share
        weight = (probability(pair[0]) * probability(pair[1])).detach()
        mean += weight * torch.autograd.grad(loss, student_SV)[0]
    torch.testing.assert_close(mean, share_of_exact * exact, atol=1e-6, rtol=1e-4)

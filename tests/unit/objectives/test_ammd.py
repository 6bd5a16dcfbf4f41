"""AMMD against brute force: an enumerable language, autograd of exact sums, and identities."""

from __future__ import annotations

import pytest
import torch
from enumerable_language import EnumerableLanguage
from fakes.fixed_critic import FixedCritic
from token_rows import make_token_rows

from distill_system.config.objective import AmmdConfig
from distill_system.config.objective.ammd import ClosedFormCritic, GradientCritic
from distill_system.objectives import ammd
from distill_system.objectives.ammd import Ammd
from distill_system.objectives.distances import measure_stream
from distill_system.objectives.rows import PolicyHeads, TeacherRows
from distill_system.objectives.vocabulary import unit_rows

LANGUAGE = EnumerableLanguage(vocabulary=3, length=3)
DISCOUNT = 0.9
NUM_STATES = len(LANGUAGE.states)


def identity(tensor):
    return tensor


class Game:
    """A tabular student (one-hot hidden states), a tabular teacher, and a fixed critic."""

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator)

        self.table_VS = draw(LANGUAGE.vocabulary, NUM_STATES).requires_grad_()
        self.teacher_SV = draw(NUM_STATES, LANGUAGE.vocabulary).softmax(-1)
        self.features_SF = draw(NUM_STATES, 4)
        self.actions_VE = unit_rows(draw(LANGUAGE.vocabulary, 2))
        self.critic_FE = draw(4, 2)
        self.off_critic_FE = draw(NUM_STATES, 2)

    @property
    def student_SV(self):
        return self.table_VS.T.softmax(-1)

    @property
    def values_SV(self):
        return unit_rows(self.features_SF) @ self.critic_FE @ self.actions_VE.T

    def head(self):
        return PolicyHeads(
            unembedding_VH=self.table_VS, action_embeddings_VE=self.actions_VE, chunk_tokens=2
        )

    def rows(self, responses, num_global_tokens):
        states = [row for response in responses for row in LANGUAGE.state_rows(response)]
        tokens = torch.tensor([token for response in responses for token in response])
        return make_token_rows(
            torch.eye(NUM_STATES)[states],
            tokens,
            [LANGUAGE.length] * len(responses),
            num_global_tokens=num_global_tokens,
            teacher=TeacherRows(
                features_NF=self.features_SF[states],
                expected_embedding_NE=self.teacher_SV[states] @ self.actions_VE,
                logprobs_N=self.teacher_SV[states].log().gather(1, tokens[:, None])[:, 0],
            ),
        )

    def objective(self, **settings):
        objective = Ammd(AmmdConfig(**settings), max_response_tokens=LANGUAGE.length)
        objective.on_critic = FixedCritic(self.critic_FE)
        objective.off_critic = FixedCritic(self.off_critic_FE)
        return objective

    def exact_on_policy_gradient(self):
        """d/dtheta of E_{tau ~ student} sum gamma^t (E_{pi*} f - f(s_t, y_t)), by enumeration."""
        total = torch.zeros(())
        student, values = self.student_SV, self.values_SV
        for response in LANGUAGE.responses:
            cost = torch.zeros(())
            for t, (row, token) in enumerate(
                zip(LANGUAGE.state_rows(response), response, strict=True)
            ):
                expected = (self.teacher_SV[row] * values[row]).sum()
                cost = cost + DISCOUNT**t * (expected - values[row, token])
            total = total + LANGUAGE.probability(response, student) * cost
        return torch.autograd.grad(total, self.table_VS)[0]

    def expected_gradient(self, **settings):
        """The estimator's mean over every response the student can write."""
        objective = self.objective(on_policy_weight=1.0, discount=DISCOUNT, **settings)
        mean = torch.zeros_like(self.table_VS)
        for response in LANGUAGE.responses:
            weight = LANGUAGE.probability(response, self.student_SV).detach()
            rows = self.rows([response], num_global_tokens=1)
            output = objective.compute_loss(self.head(), None, rows, identity)
            mean += weight * torch.autograd.grad(output.loss_share, self.table_VS)[0]
        return mean


EXACT_FORMS = [
    {"policy_gradient": "reward_to_go", "baseline": "none"},
    {
        "policy_gradient": "immediate_plus_future",
        "baseline": "none",
        "future_weight": 1.0,
        "normalise_future": False,
    },
]


@pytest.mark.parametrize("form", EXACT_FORMS, ids=lambda form: form["policy_gradient"])
@pytest.mark.parametrize("seed", [0, 1])
def test_policy_gradient_is_exact_in_expectation(form, seed):
    game = Game(seed)
    torch.testing.assert_close(
        game.expected_gradient(**form), game.exact_on_policy_gradient(), atol=2e-6, rtol=1e-4
    )


def test_the_immediate_form_leaves_out_what_an_action_does_to_later_states():
    game = Game()
    immediate = game.expected_gradient(policy_gradient="immediate")
    assert (immediate - game.exact_on_policy_gradient()).abs().max() > 1e-2


def test_off_policy_gradient_is_minus_the_policy_times_the_centred_critic():
    game = Game()
    responses = LANGUAGE.responses[:5]
    rows = game.rows(responses, num_global_tokens=15)
    output = game.objective(on_policy_weight=0.0).compute_loss(game.head(), rows, None, identity)
    ours = torch.autograd.grad(output.loss_share, game.table_VS)[0]
    by_hand = torch.zeros_like(ours)
    student = game.student_SV.detach()
    for state in (row for response in responses for row in LANGUAGE.state_rows(response)):
        # The off-policy critic reads the student's hidden state, here one-hot: a row of phi1.
        values = game.off_critic_FE[state] @ game.actions_VE.T
        centred = values - (student[state] * values).sum()
        by_hand[:, state] -= student[state] * centred / 15
    torch.testing.assert_close(ours, by_hand, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("ball", ["spectral", "frobenius"])
def test_off_policy_gradient_is_that_of_the_distance_itself(ball):
    """Envelope theorem: the best response is held fixed while the distance is differentiated."""
    game = Game()
    rows = game.rows(LANGUAGE.responses[:7], num_global_tokens=21)
    config = AmmdConfig(on_policy_weight=0.0, critic=ClosedFormCritic(ball=ball))
    output = Ammd(config, max_response_tokens=3).compute_loss(game.head(), rows, None, identity)
    ours = torch.autograd.grad(output.loss_share, game.table_VS)[0]
    states = rows.hidden_NH.argmax(-1)
    gap = (game.teacher_SV - game.student_SV)[states] @ game.actions_VE
    moment = rows.hidden_NH.T @ gap / 21
    distance = torch.linalg.svdvals(moment).sum() if ball == "spectral" else moment.norm()
    exact = torch.autograd.grad(distance, game.table_VS)[0]
    torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-3)
    assert float(output.loss_share.detach()) == pytest.approx(float(distance.detach()), rel=1e-4)
    assert output.metrics["off_policy_distance"] == pytest.approx(
        float(distance.detach()), rel=1e-4
    )


def test_everything_is_zero_where_student_equals_teacher():
    game = Game()
    game.teacher_SV = game.student_SV.detach()
    rows = game.rows(LANGUAGE.responses, num_global_tokens=81)
    objective = Ammd(AmmdConfig(), max_response_tokens=3)
    output = objective.compute_loss(game.head(), rows, rows, identity)
    gradient = torch.autograd.grad(output.loss_share, game.table_VS)[0]
    assert output.metrics == pytest.approx(
        {"off_policy_distance": 0.0, "on_policy_distance": 0.0}, abs=1e-6
    )
    assert gradient.abs().max() < 1e-6
    for stream in ("off_policy", "on_policy"):
        distance = measure_stream(game.head(), rows, identity, stream=stream).distance
        assert distance == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"critic": GradientCritic(type="gradient_ascent")},
        {"policy_gradient": "reward_to_go", "moment_target": "sampled", "baseline": "position"},
        {"policy_gradient": "immediate_plus_future", "discount": 0.9, "baseline": "batch"},
        {"on_policy_weight": 0.25, "language_model_weight": 0.5},
        {"policy_gradient": "reward_to_go", "baseline": "leave_one_out"},
        {"features": {"type": "whitened"}, "critic": ClosedFormCritic(average=0.5)},
        {"features": {"type": "projected", "dimension": 2}},
    ],
    ids=["default", "ascent", "paper", "future", "joint", "others", "whitened", "projected"],
)
def test_two_ranks_give_the_gradient_of_one(settings):
    """Each rank holds some sequences; moments, baselines and loss shares are summed over both."""
    everything, shares = LANGUAGE.responses[:9], (LANGUAGE.responses[:4], LANGUAGE.responses[4:9])
    game = Game()
    config = AmmdConfig(**settings)
    whole = _gradient(game, Ammd(config, max_response_tokens=3), everything, identity)

    # What rank 0 and rank 1 hand to their collective sums is recorded, then replayed as the sum.
    sums: list[list[torch.Tensor]] = []

    def run(rank, calls):
        objective = Ammd(config, max_response_tokens=3)

        def sum_over_ranks(tensor):
            calls.append(tensor)
            position = len(calls) - 1
            return sums[position] if position < len(sums) else tensor

        return _gradient(game, objective, shares[rank], sum_over_ranks)

    for _ in range(8):  # each pass settles one more collective
        recorded = [[], []]
        parts = [run(rank, recorded[rank]) for rank in (0, 1)]
        assert len(recorded[0]) == len(recorded[1])
        settled = len(sums)
        if settled == len(recorded[0]):
            break
        sums.append(recorded[0][settled] + recorded[1][settled])
    torch.testing.assert_close(parts[0] + parts[1], whole, atol=1e-6, rtol=1e-4)


def _gradient(game, objective, responses, sum_over_ranks):
    rows = game.rows(responses, num_global_tokens=27)
    output = objective.compute_loss(game.head(), rows, rows, sum_over_ranks)
    return torch.autograd.grad(output.loss_share, game.table_VS)[0]


@pytest.mark.parametrize("form", EXACT_FORMS, ids=lambda form: form["policy_gradient"])
def test_a_baseline_that_is_constant_changes_each_gradient_but_not_their_mean(monkeypatch, form):
    asked = []

    def constant(kind, returns_N, rows, sum_over_ranks, *, longest):
        asked.append((kind, longest))
        return torch.full_like(returns_N, 0.37)

    game = Game()
    rows = game.rows(LANGUAGE.responses[:1], num_global_tokens=1)

    def one_gradient(baseline):
        objective = game.objective(on_policy_weight=1.0, **{**form, "baseline": baseline})
        loss = objective.compute_loss(game.head(), None, rows, identity).loss_share
        return torch.autograd.grad(loss, game.table_VS)[0]

    plain = one_gradient("none")
    monkeypatch.setattr(ammd, "compute_baseline", constant)
    assert (one_gradient("batch") - plain).abs().max() > 1e-2
    mean = game.expected_gradient(**{**form, "baseline": "batch"})
    torch.testing.assert_close(mean, game.exact_on_policy_gradient(), atol=2e-6, rtol=1e-4)
    assert set(asked) == {("batch", LANGUAGE.length)}


def test_beta_mixes_the_two_terms_and_the_language_model_term_adds():
    game = Game()
    rows = game.rows(LANGUAGE.responses[:6], num_global_tokens=18)

    def loss(**settings):
        objective = game.objective(**settings)
        output = objective.compute_loss(game.head(), rows, rows, identity)
        return float(output.loss_share.detach())

    off, on = loss(on_policy_weight=0.0), loss(on_policy_weight=1.0)
    assert loss(on_policy_weight=0.3) == pytest.approx(0.7 * off + 0.3 * on, rel=1e-5)
    cross_entropy = -float(game.head().read(rows).logprobs_N.detach().mean())
    with_term = loss(on_policy_weight=0.3, language_model_weight=0.5)
    assert with_term == pytest.approx(0.7 * off + 0.3 * on + 0.5 * cross_entropy, rel=1e-5)


@pytest.mark.parametrize("ball", ["spectral", "frobenius"])
@pytest.mark.parametrize("stream", ["off_policy", "on_policy"])
def test_a_measured_distance_is_that_of_the_features_which_the_streams_critic_reads(stream, ball):
    game = Game()
    rows = game.rows(LANGUAGE.responses[:7], num_global_tokens=21)
    measured = measure_stream(game.head(), rows, identity, stream=stream, ball=ball, radius=2.0)
    states = rows.hidden_NH.argmax(-1)
    read = rows.hidden_NH if stream == "off_policy" else unit_rows(game.features_SF[states])
    gap = (game.teacher_SV - game.student_SV.detach())[states] @ game.actions_VE
    moment = read.T @ gap / 21
    norm = torch.linalg.svdvals(moment).sum() if ball == "spectral" else moment.norm()
    assert measured.distance == pytest.approx(2.0 * float(norm), rel=1e-4)
    logprobs = game.student_SV.detach()[states, rows.token_ids_N].log()
    assert measured.cross_entropy == pytest.approx(-float(logprobs.mean()), rel=1e-5)
    torch.testing.assert_close(measured.student_logprobs_N, logprobs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("beta", "played"), [(0.0, "off_policy"), (1.0, "on_policy")])
def test_no_critic_is_played_on_a_stream_without_weight(beta, played):
    game = Game()
    rows = game.rows(LANGUAGE.responses[:6], num_global_tokens=18)
    critic = GradientCritic(type="gradient_ascent")
    objective = Ammd(AmmdConfig(on_policy_weight=beta, critic=critic), max_response_tokens=3)
    output = objective.compute_loss(game.head(), rows, rows, identity)
    assert set(output.metrics) == {f"{played}_distance"}
    assert set(objective.state_dict()) == {f"{played.removesuffix('_policy')}_critic.critic"}


def test_a_stream_alone_counts_one_whatever_beta_is():
    game = Game()
    rows = game.rows(LANGUAGE.responses[:6], num_global_tokens=18)

    def loss(beta, off_policy, on_policy):
        objective = game.objective(on_policy_weight=beta)
        output = objective.compute_loss(game.head(), off_policy, on_policy, identity)
        return float(output.loss_share.detach())

    assert loss(0.3, rows, None) == loss(0.0, rows, rows) != 0.0
    assert loss(0.3, None, rows) == loss(1.0, rows, rows) != 0.0


def test_a_language_model_loss_needs_a_stream_to_read():
    with pytest.raises(ValueError, match=r"on_policy_weight=1\.0 leaves out"):
        AmmdConfig(on_policy_weight=1.0, language_model_weight=0.5)


def test_reward_to_go_metric_is_minus_the_mean_discounted_cost_of_a_response():
    game = Game()
    responses = LANGUAGE.responses[3:8]
    rows = game.rows(responses, num_global_tokens=15)
    output = game.objective(on_policy_weight=1.0, discount=DISCOUNT).compute_loss(
        game.head(), None, rows, identity
    )
    returns = []
    for response in responses:
        cost = 0.0
        for t, (state, token) in enumerate(
            zip(LANGUAGE.state_rows(response), response, strict=True)
        ):
            values = game.values_SV[state]
            cost += DISCOUNT**t * float((game.teacher_SV[state] * values).sum() - values[token])
        returns.append(-cost)
    expected = sum(returns) / len(returns)
    assert float(output.metric_shares["reward_to_go"]) == pytest.approx(expected, rel=1e-4)


def test_critics_are_the_objectives_whole_state():
    game = Game()
    rows = game.rows(LANGUAGE.responses[:6], num_global_tokens=18)
    config = AmmdConfig(critic=GradientCritic(type="gradient_ascent", steps=1, step_size=0.1))
    first, second = (Ammd(config, max_response_tokens=3) for _ in range(2))
    first.compute_loss(game.head(), rows, rows, identity)
    second.load_state_dict(first.state_dict())
    assert set(first.state_dict()) == {"off_critic.critic", "on_critic.critic"}
    losses = [
        float(objective.compute_loss(game.head(), rows, rows, identity).loss_share.detach())
        for objective in (first, second)
    ]
    assert losses[0] == losses[1]

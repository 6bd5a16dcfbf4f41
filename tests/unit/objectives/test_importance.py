"""Importance weights by themselves and inside objectives: chunks, exact ones, copies of rows."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_rows import make_token_rows

from distill_system.config.objective import AmmdConfig, MinillmConfig, TokenMatchingConfig
from distill_system.config.objective.ammd import AdvantageConfig, WhitenedFeatures
from distill_system.objectives import Importance, build_objective, chunked_products
from distill_system.objectives.rows import PolicyHeads, TeacherRows
from distill_system.objectives.vocabulary import read_vocabulary

VOCABULARY = 11
TERMS = ({"type": "hidden_matching", "weight": 0.5}, {"type": "relational", "weight": 2.0})


def _matching(kind, **changes):
    form = {"type": "token_matching", "on_policy": {"type": kind}, "on_policy_weight": 1.0}
    return TokenMatchingConfig.model_validate({**form, **changes})


CONFIGS = {
    "immediate": AmmdConfig(
        on_policy_weight=1.0, features=WhitenedFeatures(type="whitened"), discount=0.9
    ),
    "future": AmmdConfig(
        on_policy_weight=1.0,
        policy_gradient="immediate_plus_future",
        advantage=AdvantageConfig(type="soft_advantage"),
    ),
    "reward_to_go": AmmdConfig(
        on_policy_weight=1.0, policy_gradient="reward_to_go", moment_target="sampled"
    ),
    "reverse_kl": _matching("reverse_kl", terms=TERMS),
    "cross_entropy": _matching("cross_entropy", temperature=2.0),
    "sinkhorn": _matching("sinkhorn"),
    "minillm": MinillmConfig(type="minillm", teacher_mixture=0.0),
    "minillm_prefix": MinillmConfig(type="minillm", teacher_mixture=0.0, importance="prefix"),
}


def identity(tensor):
    return tensor


def _rows(lengths, *, seed=0, known=True):
    """Hidden states are logits of the student; the writer's log-probabilities are drawn at will."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    count = sum(lengths)
    tokens = torch.randint(VOCABULARY, (count,), generator=generator)
    hidden, teacher = 1.5 * draw(count, VOCABULARY), 1.5 * draw(count, VOCABULARY)
    behaviour = hidden.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1) + 0.5 * draw(count)
    return make_token_rows(
        hidden.requires_grad_(),
        tokens,
        lengths,
        teacher=TeacherRows(
            features_NF=teacher,
            expected_embedding_NE=teacher.softmax(-1) @ _actions(),
            logprobs_N=teacher.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1),
        ),
        behaviour_logprobs_N=behaviour if known else None,
    )


def _actions():
    drawn = torch.randn(VOCABULARY, 4, generator=torch.Generator().manual_seed(99))
    return torch.nn.functional.normalize(drawn, dim=-1)


def _heads(chunk=4):
    return PolicyHeads(
        unembedding_VH=torch.eye(VOCABULARY),
        action_embeddings_VE=_actions(),
        chunk_tokens=chunk,
        teacher_unembedding_VF=torch.eye(VOCABULARY),
    )


def _play(config, rows, importance=None, *, chunk=4, sum_over_ranks=identity):
    """The output, and the gradient of the hidden states."""
    hidden_NH = rows.hidden_NH.detach().clone().requires_grad_()
    objective = build_objective(
        config,
        max_response_tokens=9,
        total_steps=10,
        importance=importance or Importance(),
    )
    output = objective.compute_loss(
        _heads(chunk), None, replace(rows, hidden_NH=hidden_NH), sum_over_ranks
    )
    output.loss_share.backward()
    return output, hidden_NH.grad


def _written(rows, temperature=1.0):
    logits = rows.hidden_NH.detach().double() / temperature
    return logits.log_softmax(-1).gather(1, rows.token_ids_N[:, None]).squeeze(1)


@settings(max_examples=80, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    cuts=st.lists(st.integers(0, 36), max_size=5),
    cap=st.sampled_from([1.0, 1.5, 4.0, math.inf]),
    kind=st.sampled_from(["token", "state"]),
    seed=st.integers(0, 10**6),
)
def test_weights_are_capped_products_of_ratios_however_the_stream_is_cut(
    lengths, cuts, cap, kind, seed
):
    rows = _rows(lengths, seed=seed)
    student_N = _written(rows).float()
    running = Importance(kind=kind, cap=cap).start(rows)
    edges = sorted({0, len(student_N), *(cut for cut in cuts if cut < len(student_N))})
    states, tokens = [], []
    for first, last in itertools.pairwise(edges):
        chunk = slice(first, last)
        running.take(chunk, student_N[chunk])
        states.append(running.states(chunk))
        tokens.append(running.tokens(chunk))
    whole = Importance(kind=kind, cap=cap).read(rows, student_N)
    assert torch.equal(torch.cat(states), whole.states_N)
    assert torch.equal(torch.cat(tokens), whole.tokens_N)
    for name, weights_N in _by_hand(rows, student_N, lengths, kind=kind, cap=cap).items():
        ours = getattr(whole, name)
        assert ours.dtype == torch.float32
        assert not ours.requires_grad
        assert ours.tolist() == pytest.approx(weights_N, rel=1e-5)


def _by_hand(rows, student_N, lengths, *, kind, cap):
    ratios = [
        math.exp(a) / math.exp(b)
        for a, b in zip(student_N.tolist(), rows.behaviour_logprobs_N.tolist(), strict=True)
    ]
    weights = {"states_N": [], "tokens_N": [], "responses_N": []}
    start = 0
    for length in lengths:
        own = ratios[start : start + length]
        for t in range(length):
            products = [math.prod(own[:t]), math.prod(own[: t + 1]), math.prod(own)]
            if kind == "token":
                products = [own[t]] * 3
            for name, product in zip(weights, products, strict=True):
                weights[name].append(min(cap, product))
        start += length
    return weights


@pytest.mark.parametrize("kind", ["token", "state"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_where_the_writer_is_the_student_nothing_changes_to_the_bit(config, kind):
    rows = _rows((4, 1, 3))
    plain, gradient = _play(config, replace(rows, behaviour_logprobs_N=None))
    same = replace(rows, behaviour_logprobs_N=plain.student_logprobs_N)
    weighed, its_gradient = _play(config, same, Importance(kind=kind, cap=1.0))
    assert torch.equal(plain.loss_share, weighed.loss_share)
    assert torch.equal(gradient, its_gradient)
    assert plain.metrics == weighed.metrics
    assert plain.metric_shares == weighed.metric_shares


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_the_writer_said_changes_nothing_where_nothing_is_weighed(config):
    """kind none with log-probabilities, and kind state without them, are the plain objective."""
    rows = _rows((4, 1, 3))
    unknown = replace(rows, behaviour_logprobs_N=None)
    plain, gradient = _play(config, unknown)
    others = [(rows, Importance(kind="none", cap=1.5)), (unknown, Importance(kind="state"))]
    for these, importance in others:
        output, its_gradient = _play(config, these, importance)
        assert torch.equal(plain.loss_share, output.loss_share)
        assert torch.equal(gradient, its_gradient)
        assert torch.equal(plain.student_logprobs_N, output.student_logprobs_N)


@pytest.mark.parametrize("kind", ["token", "state"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_chunks_and_blocks_leave_no_trace(config, kind, monkeypatch):
    rows, importance = _rows((4, 1, 3, 6)), Importance(kind=kind, cap=1.5)
    whole, gradient = _play(config, rows, importance, chunk=100)
    _, plain_gradient = _play(config, rows)
    assert (plain_gradient - gradient).abs().max() > 1e-3
    monkeypatch.setattr(chunked_products, "CPU_BLOCK_ELEMENTS", 2 * VOCABULARY)
    for chunk in (1, 3, 5):
        output, its_gradient = _play(config, rows, importance, chunk=chunk)
        torch.testing.assert_close(output.loss_share, whole.loss_share, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(its_gradient, gradient, atol=1e-6, rtol=1e-5)


COPIED = {
    "immediate": AmmdConfig(
        on_policy_weight=1.0, features=WhitenedFeatures(type="whitened", decay=0.0), baseline="none"
    ),
    "sampled": AmmdConfig(on_policy_weight=1.0, moment_target="sampled"),
    "log_ratio": AmmdConfig(on_policy_weight=1.0, advantage=AdvantageConfig(type="log_ratio")),
    "reward_to_go": AmmdConfig(
        on_policy_weight=1.0, policy_gradient="reward_to_go", baseline="none"
    ),
    "reverse_kl": _matching("reverse_kl", terms=TERMS),
    "cosine": _matching(
        "cross_entropy", terms=({"type": "hidden_matching", "distance": "cosine"},)
    ),
    "minillm": MinillmConfig(type="minillm", teacher_mixture=0.0),
}


@pytest.mark.parametrize("name", COPIED)
def test_a_weight_of_three_is_three_copies_of_the_row(name):
    """Critics' moments, whitening and covariances too: all are means over the rows."""
    config, rows = COPIED[name], _rows((1,) * 9, seed=3)
    copies_N = torch.tensor([1, 2, 3, 1, 1, 3, 2, 1, 1])
    behaviour_N = (_written(rows) - copies_N.double().log()).float()
    weighed, gradient = _play(
        config, replace(rows, behaviour_logprobs_N=behaviour_N), Importance(kind="token")
    )
    source_M = torch.arange(9).repeat_interleave(copies_N)
    teacher = rows.teacher
    copied = replace(
        rows,
        hidden_NH=rows.hidden_NH[source_M],
        token_ids_N=rows.token_ids_N[source_M],
        sequence_ids_N=torch.arange(len(source_M)),
        positions_N=torch.zeros_like(source_M),
        teacher=TeacherRows(
            features_NF=teacher.features_NF[source_M],
            expected_embedding_NE=teacher.expected_embedding_NE[source_M],
            logprobs_N=teacher.logprobs_N[source_M],
        ),
        behaviour_logprobs_N=None,
    )
    expected, copies_gradient = _play(config, copied)
    torch.testing.assert_close(weighed.loss_share, expected.loss_share, atol=1e-6, rtol=1e-5)
    summed = torch.zeros_like(gradient).index_add_(0, source_M, copies_gradient)
    torch.testing.assert_close(gradient, summed, atol=1e-6, rtol=1e-4)
    assert weighed.metrics == pytest.approx(expected.metrics, rel=1e-5)
    shares, copies = (
        {k: float(v) for k, v in o.metric_shares.items()} for o in (weighed, expected)
    )
    assert shares == pytest.approx(copies, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("chunk", [3, 100])
def test_log_probabilities_are_handed_back_at_the_temperature_of_the_writer(temperature, chunk):
    rows = replace(_rows((4, 1, 3)), behaviour_temperature=temperature)
    expected = _written(rows, temperature).float()
    for config in CONFIGS.values():
        output, _ = _play(config, rows, chunk=chunk)
        torch.testing.assert_close(output.student_logprobs_N, expected, atol=1e-5, rtol=1e-5)


def test_reading_at_another_temperature_leaves_the_rest_as_it_was():
    rows = _rows((4, 1, 3))
    reads = []
    for temperature in (1.0, 1.7):
        hidden_NH = rows.hidden_NH.detach().clone().requires_grad_()
        read = read_vocabulary(
            hidden_NH,
            rows.token_ids_N,
            torch.eye(VOCABULARY),
            _actions(),
            chunk_tokens=3,
            behaviour_temperature=temperature,
        )
        assert not read.behaviour_logprobs_N.requires_grad
        (read.logprobs_N.sum() + read.expected_embedding_NE.square().sum()).backward()
        reads.append((read.logprobs_N, read.expected_embedding_NE, hidden_NH.grad))
    for first, second in zip(*reads, strict=True):
        assert torch.equal(first, second)


def test_ratios_beyond_every_float_stay_finite_under_a_cap():
    rows = _rows((3, 3))
    far = replace(rows, behaviour_logprobs_N=torch.tensor([-900.0, -1.0, -1.0, 0.0, -1.0, -1.0]))
    student_N = torch.tensor([0.0, -1.0, -1.0, -900.0, -1.0, -1.0])
    weights = Importance(kind="state", cap=2.0).read(far, student_N)
    assert weights.states_N.tolist() == pytest.approx([1.0, 2.0, 2.0, 1.0, 0.0, 0.0])
    assert weights.tokens_N.tolist() == pytest.approx([2.0, 2.0, 2.0, 0.0, 0.0, 0.0])

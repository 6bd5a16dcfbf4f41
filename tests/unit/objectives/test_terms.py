"""Terms on hidden states: closed forms, invariances, float64 references, two ranks as one."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from two_policies import TwoPolicies

from distill_system.config.objective.token_matching import HiddenMatchingConfig, RelationalConfig
from distill_system.objectives.rows import TeacherRows
from distill_system.objectives.terms import build_term, relational


def identity(tensor):
    return tensor


def hidden_matching(distance="squared", ridge=1e-6, decay=0.0):
    return HiddenMatchingConfig(type="hidden_matching", distance=distance, ridge=ridge, decay=decay)


RELATIONAL = RelationalConfig(type="relational")
EVERY = [hidden_matching(), hidden_matching("cosine"), RELATIONAL]


def rows_of(hidden, features, sequence_ids=None):
    """A term reads states and sequences alone: tokens and positions are zeros."""
    rows, zeros = TwoPolicies().rows(), torch.zeros(len(hidden), dtype=torch.long)
    return replace(
        rows,
        hidden_NH=hidden,
        token_ids_N=zeros,
        positions_N=zeros,
        sequence_ids_N=rows.sequence_ids_N if sequence_ids is None else sequence_ids,
        teacher=TeacherRows(features_NF=features),
    )


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def value(config, hidden, features):
    return float(build_term(config).compute_loss(rows_of(hidden, features), identity).detach())


def dense_map(inputs, targets, ridge):
    """The regression as least squares with the penalty as extra rows, no covariance."""
    size = inputs.shape[1]
    scale = (ridge * inputs.square().mean() * len(inputs)).sqrt()
    stacked = torch.cat([inputs, scale * torch.eye(size, dtype=inputs.dtype)])
    zeros = torch.zeros(size, targets.shape[1], dtype=targets.dtype)
    return torch.linalg.lstsq(stacked, torch.cat([targets, zeros])).solution


@pytest.mark.parametrize("distance", ["squared", "cosine"])
@pytest.mark.parametrize("ridge", [1e-4, 0.5])
def test_hidden_matching_is_the_error_of_a_least_squares_map_held_fixed(distance, ridge):
    hidden, features = draw(13, 3), draw(13, 5, seed=1)
    ours = hidden.clone().requires_grad_()
    loss = build_term(hidden_matching(distance, ridge)).compute_loss(
        rows_of(ours, features), identity
    )
    loss.backward()
    dense = hidden.double().requires_grad_()
    inputs = torch.cat([dense, torch.ones(13, 1)], dim=1)
    targets = features.double()
    mapped = inputs @ dense_map(inputs.detach(), targets, ridge)
    if distance == "squared":
        expected = (mapped - targets).square().sum() / targets.square().sum()
    else:
        cosines = (mapped * targets).sum(-1) / (mapped.norm(dim=-1) * targets.norm(dim=-1))
        expected = (1 - cosines).mean()
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    error = (ours.grad.double() - dense.grad).norm() / dense.grad.norm()
    assert error < 1e-4


def test_a_teacher_that_is_a_linear_image_of_the_student_is_matched():
    hidden = draw(13, 4)
    image = hidden @ draw(4, 6, seed=1) + draw(6, seed=2)
    for distance in ("squared", "cosine"):
        assert value(hidden_matching(distance), hidden, image) < 1e-4


def test_a_student_that_says_nothing_of_the_teacher_explains_only_its_mean():
    features = draw(13, 5)
    spread = (features - features.mean(0)).square().sum() / features.square().sum()
    got = value(hidden_matching(), torch.zeros(13, 4), features)
    assert got == pytest.approx(float(spread), rel=1e-4)


def test_descent_on_the_squared_term_brings_the_states_nearer():
    hidden, features = draw(13, 3).requires_grad_(), draw(13, 5, seed=1)
    term = build_term(hidden_matching(ridge=1e-3))
    before = term.compute_loss(rows_of(hidden, features), identity)
    before.backward()
    after = value(hidden_matching(ridge=1e-3), hidden.detach() - hidden.grad, features)
    assert after < float(before.detach()) - 1e-3


def test_the_map_follows_the_moving_average_of_the_covariances():
    """Decay 0.5: the second step has weight 2/3, the first 1/3; then the fit is least squares."""
    first, second = (draw(13, 3, seed=seed) for seed in (0, 1))
    features = draw(13, 5, seed=2)
    term = build_term(hidden_matching(ridge=1e-9, decay=0.5))
    term.compute_loss(rows_of(first, features), identity)
    got = term.compute_loss(rows_of(second, features), identity)
    a, b = (torch.cat([hidden, torch.ones(13, 1)], dim=1).double() for hidden in (first, second))
    weighted = torch.cat([a * (1 / 3) ** 0.5, b * (2 / 3) ** 0.5])
    targets = torch.cat([features * (1 / 3) ** 0.5, features * (2 / 3) ** 0.5]).double()
    mapping = torch.linalg.lstsq(weighted, targets).solution
    expected = (b @ mapping - features).square().sum() / features.double().square().sum()
    assert float(got) == pytest.approx(float(expected), rel=1e-4)


def test_a_step_of_few_tokens_counts_as_much_in_the_map_as_one_of_many():
    """Decay 0.5 as above, of 13 tokens and then of 6."""
    many, few = draw(13, 3), draw(6, 3, seed=1)
    features = draw(13, 5, seed=2)
    rows = rows_of(many, features)
    term = build_term(hidden_matching(ridge=1e-9, decay=0.5))
    term.compute_loss(rows, identity)
    shorter = replace(
        rows,
        hidden_NH=few,
        token_ids_N=rows.token_ids_N[:6],
        sequence_ids_N=rows.sequence_ids_N[:6],
        positions_N=rows.positions_N[:6],
        num_global_tokens=6,
        num_global_sequences=1,
        teacher=TeacherRows(features_NF=features[:6]),
    )
    got = term.compute_loss(shorter, identity)
    a, b = (torch.cat([each, torch.ones(len(each), 1)], dim=1).double() for each in (many, few))
    roots = (1 / 3 / 13) ** 0.5, (2 / 3 / 6) ** 0.5
    targets = features.double()
    mapping = torch.linalg.lstsq(
        torch.cat([a * roots[0], b * roots[1]]),
        torch.cat([targets * roots[0], targets[:6] * roots[1]]),
    ).solution
    expected = (b @ mapping - targets[:6]).square().sum() / targets[:6].square().sum()
    assert float(got) == pytest.approx(float(expected), rel=1e-4)


def test_a_restored_term_goes_on_as_the_one_that_was_saved():
    features = draw(13, 5, seed=2)
    saved = build_term(hidden_matching(decay=0.9))
    saved.compute_loss(rows_of(draw(13, 3), features), identity)
    restored = build_term(hidden_matching(decay=0.9))
    restored.load_state_dict(saved.state_dict())
    rows = rows_of(draw(13, 3, seed=1), features)
    expected = float(saved.compute_loss(rows, identity))
    assert float(restored.compute_loss(rows, identity)) == expected
    fresh = build_term(hidden_matching(decay=0.9))
    assert float(fresh.compute_loss(rows, identity)) != expected


def dense_relational(hidden, features):
    """Response by response and pair by pair."""
    total = torch.zeros(())
    for tokens in (range(6), range(6, 7), range(7, 13)):
        gaps = [
            torch.cosine_similarity(hidden[i], hidden[j], dim=0)
            - torch.cosine_similarity(features[i], features[j], dim=0)
            for i in tokens
            for j in tokens
        ]
        total = total + torch.stack(gaps).square().mean() / 3
    return total


@pytest.mark.parametrize("lines", [1, 4, 1024])
def test_relational_is_the_mean_over_pairs_within_each_response(monkeypatch, lines):
    monkeypatch.setattr(relational, "ROWS_AT_ONCE", lines)
    ours, features = draw(13, 4).requires_grad_(), draw(13, 7, seed=1)
    loss = build_term(RELATIONAL).compute_loss(rows_of(ours, features), identity)
    loss.backward()
    dense = draw(13, 4).double().requires_grad_()
    expected = dense_relational(dense, features.double())
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert (ours.grad.double() - dense.grad).norm() / dense.grad.norm() < 1e-5


def test_relations_know_neither_turns_nor_lengths():
    hidden, features = draw(13, 4), draw(13, 7, seed=1)
    turn = torch.linalg.qr(draw(7, 7, seed=2)).Q
    lengths = draw(13, 1, seed=3).abs() + 0.1
    expected = value(RELATIONAL, hidden, features)
    assert value(RELATIONAL, hidden, lengths * features @ turn) == pytest.approx(expected, rel=1e-4)
    assert value(RELATIONAL, hidden, 3.0 * hidden @ turn[:4]) < 1e-10


def test_no_whole_matrix_of_a_response_outlives_its_lines(monkeypatch):
    monkeypatch.setattr(relational, "ROWS_AT_ONCE", 16)
    tokens, kept = 128, []
    one_response = torch.zeros(tokens, dtype=torch.long)
    rows = rows_of(draw(tokens, 4).requires_grad_(), draw(tokens, 5), one_response)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        build_term(RELATIONAL).compute_loss(rows, identity)
    assert max(kept) < 16 * tokens


@pytest.mark.parametrize("config", EVERY, ids=lambda config: repr(config)[:60])
def test_two_ranks_give_the_loss_and_gradient_of_one(config):
    hidden, features = draw(13, 4), draw(13, 5, seed=1)
    whole = hidden.clone().requires_grad_()
    alone = build_term(config).compute_loss(rows_of(whole, features), identity)
    alone.backward()
    barrier, gathered = threading.Barrier(2, timeout=20), {}
    results = {}

    def run(rank, part):
        def sum_over_ranks(tensor):
            barrier.wait()
            gathered[rank] = tensor.clone()
            barrier.wait()
            return gathered[0] + gathered[1]

        mine = hidden[part].clone().requires_grad_()
        sequence_ids = TwoPolicies().rows().sequence_ids_N[part]
        rows = rows_of(mine, features[part], sequence_ids)
        loss = build_term(config).compute_loss(rows, sum_over_ranks)
        loss.backward()
        results[rank] = (float(loss.detach()), mine.grad)

    threads = [
        threading.Thread(target=run, args=(rank, part), daemon=True)
        for rank, part in enumerate((slice(0, 6), slice(6, 13)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert results[0][0] + results[1][0] == pytest.approx(float(alone.detach()), rel=1e-5)
    gradient = torch.cat([results[0][1], results[1][1]])
    torch.testing.assert_close(gradient, whole.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("config", EVERY, ids=lambda config: repr(config)[:60])
def test_a_rank_without_rows_has_no_share_but_a_graph(config):
    hidden = draw(13, 4)[:0].requires_grad_()
    rows = rows_of(hidden, draw(13, 5)[:0], torch.zeros(0, dtype=torch.long))
    loss = build_term(config).compute_loss(rows, lambda tensor: tensor + torch.ones_like(tensor))
    assert float(loss.detach()) == 0.0
    loss.backward()
    assert hidden.grad is not None


@pytest.mark.parametrize("config", EVERY, ids=lambda config: repr(config)[:60])
def test_autocast_does_not_reach_into_a_term(config):
    hidden, features = draw(13, 4), draw(13, 5, seed=1)
    expected = value(config, hidden, features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert value(config, hidden, features) == expected

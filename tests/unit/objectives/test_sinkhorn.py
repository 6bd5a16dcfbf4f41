"""Sinkhorn distance against scaling vectors in float64, and against the best permutation."""

from __future__ import annotations

import itertools

import pytest
import torch
from two_policies import TwoPolicies, assert_same_reading

from distill_system.config.objective.token_losses import SinkhornConfig, TotalVariationConfig


def sinkhorn(batch=4, entropy_weight=0.1, iterations=20):
    return SinkhornConfig(
        type="sinkhorn", batch_tokens=batch, entropy_weight=entropy_weight, iterations=iterations
    )


def pairwise_costs(student, teacher):
    return (student[:, None] - teacher[None, :]).abs().sum(-1)


def dense(batch, entropy_weight, iterations):
    """Cuturi's form: the plan is diag(u) K diag(v), and u and v are updated in turn."""

    def loss(teacher, student, ids):
        values = []
        for start in range(0, len(ids), batch):
            costs = pairwise_costs(student[start : start + batch], teacher[start : start + batch])
            kernel = (-costs / entropy_weight).exp()
            v = torch.ones(len(costs), dtype=costs.dtype)
            for _ in range(iterations):
                u = 1 / (kernel @ v)
                v = 1 / (kernel.T @ u)
            values.append((u[:, None] * kernel * v[None, :] * costs).sum(1))
        return torch.cat(values)

    return loss


@pytest.mark.parametrize(("entropy_weight", "iterations"), [(0.1, 20), (1.0, 1), (0.03, 50)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_value_and_gradients_are_those_of_the_scaling_vectors(
    entropy_weight, iterations, temperature
):
    policies = TwoPolicies()
    assert_same_reading(
        policies.read(sinkhorn(4, entropy_weight, iterations), temperature=temperature),
        policies.read_densely(dense(4, entropy_weight, iterations), temperature=temperature),
    )


def test_chunk_size_changes_neither_batches_nor_gradients():
    whole = TwoPolicies().read(sinkhorn(4), chunk=1000)
    for chunk in (1, 4, 5, 11):
        assert_same_reading(TwoPolicies().read(sinkhorn(4), chunk=chunk), whole)


def test_almost_without_entropy_it_is_the_cost_of_the_best_pairing():
    """The optimal plan of equal masses is a permutation (Birkhoff), found by trying all."""
    policies = TwoPolicies(seed=3)
    student = (policies.hidden.double() @ policies.unembedding.double().T).softmax(-1)
    costs = pairwise_costs(student, policies.teacher())[:5, :5]
    best = min(
        float(costs[range(5), list(order)].sum()) for order in itertools.permutations(range(5))
    )
    values = policies.read(sinkhorn(5, 0.003, 2000), chunk=5).values[:5]
    assert float(values.sum()) == pytest.approx(best, rel=1e-3)


def test_entropy_never_makes_the_transport_cheaper_than_the_best_pairing():
    policies = TwoPolicies(seed=3)
    cheap = policies.read(sinkhorn(4, 0.003, 2000)).values
    for entropy_weight in (0.03, 0.3, 3.0):
        dear = policies.read(sinkhorn(4, entropy_weight, 2000)).values
        for start in (0, 4, 8):
            batch = slice(start, start + 4)
            assert float(dear[batch].sum()) >= float(cheap[batch].sum()) - 1e-4


def test_of_one_token_alone_it_is_twice_the_total_variation():
    policies = TwoPolicies()
    total_variation = policies.read(TotalVariationConfig(type="total_variation"))
    alone = policies.read(sinkhorn(batch=1))
    torch.testing.assert_close(alone.values, 2 * total_variation.values)
    torch.testing.assert_close(alone.hidden_gradient, 2 * total_variation.hidden_gradient)


def test_equal_policies_are_at_no_distance_once_the_entropy_is_small():
    policies = TwoPolicies(equal=True)
    assert policies.read(sinkhorn(4, 0.001, 200)).values.abs().max() < 1e-5
    # a little more than 0 with it, but for the last token, alone in its batch
    assert policies.read(sinkhorn(4, 3.0, 200)).values[:12].min() > 0.1


def test_the_order_of_a_batch_does_not_matter():
    policies, turned = TwoPolicies(), TwoPolicies()
    order = torch.tensor([2, 0, 3, 1, *range(4, 13)])
    turned.hidden, turned.features = policies.hidden[order], policies.features[order]
    # both orders converged: the rounds treat rows and columns in turn, in any order alike
    expected = policies.read(sinkhorn(4)).values[order]
    torch.testing.assert_close(turned.read(sinkhorn(4)).values, expected, rtol=1e-4, atol=1e-5)


def test_no_tensor_of_batch_by_batch_by_vocabulary_is_kept():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        TwoPolicies().read(sinkhorn(8), chunk=8)
    assert max(kept) <= 8 * 23

from __future__ import annotations

import pytest
import torch

from distill_system.objectives import make_action_embeddings
from distill_system.objectives.action_space import draw_basis


def _embeddings(rows=50, width=12):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(3)) * 7


@pytest.mark.parametrize("dimension", [None, 12, 256])
def test_embeddings_no_wider_than_asked_for_are_whole_unit_rows(dimension):
    ours = make_action_embeddings(_embeddings(), dimension)
    expected = torch.nn.functional.normalize(_embeddings(), dim=-1)
    torch.testing.assert_close(ours, expected)


def test_a_critic_of_fewer_dimensions_is_a_critic_of_the_whole_space_of_the_same_norm():
    """phi of the subspace and phi P^T of the whole space give every action the same value."""
    whole, narrow = (make_action_embeddings(_embeddings(), d) for d in (None, 5))
    basis = draw_basis(12, 5).float()
    critic = torch.randn(4, 5, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(critic @ narrow.T, (critic @ basis.T) @ whole.T)
    for order in ("nuc", "fro", 2):
        same = torch.linalg.matrix_norm(critic @ basis.T, order)
        torch.testing.assert_close(torch.linalg.matrix_norm(critic, order), same)


def test_no_action_grows_longer_so_the_bound_on_the_critic_holds():
    assert float(make_action_embeddings(_embeddings(), 5).norm(dim=-1).max()) <= 1.0


def test_random_unit_actions_keep_their_inner_products_within_the_subspaces_noise():
    """Johnson-Lindenstrauss: with sqrt(E/R) rescaling, errors near 1/sqrt(R) on average."""
    embeddings = torch.randn(200, 512, generator=torch.Generator().manual_seed(5))
    whole, narrow = (make_action_embeddings(embeddings, d) for d in (None, 128))
    errors = (narrow @ narrow.T) * (512 / 128) - whole @ whole.T
    off_diagonal = errors[~torch.eye(200, dtype=torch.bool)]
    assert float(off_diagonal.square().mean().sqrt()) < 1.2 / 128**0.5


def test_bfloat16_embeddings_are_narrowed_in_float32():
    ours = make_action_embeddings(_embeddings().bfloat16(), 5)
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours, make_action_embeddings(_embeddings(), 5), atol=2e-2, rtol=0)

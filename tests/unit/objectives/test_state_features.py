from __future__ import annotations

import pytest
import torch

from distill_system.config.objective.ammd import ProjectedFeatures, UnitFeatures, WhitenedFeatures
from distill_system.objectives.moving_average import MovingAverage
from distill_system.objectives.state_features import build_features

CONFIGS = [
    UnitFeatures(),
    WhitenedFeatures(type="whitened"),
    ProjectedFeatures(type="projected", dimension=4),
]


def identity(tensor):
    return tensor


def _hidden(num_tokens=200, size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([30.0, 3.0, 1.0, 1.0, 0.3, 0.1])[:size]
    return torch.randn(num_tokens, size, generator=generator) * spread + spread


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.type)
def test_features_have_length_one_and_no_graph(config):
    hidden = _hidden().requires_grad_()
    features = build_features(config).extract(hidden, len(hidden), identity)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(len(hidden)))
    assert not features.requires_grad


def test_whitened_rows_are_the_symmetric_inverse_square_root_up_to_a_rotation():
    """Inner products do not see rotations: they must equal those of S^(-1/2) x, by eigenvectors."""
    config = WhitenedFeatures(type="whitened", decay=0.0, regularisation=0.1)
    hidden = _hidden()
    ours = build_features(config).extract(hidden, len(hidden), identity).double()
    rows = torch.nn.functional.normalize(hidden.double(), dim=-1)
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    root = vectors @ (values + 0.1 * values.mean()).rsqrt().diag() @ vectors.T
    expected = torch.nn.functional.normalize(rows @ root, dim=-1)
    torch.testing.assert_close(ours @ ours.T, expected @ expected.T, atol=1e-5, rtol=1e-5)


def test_a_step_of_few_tokens_counts_as_much_in_the_moment_as_one_of_many():
    """Decay 0.5: the second step has weight 2/3, the first 1/3, whatever their tokens."""
    config = WhitenedFeatures(type="whitened", decay=0.5, regularisation=0.1)
    features, steps = build_features(config), (_hidden(200), _hidden(20, seed=1).flip(1))
    for hidden in steps:
        ours = features.extract(hidden, len(hidden), identity).double()
    many, few = (torch.nn.functional.normalize(hidden.double(), dim=-1) for hidden in steps)
    moment = (many.T @ many) / 200 / 3 + (few.T @ few) / 20 * 2 / 3
    values, vectors = torch.linalg.eigh(moment)
    root = vectors @ (values + 0.1 * values.mean()).rsqrt().diag() @ vectors.T
    expected = torch.nn.functional.normalize(few @ root, dim=-1)
    torch.testing.assert_close(ours @ ours.T, expected @ expected.T, atol=1e-5, rtol=1e-5)


def test_whitening_evens_out_the_directions():
    def spread(features):
        values = torch.linalg.eigvalsh(features.T @ features)
        return float(values.max() / values.min())

    hidden = _hidden()
    unit = build_features(UnitFeatures()).extract(hidden, len(hidden), identity)
    config = WhitenedFeatures(type="whitened", regularisation=1e-6)
    whitened = build_features(config).extract(hidden, len(hidden), identity)
    assert spread(whitened) < spread(unit) / 20.0


def test_a_single_direction_can_be_whitened():
    """Hidden states that are all alike leave a second moment of rank one."""
    hidden = torch.ones(8, 300)
    features = build_features(WhitenedFeatures(type="whitened")).extract(hidden, 8, identity)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(8))


def test_the_second_moment_is_summed_over_ranks():
    hidden = _hidden()
    halves = hidden[:50], hidden[50:]
    units = [torch.nn.functional.normalize(half, dim=-1) for half in halves]
    total = units[0].T @ units[0] + units[1].T @ units[1]
    config = WhitenedFeatures(type="whitened")
    parts = [build_features(config).extract(half, 200, lambda _: total) for half in halves]
    whole = build_features(config).extract(hidden, 200, identity)
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-5)


def test_whitening_continues_from_its_saved_state():
    config = WhitenedFeatures(type="whitened", decay=0.9)
    unbroken, resumed = build_features(config), build_features(config)
    for seed in range(3):
        unbroken.extract(_hidden(seed=seed), 200, identity)
    resumed.load_state_dict({key: value.clone() for key, value in unbroken.state_dict().items()})
    ours, theirs = (
        features.extract(_hidden(seed=9), 200, identity) for features in (resumed, unbroken)
    )
    assert torch.equal(ours, theirs)
    fresh = build_features(config).extract(_hidden(seed=9), 200, identity)
    assert not torch.allclose(ours, fresh, atol=1e-3)


def test_a_projection_is_the_same_on_every_rank_and_keeps_angles_roughly():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 400, generator=generator)
    config = ProjectedFeatures(type="projected", dimension=200, seed=3)
    first, second = (build_features(config).extract(hidden, 50, identity) for _ in range(2))
    assert first.shape == (50, 200)
    assert torch.equal(first, second)
    unit = torch.nn.functional.normalize(hidden, dim=-1)
    assert float((first @ first.T - unit @ unit.T).abs().max()) < 0.3
    other = ProjectedFeatures(type="projected", dimension=200, seed=4)
    assert not torch.equal(first, build_features(other).extract(hidden, 50, identity))


def test_a_moving_average_is_unbiased_from_its_first_matrix():
    average = MovingAverage(0.5)
    assert average.update(torch.tensor([[8.0]])).item() == 8.0
    assert average.update(torch.tensor([[2.0]])).item() == pytest.approx((0.5 * 8 + 2) / 1.5)
    constant = MovingAverage(0.9)
    for _ in range(4):
        assert constant.update(torch.tensor([[3.0]])).item() == pytest.approx(3.0)


def test_no_decay_gives_each_matrix_back_and_keeps_nothing():
    average = MovingAverage(0.0)
    matrix = torch.randn(3, 2)
    assert average.update(matrix).data_ptr() == matrix.data_ptr()
    assert average.state_dict() == {}

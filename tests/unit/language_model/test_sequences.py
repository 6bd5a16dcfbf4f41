from __future__ import annotations

import numpy as np
import pytest
import torch
from trajectories import make_trajectories, make_trajectory

from distill_system.language_model import (
    PackedPart,
    SequenceBatch,
    count_parts,
    read_hidden,
    read_part,
)

CPU = torch.device("cpu")


def _ragged(count, seed=0):
    generator = np.random.default_rng(seed)
    responses = generator.lognormal(2.0, 0.7, size=count).astype(int) + 1
    return [make_trajectory(index, 1 + index % 5, int(n)) for index, n in enumerate(responses)]


def _packed_parts(batch) -> list[PackedPart]:
    assert all(isinstance(part, PackedPart) for part in batch.parts)
    return list(batch.parts)


def _lengths(trajectories):
    return [int(trajectory.token_ids.size) for trajectory in trajectories]


@pytest.mark.parametrize("limits", [{}, {"max_tokens": 40}, {"num_parts": 3}, {"num_parts": 25}])
def test_hidden_rows_equal_those_of_each_sequence_read_alone(make_family_model, limits):
    model = make_family_model("llama", dtype=torch.float32)
    trajectories = make_trajectories(20)
    batch = SequenceBatch.collate(trajectories, CPU, **limits)
    with torch.no_grad():
        hidden = read_hidden(model, batch)
        start = 0
        for trajectory in trajectories:
            ids = torch.from_numpy(trajectory.token_ids).long()[None]
            alone = model.base_model(input_ids=ids).last_hidden_state[0]
            count, prompt = trajectory.num_response_tokens, trajectory.num_prompt_tokens
            rows = slice(start, start + count)
            torch.testing.assert_close(hidden[rows], alone[prompt - 1 : -1], atol=1e-5, rtol=1e-5)
            assert batch.token_ids_N[rows].tolist() == trajectory.response_ids.tolist()
            assert batch.positions_N[rows].tolist() == list(range(count))
            start += count
    assert start == len(hidden)
    lengths = [trajectory.num_response_tokens for trajectory in trajectories]
    assert torch.bincount(batch.sequence_ids_N).tolist() == lengths


@pytest.mark.parametrize("max_tokens", [20, 64, 200, 10**6])
@pytest.mark.parametrize("more", [0, 1, 2, 7])
def test_parts_hold_every_token_once_and_keep_their_bound(max_tokens, more):
    trajectories = _ragged(60)
    num_parts = count_parts(_lengths(trajectories), max_tokens) + more
    limits = {"num_parts": num_parts} if more else {"max_tokens": max_tokens}
    batch = SequenceBatch.collate(trajectories, CPU, **limits)
    assert len(batch.parts) == num_parts
    sizes = [part.input_ids_1T.numel() for part in _packed_parts(batch)]
    assert sum(sizes) == sum(_lengths(trajectories))
    for part, size in zip(_packed_parts(batch), sizes, strict=True):
        assert size <= max_tokens or len(part.layout.boundaries) == 2
    rows = torch.cat([part.rows_n for part in batch.parts])
    assert torch.equal(rows[batch.order_N], torch.arange(len(batch.token_ids_N)))


def test_parts_are_of_near_equal_size():
    batch = SequenceBatch.collate(_ragged(200), CPU, num_parts=6)
    sizes = [part.input_ids_1T.numel() for part in _packed_parts(batch)]
    assert max(sizes) <= 1.02 * min(sizes)


def test_positions_begin_anew_with_each_sequence():
    batch = SequenceBatch.collate(make_trajectories(6), CPU)
    (part,) = _packed_parts(batch)
    lengths = part.layout.boundaries.diff().tolist()
    assert sorted(_lengths(make_trajectories(6))) == lengths
    assert part.layout.position_ids_1T[0].tolist() == [i for n in lengths for i in range(n)]
    assert part.layout.longest == max(lengths)


def test_there_are_as_many_parts_as_the_bound_needs():
    assert count_parts([], 10) == count_parts([], None) == 0
    assert count_parts([3, 50, 4], None) == 1
    assert count_parts([5, 5, 5, 5], 10) == 2
    assert count_parts([6, 6, 6], 10) == 3
    assert count_parts([50, 3, 4], 10) == 2  # the longest stands alone
    assert count_parts([50, 60, 11], 10) == 3
    assert count_parts([10] * 1000, 19) == 1000


def test_a_rank_without_sequences_runs_the_same_passes(make_family_model):
    model = make_family_model("llama")
    batch = SequenceBatch.collate([], CPU, num_parts=2)
    assert len(batch.parts) == 2
    assert batch.token_ids_N.numel() == batch.order_N.numel() == 0
    hidden = read_hidden(model, batch)
    assert hidden.shape == (0, 32)
    hidden.sum().backward()
    gradients = [parameter.grad for parameter in model.base_model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
    assert len(SequenceBatch.collate([], CPU).parts) == 1


def test_reading_part_by_part_gives_the_gradient_of_the_whole(make_family_model):
    model = make_family_model("gpt2")
    batch = SequenceBatch.collate(make_trajectories(12), CPU, num_parts=4)
    weights = torch.randn(len(batch.order_N), 32, generator=torch.Generator().manual_seed(0))

    def gradient(run):
        model.zero_grad()
        run()
        return model.base_model.wpe.weight.grad.clone()

    def by_part():
        for part in batch.parts:
            (read_part(model, part) * weights[part.rows_n]).sum().backward()

    whole = gradient(lambda: (read_hidden(model, batch) * weights).sum().backward())
    torch.testing.assert_close(gradient(by_part), whole)


def test_the_same_trajectories_give_the_same_bits(make_family_model):
    model = make_family_model("llama", dtype=torch.float32)

    def run():
        model.zero_grad()
        batch = SequenceBatch.collate(_ragged(30), CPU, max_tokens=100)
        hidden = read_hidden(model, batch)
        hidden.pow(3).sum().backward()
        return [hidden.detach(), *(p.grad.clone() for p in model.base_model.parameters())]

    assert all(torch.equal(*pair) for pair in zip(run(), run(), strict=True))

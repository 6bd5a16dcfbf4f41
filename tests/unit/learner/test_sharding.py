"""Frozen matrices at rest: each rank of a shard keeps its rows, and all rows come back."""

from __future__ import annotations

import pytest
import torch
from process_groups import run_ranks

from distill_system.errors import ModelError
from distill_system.language_model import load_language_model
from distill_system.learner.sharding import build_mesh, find_blocks, gather, shard_rows

CPU = torch.device("cpu")


def _matrix(num_rows):
    return torch.arange(num_rows * 3, dtype=torch.float32).reshape(num_rows, 3)


def _shard(rank, num_ranks, shard_ranks, num_rows):
    mesh = build_mesh(CPU, num_ranks=num_ranks, shard_ranks=shard_ranks)
    whole = _matrix(num_rows)
    kept = shard_rows(whole, CPU, mesh)
    local = getattr(kept, "_local_tensor", kept)
    own = local.untyped_storage().nbytes() // (3 * 4)
    return gather(kept).tolist() == whole.tolist(), local[0].tolist(), len(local), own


@pytest.mark.parametrize(
    ("num_rows", "num_ranks", "shard_ranks", "kept"),
    [
        (67, 2, 2, [(0, 34), (34, 33)]),
        (10, 4, 2, [(0, 5), (5, 5), (0, 5), (5, 5)]),
        (67, 2, 1, [(0, 67), (0, 67)]),
    ],
    ids=["uneven", "replicas_of_shards", "copies"],
)
def test_ranks_of_a_shard_keep_their_rows_and_give_all_of_them_back(
    tmp_path, num_rows, num_ranks, shard_ranks, kept
):
    answers = run_ranks(num_ranks, tmp_path / "meeting", _shard, num_ranks, shard_ranks, num_rows)
    whole = _matrix(num_rows)
    for rank, (first, count) in enumerate(kept):
        is_whole, first_row, num_kept, num_in_memory = answers[rank]
        assert is_whole
        assert (first_row, num_kept) == (whole[first].tolist(), count)
        assert num_in_memory == count, "nobody holds the rows of others"


def test_a_rank_alone_keeps_every_row():
    assert torch.equal(gather(shard_rows(_matrix(67), CPU, None)), _matrix(67))


def test_a_models_blocks_are_found_in_their_order_and_nothing_else_is(tiny_model_folder):
    model = load_language_model(
        str(tiny_model_folder(num_layers=3)), dtype=torch.float32, device=CPU
    )
    blocks = find_blocks(model)
    assert len(blocks) == 3
    assert all(found is layer for found, layer in zip(blocks, model.model.layers, strict=True))


@pytest.mark.parametrize(("named", "said"), [(None, "none"), (["NoSuchBlock"], "NoSuchBlock")])
def test_a_model_that_does_not_name_its_blocks_is_told_what_runs_without(
    tiny_model_folder, named, said
):
    model = load_language_model(str(tiny_model_folder()), dtype=torch.float32, device=CPU)
    model._no_split_modules = named
    with pytest.raises(ModelError, match=rf"_no_split_modules\), got .*{said}.*learner.offload"):
        find_blocks(model)

"""A real learner group, sharded and with adapters, goes on from a checkpoint on other ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fakes.local_workers import LocalWorkers
from safetensors import safe_open
from trajectories import make_trajectories

from distill_system.config.model import LearnerConfig, LoraUpdate, OptimizerConfig
from distill_system.learner import LearnerGroup
from distill_system.records import Author

ROWS = make_trajectories(8, Author.DATASET)
SETTINGS = {
    "objective": None,
    "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
}
SHARDED, COPIES = LearnerConfig(shard_ranks="all"), LearnerConfig()


def _train(group, steps):
    return [
        group.finish_supervised(group.start_supervised(step, ROWS)).metrics["learner/loss"]
        for step in steps
    ]


def _save(group, folder):
    group.start_save(folder)
    files = group.finish_save(wait=True)
    assert group.find_alterations(folder, files) == []
    return files


@pytest.fixture
def make_group(make_learner, make_ranks):
    """One rank in this process, or several in their own."""

    def make(count, **changes):
        settings = {**SETTINGS, **changes}
        if count > 1:
            return LearnerGroup(make_ranks(count, **settings))
        return LearnerGroup(LocalWorkers([make_learner(**settings)]))

    return make


@pytest.fixture
def unbroken(make_group):
    """Losses of six steps of one rank that never stops."""
    return _train(make_group(1), range(6))


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, SHARDED), (2, COPIES)), ((2, COPIES), (1, COPIES)), ((1, COPIES), (2, SHARDED))],
    ids=["sharded_to_copies", "two_to_one", "one_to_two_sharded"],
)
def test_other_ranks_and_other_shards_go_on_from_it(make_group, unbroken, tmp_path, before, after):
    first = make_group(before[0], config=before[1])
    losses = _train(first, range(3))
    _save(first, tmp_path)
    second = make_group(after[0], config=after[1])
    second.load(tmp_path)
    assert losses + _train(second, range(3, 6)) == pytest.approx(unbroken, rel=1e-3)


def test_the_same_sharded_ranks_go_on_to_the_bit_while_the_first_ones_never_stopped(
    make_group, tmp_path
):
    group = make_group(2, config=SHARDED)
    _train(group, range(3))
    group.start_save(tmp_path)
    losses = _train(group, range(3, 6))  # beside the write
    assert group.finish_save(wait=True)
    group.load(tmp_path)
    assert _train(group, range(3, 6)) == losses


def test_adapters_alone_are_written_and_go_on_to_the_bit(make_group, make_learner, tmp_path):
    source = make_learner(objective=None).source
    update = LoraUpdate(type="lora", rank=4)
    settings = {"source": replace(source, update=update)}
    group = make_group(1, **settings)
    _train(group, range(3))
    files = _save(group, tmp_path)
    names = []
    for name in files:
        if name.endswith(".safetensors"):
            with safe_open(tmp_path / name, framework="pt") as file:
                names += list(file.keys())
    assert names
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    losses = _train(group, range(3, 6))
    resumed = make_group(1, **settings)
    resumed.load(tmp_path)
    assert _train(resumed, range(3, 6)) == losses

"""Checkpoints of a real writer on a real file system that is full, and then has room again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fakes.text_saver import TextSaver
from process_groups import TIMEOUT
from torch import nn

from distill_system.config.distill import BestConfig
from distill_system.errors import RunStateError
from distill_system.learner import find_alterations
from distill_system.learner.checkpoint import CheckpointWriter, load_checkpoint
from distill_system.observe import RunWrites
from distill_system.run.checkpoints import CheckpointStore


class _NoCritic:
    def compute_loss(self, heads, off_policy, on_policy, sum_over_ranks):
        raise AssertionError("a checkpoint makes no loss")

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert state == {}


class _Rank:
    """Implements run.checkpoints.Saver by the one rank of a learner."""

    def __init__(self):
        self.model = nn.Linear(64, 64)
        self.optimizers = [torch.optim.AdamW(self.model.parameters(), lr=0.1)]
        self.writer = CheckpointWriter(rank=0, timeout=TIMEOUT)

    def fill(self, value):
        nn.init.constant_(self.model.weight, value)

    def start_save(self, folder):
        self.writer.start(folder, self.model, self.optimizers, _NoCritic())

    def finish_save(self, *, wait):
        return self.writer.finish(wait=wait)

    def find_alterations(self, folder, files):
        return find_alterations(folder, files)

    def load(self, folder):
        load_checkpoint(folder, self.model, self.optimizers, _NoCritic(), rank=0)


def _store(disk, said):
    return CheckpointStore(disk.folder / "distill", keep=1, writes=RunWrites(said.append))


def _save(store, step, learner):
    store.start(step, {"at": step}, learner)
    assert store.finish(learner, wait=True), "nothing is under way any more"


def _steps(store):
    return sorted(path.name for path in store.folder.iterdir())


@pytest.fixture
def said():
    return []


@pytest.mark.parametrize("left_bytes", [0, 4096, 16_384, 40_960])
def test_a_full_disk_costs_that_checkpoint_alone(small_disk, said, left_bytes):
    """Full from its first file on, or in the middle: those before and after are whole."""
    store = CheckpointStore(small_disk.folder / "distill", keep=1, writes=RunWrites(said.append))
    learner = _Rank()
    learner.fill(1.0)
    _save(store, 1, learner)
    small_disk.fill(leave_bytes=left_bytes)
    learner.fill(2.0)
    _save(store, 2, learner)
    assert _steps(store) == ["step_000001"], "nothing half stays, and takes no room"
    [line] = said
    assert line.startswith("the checkpoint after step 2 could not be written: ")
    assert "No space left on device" in line or "o space" in line
    assert line.endswith(
        "step_000001 is the newest. The run goes on, and tries again with the next"
    )
    assert store.failure is not None

    latest = store.latest()
    assert latest is not None
    resumed = _Rank()
    store.load(latest, resumed)
    assert resumed.model.weight.unique().tolist() == [1.0]

    small_disk.free()
    learner.fill(3.0)
    _save(store, 3, learner)
    assert _steps(store) == ["step_000003"]
    assert store.failure is None
    learner.writer.close()


def test_without_any_whole_checkpoint_that_is_said(small_disk, said):
    store = CheckpointStore(small_disk.folder / "distill", keep=1, writes=RunWrites(said.append))
    small_disk.fill()
    learner: Any = TextSaver("one")
    _save(store, 5, learner)
    assert "No space left on device" in said[0]
    assert "; there is none before it. The run goes on" in said[0]
    small_disk.make_read_only()
    _save(store, 6, learner)
    assert "Read-only file system" in said[1]
    assert store.latest() is None


def test_a_checkpoint_of_the_same_step_stays_if_its_successor_fails(small_disk, said):
    store = CheckpointStore(small_disk.folder / "distill", keep=1, writes=RunWrites(said.append))
    learner: Any = TextSaver("first")
    _save(store, 5, learner)
    small_disk.fill()
    learner.text = "again" * 9000
    _save(store, 5, learner)
    assert len(said) == 1
    latest = store.latest()
    assert latest is not None
    store.load(latest, learner)
    assert learner.text == "first"


def test_old_checkpoints_that_cannot_be_judged_all_stay(tmp_path, said):
    best = BestConfig(metric="held_out/x", mode="min")
    store = CheckpointStore(tmp_path, keep=1, best=best, writes=RunWrites(said.append))
    learner: Any = TextSaver("one")
    _save(store, 1, learner)
    (tmp_path / "step_000001" / "state.json").write_text("broken")
    _save(store, 2, learner)
    assert _steps(store) == ["step_000001", "step_000002"]
    assert "state.json is not JSON" in said[0]


def test_another_failure_of_the_learner_is_not_taken_for_a_full_disk(tmp_path, said):
    store = CheckpointStore(tmp_path, keep=1, writes=RunWrites(said.append))
    learner: Any = TextSaver("one")
    learner.failure = ValueError("a fault of ours")
    store.start(1, {}, learner)
    with pytest.raises(ValueError, match="a fault of ours"):
        store.finish(learner, wait=True)
    learner.failure = RunStateError("the checkpoint cannot be written")
    assert store.finish(learner, wait=True)
    assert len(said) == 1

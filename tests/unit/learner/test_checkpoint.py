"""Checkpoints of plain and of sharded models: whole, of one moment, and good for other rank counts.

A reference that never stops, and weights read back by safetensors alone, are what it is held to.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from process_groups import TIMEOUT, run_ranks
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distill_system.errors import RunStateError
from distill_system.learner.checkpoint import CheckpointWriter, load_checkpoint
from distill_system.learner.checkpoint_files import find_alterations


class _Model(nn.Module):
    """A tied head, a matrix for Muon, a vector with fewer elements than ranks, a buffer."""

    def __init__(self, *, hidden=8, frozen=False):
        super().__init__()
        self.embed = nn.Embedding(13, hidden)
        self.middle = nn.Linear(hidden, hidden)
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(hidden, 13, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(3))
        self.embed.weight.requires_grad_(not frozen)

    def forward(self, ids):
        hidden = torch.tanh(self.middle(self.embed(ids))) * self.scale
        return self.head(hidden)


class _Critic:
    """What the learner asks of an objective, as far as a checkpoint goes."""

    def __init__(self):
        self.state = {}

    def compute_loss(self, heads, off_policy, on_policy, sum_over_ranks):
        raise AssertionError("a checkpoint makes no loss")

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def _build(*, seed=0, sharded=False, **shape):
    torch.manual_seed(seed)
    model = _Model(**shape)
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model, mesh=mesh)
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [model.middle.weight]
    others = [p for p in trained if p is not model.middle.weight]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.1),
        torch.optim.AdamW(others, lr=0.1),
    ]
    return SimpleNamespace(model=model, optimizers=optimizers, critic=_Critic())


def _step(made, step):
    """The same batch on every rank, so that any number of ranks makes the same update."""
    ids = torch.arange(6) * (step + 2) % 13
    loss = nn.functional.cross_entropy(made.model(ids), (ids + 1) % 13)
    loss.backward()
    for optimizer in made.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    made.critic.state = {"phi_HE": torch.full((2, 3), float(loss.detach())).double()}
    return float(loss.detach())


def _whole(tensor):
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor.detach().clone()


def _weights(made):
    return {name: _whole(parameter) for name, parameter in made.model.named_parameters()}


def _start(made, folder, *, rank=0):
    writer = CheckpointWriter(rank=rank, timeout=TIMEOUT)
    writer.start(folder, made.model, made.optimizers, made.critic)
    return writer


def _save(made, folder):
    writer = _start(made, folder)
    files = writer.finish(wait=True)
    writer.close()
    return files


def _load(made, folder, *, rank=0):
    load_checkpoint(folder, made.model, made.optimizers, made.critic, rank=rank)


def _stored(folder):
    tensors = {}
    for path in sorted((folder / "model").iterdir()):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def test_a_checkpoint_is_of_the_moment_it_was_begun_at_whatever_happens_since(tmp_path):
    made = _build()
    for step in range(3):
        _step(made, step)
    at_start, critic = _weights(made), made.critic.state["phi_HE"].clone()
    writer = _start(made, tmp_path)
    unbroken = [_step(made, step) for step in range(3, 8)]  # beside the write
    files = writer.finish(wait=True)
    writer.close()
    assert files.keys() == {
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()
    }

    resumed = _build(seed=9)
    _load(resumed, tmp_path)
    for name, weight in _weights(resumed).items():
        assert torch.equal(weight, at_start[name]), name
    assert torch.equal(resumed.critic.state["phi_HE"], critic)
    assert resumed.critic.state["phi_HE"].dtype == torch.float64
    assert [_step(resumed, step) for step in range(3, 8)] == unbroken


def test_the_weights_stand_as_safetensors_each_once(tmp_path):
    made = _build()
    _save(made, tmp_path)
    stored = _stored(tmp_path)
    assert stored.keys() == {"embed.weight", "middle.weight", "middle.bias", "scale", "seen"}
    assert torch.equal(stored["embed.weight"], made.model.head.weight)


def test_frozen_weights_are_not_written_and_stay_as_they_are(tmp_path):
    made = _build(frozen=True)
    _step(made, 0)
    _save(made, tmp_path)
    assert "embed.weight" not in _stored(tmp_path)
    assert "head.weight" not in _stored(tmp_path)
    other = _build(seed=4, frozen=True)
    base = other.model.embed.weight.clone()
    _load(other, tmp_path)
    assert torch.equal(other.model.embed.weight, base)
    assert torch.equal(other.model.middle.weight, made.model.middle.weight)


def test_random_numbers_go_on_where_they_were(tmp_path):
    made = _build()
    torch.manual_seed(5)
    torch.rand(7)
    _save(made, tmp_path)
    expected = torch.rand(4)
    torch.manual_seed(6)
    _load(made, tmp_path)
    assert torch.equal(torch.rand(4), expected)


def test_a_new_rank_draws_numbers_of_its_own_the_same_each_time(tmp_path):
    made = _build()
    _save(made, tmp_path)
    drawn = {}
    for rank in (0, 1, 2, 1):
        torch.manual_seed(rank + 77)
        _load(made, tmp_path, rank=rank)
        first = torch.rand(4)
        assert torch.equal(first, drawn.setdefault(rank, first))
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


def test_a_large_model_goes_into_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr("distill_system.learner.checkpoint.SHARD_FILE_BYTES", 300)
    made = _build()
    files = _save(made, tmp_path)
    assert {name for name in files if name.startswith("model/")} == {
        f"model/shard-00001-model-{part:05d}-of-00003.safetensors" for part in (1, 2, 3)
    }
    other = _build(seed=4)
    _load(other, tmp_path)
    assert torch.equal(other.model.middle.weight, made.model.middle.weight)


def test_a_model_of_other_shape_or_other_weights_is_refused(tmp_path):
    _save(_build(), tmp_path)
    with pytest.raises(
        RunStateError, match=r"cannot be loaded into this learner: rank 0: .*Remove"
    ):
        _load(_build(hidden=4), tmp_path)
    with pytest.raises(RunStateError, match=r"of another model.*holds \['embed.weight'\] of 1"):
        _load(_build(frozen=True), tmp_path)


def test_the_first_weights_of_another_model_are_named_in_their_order(tmp_path):
    made = _build()
    for name in "gfbedca":
        made.model.register_buffer(f"extra_{name}", torch.zeros(2))
    _save(made, tmp_path)
    four = r"\['extra_a', 'extra_b', 'extra_c', 'extra_d'\] of 7"
    with pytest.raises(RunStateError, match=rf"lacks the weights \[\] of 0 and holds {four}"):
        _load(_build(), tmp_path)
    _save(_build(), tmp_path / "plain")
    with pytest.raises(RunStateError, match=rf"lacks the weights {four} and holds \[\] of 0"):
        _load(made, tmp_path / "plain")


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "a_file").write_text("")
    writer = _start(_build(), tmp_path / "a_file")
    with pytest.raises(RunStateError, match=r"cannot be written.*the disk has room"):
        writer.finish(wait=True)
    writer.close()


def test_missing_truncated_and_altered_files_are_named(tmp_path):
    made = _build()
    files = _save(made, tmp_path)
    assert find_alterations(tmp_path, files) == []
    [weights] = [name for name in files if name.startswith("model/")]
    whole = (tmp_path / weights).read_bytes()
    (tmp_path / weights).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    [altered] = find_alterations(tmp_path, files)
    assert altered.startswith(f"{weights} was altered: its CRC-32 is ")
    (tmp_path / weights).write_bytes(whole[:-1])
    (tmp_path / "training" / ".metadata").unlink()
    assert find_alterations(tmp_path, files) == [
        f"{weights} has {len(whole) - 1} bytes, was written with {len(whole)}",
        "training/.metadata is missing",
    ]


def _train_and_save(rank, folder):
    made = _build(sharded=True)
    losses = [_step(made, step) for step in range(3)]
    at_save = {name: weight.tolist() for name, weight in _weights(made).items()}
    torch.manual_seed(100 + rank)
    writer = _start(made, folder, rank=rank)
    losses += [_step(made, step) for step in range(3, 6)]  # its collectives pass the write's
    files = writer.finish(wait=True)
    writer.close()
    return losses, {name: tuple(record) for name, record in files.items()}, at_save


def _load_and_train(rank, folder):
    made = _build(seed=9, sharded=True)
    _load(made, folder, rank=rank)
    drawn = torch.rand(3).tolist()
    return [_step(made, step) for step in range(3, 6)], drawn


def test_two_sharded_ranks_resume_as_two_and_as_one(tmp_path):
    folder = tmp_path / "checkpoint"
    saved = run_ranks(2, tmp_path / "a", _train_and_save, folder)
    losses = saved[0][0]
    assert saved[1][0] == losses
    reference = _build()
    # Muon orthogonalises in bfloat16: a gradient's last bit becomes 2^-8 of an update.
    assert [_step(reference, step) for step in range(6)] == pytest.approx(losses, rel=3e-3)
    written = saved[0][1] | saved[1][1]
    assert not saved[0][1].keys() & saved[1][1].keys()
    assert sum(name.startswith("model/") for name in written) == 2, "a shard a rank"
    on_disk = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert written.keys() == on_disk

    two = run_ranks(2, tmp_path / "b", _load_and_train, folder)
    assert two[0][0] == two[1][0] == losses[3:]
    for rank in (0, 1):
        torch.manual_seed(100 + rank)
        assert two[rank][1] == torch.rand(3).tolist()

    one = _build(seed=9)
    _load(one, folder)
    assert {name: weight.tolist() for name, weight in _weights(one).items()} == saved[0][2]
    torch.manual_seed(100)
    assert [_step(one, step) for step in range(3, 6)] == pytest.approx(losses[3:], rel=3e-3)


def test_one_rank_resumes_as_two(tmp_path):
    one = _build()
    for step in range(3):
        _step(one, step)
    _save(one, tmp_path / "checkpoint")
    losses = [_step(one, step) for step in range(3, 6)]
    two = run_ranks(2, tmp_path / "a", _load_and_train, tmp_path / "checkpoint")
    assert two[0][0] == two[1][0] == pytest.approx(losses, rel=3e-3)
    assert two[0][1] != two[1][1], "the new rank draws numbers of its own"

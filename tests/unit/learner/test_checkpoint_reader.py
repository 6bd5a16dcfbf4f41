"""Forged checkpoints whose checksums fit: their commands are not executed, and they are refused."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import shutil
import subprocess
from contextlib import suppress
from pathlib import PosixPath

import pytest
import torch
from process_groups import TIMEOUT
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from distill_system.errors import RunStateError
from distill_system.learner.checkpoint import CheckpointWriter, load_checkpoint
from distill_system.learner.checkpoint_files import describe_file, find_alterations
from distill_system.learner.checkpoint_reader import read_table

TABLE = "training/.metadata"


class _NoCritic:
    """What the learner asks of an objective, as far as a checkpoint goes."""

    def compute_loss(self, heads, off_policy, on_policy, sum_over_ranks):
        raise AssertionError("a checkpoint makes no loss")

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert state == {}


def _model():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    return model, [torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.5, 0.75))]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model, optimizers = _model()
    model(torch.ones(2, 4)).sum().backward()
    optimizers[0].step()
    writer = CheckpointWriter(rank=0, timeout=TIMEOUT)
    writer.start(folder, model, optimizers, _NoCritic())
    files = writer.finish(wait=True)
    writer.close()
    return folder, files


@pytest.fixture
def checkpoint(written, tmp_path):
    """A checkpoint of its own, which a test may damage, and the names of its files."""
    folder, files = written
    shutil.copytree(folder, tmp_path / "step_000001")
    return tmp_path / "step_000001", files


def _load(folder):
    model, optimizers = _model()
    load_checkpoint(folder, model, optimizers, _NoCritic(), rank=0)
    return optimizers[0]


class _Forged:
    """Calls a function as it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def _forge(folder, files, value):
    """A table of contents in place of the right one, with a checksum that fits."""
    (folder / TABLE).write_bytes(pickle.dumps(value))
    refreshed = {name: describe_file(folder / name) for name in files}
    assert find_alterations(folder, refreshed) == [], "the checksums say nothing"


def _commands(mark):
    return {
        "os.system": _Forged(os.system, f"touch {mark}"),
        "subprocess": _Forged(subprocess.call, ["touch", str(mark)]),
        "exec": _Forged(builtins.exec, f"import os; os.mkdir({str(mark)!r})"),
        "os.mkdir": _Forged(os.mkdir, str(mark)),
        "a method of a path": _Forged(PosixPath.touch, PosixPath(mark)),
        "torch.save": _Forged(torch.save, 1, str(mark)),
    }


@pytest.mark.parametrize("name", list(_commands("")))
@pytest.mark.parametrize("inside", [False, True])
def test_a_forged_table_is_refused_by_name_and_executes_nothing(checkpoint, tmp_path, name, inside):
    folder, files = checkpoint
    mark = tmp_path / "executed"
    forged = _commands(mark)[name]
    _forge(folder, files, Metadata({}, planner_data=[forged]) if inside else forged)
    with pytest.raises(RunStateError, match=r"training/\.metadata: expected the table.*it names"):
        _load(folder)
    assert not mark.exists()
    assert _falls_for_it(folder, mark), "the forgery is a real one"


def _falls_for_it(folder, mark):
    """Whether torch's own reader executes what the file asks for."""
    with suppress(Exception):
        FileSystemReader(folder / "training").read_metadata()
    return mark.exists()


def test_a_forged_entry_is_refused_and_executes_nothing(checkpoint, tmp_path):
    """What is no tensor, such as a learning rate, stands as a pickle among the tensors."""
    folder, files = checkpoint
    mark = tmp_path / "executed"
    table = FileSystemReader(folder / "training").read_metadata()
    index = next(key for key in table.storage_data if key.fqn.endswith(".lr"))
    info = table.storage_data[index]
    forged = io.BytesIO()
    torch.save(_Forged(os.system, f"touch {mark}"), forged)
    path = folder / "training" / info.relative_path
    info.offset, info.length = path.stat().st_size, len(forged.getvalue())
    path.write_bytes(path.read_bytes() + forged.getvalue())
    _forge(folder, files, table)
    with pytest.raises(RunStateError, match=rf"entry {index.fqn} is no plain value"):
        _load(folder)
    assert not mark.exists()


@pytest.mark.parametrize("damage", [b"", b"no pickle", b"\x80\x05.", b"\x80\x05)."])
def test_a_damaged_table_is_refused(checkpoint, damage):
    folder, _ = checkpoint
    (folder / TABLE).write_bytes(damage)
    with pytest.raises(RunStateError, match=r"training/\.metadata: expected the table of a chec"):
        _load(folder)


def test_a_table_that_leads_out_of_its_folder_is_refused(checkpoint):
    folder, files = checkpoint
    table = FileSystemReader(folder / "training").read_metadata()
    next(iter(table.storage_data.values())).relative_path = "../../secret"
    _forge(folder, files, table)
    with pytest.raises(RunStateError, match=r"a file outside of its folder, '\.\./\.\./secret'"):
        _load(folder)


def test_a_table_is_read_as_torch_reads_it(written):
    folder, _ = written
    ours, theirs = (
        read_table(folder / TABLE),
        FileSystemReader(folder / "training").read_metadata(),
    )
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    assert ours.planner_data == theirs.planner_data


def test_settings_of_an_optimizer_come_back_as_they_were(written):
    folder, _ = written
    model, _ = _model()
    other = torch.optim.AdamW(model.parameters(), lr=0.9, betas=(0.1, 0.2))
    load_checkpoint(folder, model, [other], _NoCritic(), rank=0)
    assert other.param_groups[0]["lr"] == 0.1
    assert other.param_groups[0]["betas"] == (0.5, 0.75)

"""An exported model stands whole or not at all, and loads in plain transformers."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes.local_workers import LocalWorkers
from tiny_families import save_family
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from distill_system.errors import RunStateError
from distill_system.learner import Learner, LearnerGroup
from distill_system.learner.export_weights import save_model
from distill_system.observe import RunWrites
from distill_system.run.export import export_model
from distill_system.run.vocabulary import stop_token_ids


class Exporter:
    """A learner's last duty; `breaks` ends it halfway, as a full disk does."""

    def __init__(self, folder, *, breaks=False):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.breaks = breaks

    def export(self, folder, dtype):
        assert dtype == "float32", "unless the caller asks for another"
        self.model.save_pretrained(folder)
        if self.breaks:
            raise OSError("no space left on device")


@pytest.fixture
def context(configure, tiny_model_folder):
    return _context(configure(), AutoTokenizer.from_pretrained(tiny_model_folder()))


def _context(config, tokenizer) -> Any:
    return SimpleNamespace(config=config, tokenizer=tokenizer, writes=RunWrites())


def _export(context, source, folder, **options):
    learner = LearnerGroup(LocalWorkers([Exporter(source, **options)], stands_for=Learner))
    export_model(context, learner, folder, facts={"steps": 3})


def test_the_folder_loads_in_plain_transformers_with_its_card(context, tiny_model_folder, tmp_path):
    source = tiny_model_folder(seed=4)
    _export(context, source, tmp_path / "student")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, weight in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert tokenizer("w7 w8")["input_ids"] == [7, 8]
    assert "| steps | 3 |" in (tmp_path / "student/README.md").read_text()
    assert [path.name for path in tmp_path.glob("student*")] == ["student"]


def test_a_failure_halfway_leaves_no_folder_that_counts_as_done(
    context, tiny_model_folder, tmp_path
):
    with pytest.raises(RunStateError, match=r"cannot be exported to .*student: no space.*--resume"):
        _export(context, tiny_model_folder(), tmp_path / "student", breaks=True)
    assert not (tmp_path / "student").exists()
    _export(context, tiny_model_folder(), tmp_path / "student")
    assert [path.name for path in tmp_path.glob("student*")] == ["student"]


def test_the_export_stops_where_the_run_stopped(configure, tmp_path):
    """The teacher's generation config ends a turn by two tokens, the base student's by another."""
    save_family(tmp_path / "teacher", "llama", end_ids=[9, 7])
    source = save_family(tmp_path / "base", "llama", end_ids=5, seed=1)
    config = configure(f"teacher.path={tmp_path / 'teacher'}", f"student.path={source}")
    tokenizer = AutoTokenizer.from_pretrained(source)
    _export(_context(config, tokenizer), source, tmp_path / "student")
    assert GenerationConfig.from_pretrained(tmp_path / "student").eos_token_id == [2, 5, 7, 9]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    ends = set(stop_token_ids(config, tokenizer))
    for first in range(10, 30):
        ids = torch.tensor([[1, first]])
        written = model.generate(ids, max_new_tokens=40, do_sample=True)[0, 2:].tolist()
        stops = [index for index, token in enumerate(written) if token in ends]
        assert stops in ([], [len(written) - 1]), "transformers ends at the run's first end"


def test_vllm_reads_the_same_ends(configure, tmp_path):
    reader = pytest.importorskip("vllm.transformers_utils.config")
    source = save_family(tmp_path / "base", "llama", end_ids=[5, 7, 9])
    config = configure(f"teacher.path={source}", f"student.path={source}")
    tokenizer = AutoTokenizer.from_pretrained(source)
    _export(_context(config, tokenizer), source, tmp_path / "student")
    seen = reader.try_get_generation_config(str(tmp_path / "student"), trust_remote_code=False)
    assert seen.eos_token_id == [2, 5, 7, 9]


def test_a_full_disk_is_told_and_gets_its_room_back(context, tiny_model_folder, small_disk):
    """The weights alone are larger than the disk; they are written as a learner writes them."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder(seed=4), dtype=torch.float32)
    direct, folder = small_disk.folder / "direct", small_disk.folder / "student"
    with pytest.raises(RunStateError, match=r"(?i)no space left on device"):
        save_model(model, direct, model.state_dict(), dtype=torch.float32)
    shutil.rmtree(direct)

    learner: Any = SimpleNamespace(
        export=lambda folder, _: save_model(model, folder, model.state_dict(), dtype=torch.float32)
    )
    with pytest.raises(RunStateError, match=r"cannot be exported to .*/student: .*Make room"):
        export_model(context, learner, folder, facts={})
    assert list(small_disk.folder.iterdir()) == []

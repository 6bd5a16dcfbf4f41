"""Pushing a finished student: asked for, once, with the environment's token, losing nothing."""

from __future__ import annotations

import json
import shutil

import pytest
from fakes.hub import FakeHub

from distill_system.errors import ConfigError, RunStateError
from distill_system.observe import RunDirectory
from distill_system.stages.push import push_student
from distill_system.stages.train import train

HUB = "hub={repository: someone/tiny-student}"


@pytest.fixture
def finished(tiny_model_folder, tmp_path):
    """A run's folder with an exported student in it."""

    def make(config):
        run = RunDirectory(f"{config.runs_directory}/{config.name}")
        shutil.copytree(tiny_model_folder(seed=3), run.student_directory)
        (run.student_directory / "README.md").write_text(
            "---\nlibrary_name: transformers\n---\n# x"
        )
        return run

    return make


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    return FakeHub(token="hf_secret")


def _push(config, run, hub):
    said = []
    address = push_student(config, run, notify=said.append, connect=hub.client)
    return address, said


def test_the_whole_folder_arrives_in_a_private_repository_and_only_once(configure, finished, hub):
    config = configure(HUB)
    run = finished(config)
    address, said = _push(config, run, hub)
    made = hub.repositories["someone/tiny-student"]
    assert made["private"]
    files = {
        str(p.relative_to(run.student_directory)): p.read_bytes()
        for p in run.student_directory.rglob("*")
        if p.is_file()
    }
    assert made["branches"]["main"] == files
    assert address == "https://hub/someone/tiny-student/commit/1"
    assert "someone/tiny-student" in said[0]
    assert _push(config, run, hub) == (address, [])
    assert hub.uploads == 1


def test_another_student_or_another_branch_is_pushed_again(configure, finished, hub):
    config = configure(HUB)
    run = finished(config)
    _push(config, run, hub)
    branch = configure("hub={repository: someone/tiny-student, branch: second, private: false}")
    _push(branch, run, hub)
    assert set(hub.repositories["someone/tiny-student"]["branches"]) == {"main", "second"}
    shutil.rmtree(run.student_directory)
    finished(config)
    _push(branch, run, hub)
    assert hub.uploads == 3


def test_nothing_is_pushed_unless_asked(configure, finished, hub):
    config = configure()
    assert _push(config, finished(config), hub) == (None, [])
    assert hub.repositories == {}


def test_a_failure_is_told_in_one_line_keeps_the_export_and_may_be_tried_again(
    configure, finished, hub
):
    config = configure(HUB)
    run = finished(config)
    hub.down = True
    with pytest.raises(RunStateError, match=r"Cannot reach the hub\. It stands in .*/student;"):
        _push(config, run, hub)
    assert (run.student_directory / "model.safetensors").exists()
    hub.down = False
    assert _push(config, run, hub)[0] == "https://hub/someone/tiny-student/commit/2"


def test_without_a_token_the_run_is_refused_before_it_begins(configure, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="environment variable HF_TOKEN, which is not set"):
        train(configure(HUB))
    assert not (tmp_path / "runs").exists()


def test_the_token_is_in_no_file_of_the_run(configure, finished, hub):
    config = configure(HUB)
    run = finished(config)
    _push(config, run, hub)
    texts = [p.read_bytes() for p in run.path.rglob("*") if p.is_file()]
    assert texts
    assert not any(b"hf_secret" in text for text in texts)
    assert "token" not in json.dumps(config.model_dump(mode="json")["hub"])


@pytest.mark.parametrize(
    "name", ["student", "a/b/c", "a/--b", "a/b.git", "a/b..c", "-a/b", "a b/c"]
)
def test_a_name_that_the_hub_would_refuse_is_refused_at_once(configure, name):
    with pytest.raises(ConfigError, match=r"hub\.repository.*expected owner/name"):
        configure(f"hub={{repository: '{name}'}}")

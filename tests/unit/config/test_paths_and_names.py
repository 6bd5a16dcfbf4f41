"""Names that no file can have, numbers that no run can: refused by key before anything begins."""

from __future__ import annotations

import errno
import os

import pytest
from typer.testing import CliRunner

from distill_system.cli import app
from distill_system.config import load_config
from distill_system.errors import ConfigError

NUL, LONG, DEEP = "a\0b", "x" * 256, "x/" * 2048


@pytest.mark.parametrize(
    "key",
    [
        "runs_directory",
        "data.directory",
        "data.prompts.path",
        "data.evaluation.test.path",
        "data.trajectory_store",
        "data.cache_directory",
        "teacher.path",
        "student.path",
    ],
)
@pytest.mark.parametrize(
    ("path", "said"),
    [
        (NUL, "no file's path holds a NUL character"),
        (LONG, "names of at most 255 in it, got 256 and 256"),
        (DEEP, "a path of at most 4095 bytes .* got 4096"),
        ("a\udc80b", "UTF-8"),
    ],
)
def test_a_path_that_no_file_has_is_refused_by_its_key(configure, key, path, said):
    section, _, last = key.rpartition(".")
    tree = {last: path}
    for name in reversed(section.split(".") if section else []):
        tree = {name: tree}
    base = configure().model_dump(mode="json")
    with pytest.raises(ConfigError, match=rf"(?s){key.replace('.', '[.]')}.*{said}") as caught:
        load_config([base, tree])
    assert len(str(caught.value)) < 700


def test_the_longest_names_that_a_file_can_have_are_taken(configure):
    longest = "/".join(["x" * 255] * 15)
    assert configure(f"runs_directory={longest}").runs_directory == longest


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("pools.student_rollout.count=100000", "whole number > 0 and <= 10000, got 100000"),
        ("pools.teacher_rollout.max_count=10001", "<= 10000 or null, got 10001"),
        ('pools.learner.custom_resources={"": 1}', "name of a custom resource .* got ''"),
        ('pools.learner.custom_resources={"GPU": 1}', "got 'GPU'; CPUs and GPUs are cpus and gp"),
        ('pools.learner.custom_resources={"a\\0": 1}', "name of a custom resource"),
        (f"name={'n' * 201}", "at most 200 characters, got 201"),
        (
            f"data.evaluation={{{'e' * 101}: {{type: jsonl, path: x.jsonl}}}}",
            "at most 100 of them",
        ),
    ],
)
def test_what_no_cluster_and_no_folder_could_hold_is_refused(configure, override, said):
    with pytest.raises(ConfigError, match=said):
        configure(override)


def _said(*arguments):
    answer = CliRunner().invoke(app, list(arguments))
    assert answer.exit_code == 1, answer.output
    return answer.output


@pytest.mark.parametrize("path", [f"{NUL}.yaml", f"{LONG}.yaml", "a\udc80b.yaml"])
def test_a_configuration_of_an_impossible_name_is_told(path):
    assert "ConfigError: no configuration file: " in _said("train", path)


def test_a_pipe_is_no_configuration(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "expected a YAML file, got a pipe or a device" in _said("train", f"{tmp_path}/pipe.yaml")


def test_an_override_may_end_as_a_file_does_and_a_file_may_hold_an_equals_sign(tmp_path):
    assert "data.prompts.path=x.yaml" not in _said("plan", "data.prompts.path=x.yaml")
    file = tmp_path / "lr=0.1.yaml"
    file.write_text("names: mine")
    assert f"names ({file}:1): unknown key" in _said("plan", str(file))


@pytest.mark.parametrize("name", ["", ".", "..", "/", NUL, LONG, "a\udc80b"])
def test_a_method_of_an_impossible_name_is_told(tmp_path, name):
    (tmp_path / "run.yaml").write_text("{}")
    said = _said("train", str(tmp_path / "run.yaml"), "--objective", name)
    assert "ConfigError: expected the name of a method or a YAML file, got " in said


@pytest.mark.parametrize("name", [NUL, LONG, "a\udc80b"])
def test_a_run_or_a_model_of_an_impossible_name_is_told(configure, tmp_path, name):
    assert "no run " in _said("scale", name, "student_rollout=2")
    (tmp_path / "run.json").write_text(configure().model_dump_json())
    assert "--model" in _said("evaluate", f"{tmp_path}/run.json", "--model", f"{name}")


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "Make room on the disk"), (errno.ENOENT, "See that this path is right")],
)
def test_the_way_out_of_an_error_of_the_file_system_fits_it(monkeypatch, number, said):
    def fail(*_):
        raise OSError(number, os.strerror(number), "mine")

    monkeypatch.setattr("distill_system.config.load_config", fail)
    assert said in _said("plan", "mine.yaml")

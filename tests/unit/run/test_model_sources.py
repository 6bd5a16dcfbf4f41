"""A .gguf file is a model's path: the run makes a folder of it, once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from distill_system.config import RunConfig
from distill_system.errors import ModelError
from distill_system.observe import RunDirectory
from distill_system.run import model_sources
from distill_system.run.context import model_path
from distill_system.run.model_checks import check_folders
from distill_system.run.model_sources import find_gguf_files, with_folders

Configure = Callable[..., RunConfig]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "runs/run")


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files that were converted, by a stand-in; test_gguf_files.py converts real ones."""
    done: list[Path] = []

    def convert(file: Path, folder: Path) -> Path:
        done.append(file)
        folder.mkdir()
        return folder

    monkeypatch.setattr(model_sources, "convert_gguf", convert)
    return done


def test_folders_stay_as_they_are(configure: Configure, run: RunDirectory) -> None:
    config = configure()
    assert with_folders(config, run) is config
    assert not run.path.exists()


def test_a_file_becomes_a_folder_of_the_run_once(
    configure: Configure, run: RunDirectory, conversions: list[Path]
) -> None:
    config = configure("teacher.path=some/Model.Q4.GGUF")
    first = with_folders(config, run)
    assert first.teacher.path == str(run.models_directory / "teacher")
    assert first.student == config.student
    assert first.tokenizer == config.tokenizer
    assert model_path(first, run, "teacher") == str(run.models_directory / "teacher")
    assert with_folders(config, run) == first
    assert conversions == [Path("some/Model.Q4.GGUF")]


def test_both_models_may_be_files(
    configure: Configure, run: RunDirectory, conversions: list[Path]
) -> None:
    with_folders(configure("teacher.path=a.gguf", "student.path=b.gguf"), run)
    assert {path.name for path in run.models_directory.iterdir()} == {"teacher", "student"}
    assert conversions == [Path("a.gguf"), Path("b.gguf")]


def test_files_are_found_among_the_models(configure: Configure) -> None:
    assert find_gguf_files(configure()) == []
    assert find_gguf_files(configure("student.path=a/b.gguf")) == ["a/b.gguf"]


def test_where_no_run_makes_a_folder_the_lines_that_do_are_told(
    configure: Configure, tmp_path: Path
) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    for key in ("teacher.path", "tokenizer.path"):
        with pytest.raises(ModelError, match=rf"{key}=.*is a \.gguf file.*convert_gguf\(Path"):
            check_folders(configure(f"{key}={tmp_path / 'tiny.gguf'}"))


def test_a_file_that_is_not_there_is_told_with_its_key(
    configure: Configure, run: RunDirectory
) -> None:
    with pytest.raises(ModelError, match=r"student\.path: '.*nowhere\.gguf': .*found none"):
        with_folders(configure("student.path=nowhere.gguf"), run)

import json
import math
from pathlib import Path

import pytest

from distill_system.errors import RunStateError
from distill_system.observe.run_directory import (
    RunDirectory,
    read_json,
    remove_half_written,
    write_json,
)


def test_every_path_lies_in_the_run_and_none_twice(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    paths = [path for name, path in vars(run).items() if name != "path"]
    paths.append(run.evaluation_path("after"))
    assert len(paths) > 10
    assert len(set(paths)) == len(paths)
    assert all(path.is_relative_to(tmp_path) for path in paths)
    assert not list(tmp_path.iterdir())


def test_written_json_is_read_back_with_null_for_what_json_lacks(tmp_path: Path) -> None:
    path = tmp_path / "new" / "value.json"
    write_json(path, {"a": math.nan, "b": [math.inf, 1.5], "text": "läuft"})
    assert read_json(path) == {"a": None, "b": [None, 1.5], "text": "läuft"}
    assert [entry.name for entry in path.parent.iterdir()] == ["value.json"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        write_json(path, {"a": "\ud800"})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["value.json"]


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunStateError, match=r"config\.json is missing"):
        read_json(tmp_path / "config.json")
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(RunStateError, match=r"half\.json is not JSON"):
        read_json(tmp_path / "half.json")


def test_what_a_killed_write_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = ("value.json", ".hidden", ".metadata", "a.1.2", "evaluations/.keep.1")
    left = (".value.json.123.140", "evaluations/.before.json.7.8")
    (tmp_path / "evaluations").mkdir()
    for name in (*kept, *left):
        (tmp_path / name).write_text("")
    remove_half_written(tmp_path)
    there = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert there == {*kept}


def test_a_killed_write_is_of_the_kind_that_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As signal 9 leaves it: neither renamed nor tidied up."""
    with monkeypatch.context() as killed:
        killed.setattr(Path, "replace", lambda *_: None)
        killed.setattr(Path, "unlink", lambda *_, **__: None)
        write_json(tmp_path / "value.json", {})
    assert len(list(tmp_path.iterdir())) == 1
    remove_half_written(tmp_path)
    assert list(tmp_path.iterdir()) == []

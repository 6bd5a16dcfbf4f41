import json
import subprocess
from pathlib import Path

import pytest

from distill_system.observe.environment import find_git_commit, write_environment
from distill_system.observe.run_directory import RunDirectory, read_json


def run_git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_environment_names_versions_machine_and_seeds_but_no_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_mine")
    run = RunDirectory(tmp_path)
    write_environment(run, seeds={"run": 3})
    environment = read_json(run.environment_path)
    assert environment["seeds"] == {"run": 3}
    assert {"python", "distill-system", "torch", "ray"} <= set(environment["versions"])
    assert environment["machine"]["cores"] >= 1
    assert "hf_secret_of_mine" not in json.dumps(environment)


def test_the_commit_is_that_of_the_repository_that_tracks_the_folder(tmp_path: Path) -> None:
    package, installed = tmp_path / "package", tmp_path / ".venv" / "package"
    for folder in (package, installed):
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    assert find_git_commit(package) is None
    run_git(tmp_path, "init")
    run_git(tmp_path, "add", "package")
    assert find_git_commit(package) is None  # tracked, but there is no commit yet
    run_git(tmp_path, "commit", "-m", "first")
    (tmp_path / ".git" / "info" / "exclude").write_text(".venv\n")
    commit = run_git(tmp_path, "rev-parse", "HEAD")
    assert find_git_commit(package) == {"commit": commit, "dirty": False}
    assert find_git_commit(installed) is None
    (package / "__init__.py").write_text("changed = True\n")
    assert find_git_commit(package) == {"commit": commit, "dirty": True}

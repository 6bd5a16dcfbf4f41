"""Pushes a run's exported student to the Hugging Face hub, if the configuration asks for it.

The folder of the student is only read: whatever goes wrong, the export stands, and the same command
tries again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from huggingface_hub import HfApi
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from distill_system.config import RunConfig
from distill_system.config.export import HubConfig
from distill_system.errors import ConfigError, RunStateError
from distill_system.observe import RunDirectory
from distill_system.observe.run_directory import read_form_if_exists, write_json

TOKEN_VARIABLE = "HF_TOKEN"
PUSH_RECORD = "pushed.json"
"""In the run's folder: what was pushed where."""


class _Record(TypedDict):
    repository: str
    branch: str
    student: int
    commit: str


_RECORD_FORM: TypeAdapter[Any] = TypeAdapter(_Record)


def require_token(config: RunConfig) -> None:
    """Refuse a push that cannot succeed, before hours of work that it would follow.

    Raises: ConfigError if the environment holds no token.
    """
    if config.hub is not None and not os.environ.get(TOKEN_VARIABLE):
        raise ConfigError(
            f"hub.repository={config.hub.repository!r}: expected a token of the Hugging Face hub "
            f"in the environment variable {TOKEN_VARIABLE}, which is not set. Set it, or leave "
            "hub out to push nothing"
        )


def push_student(
    config: RunConfig,
    run: RunDirectory,
    *,
    notify: Callable[[str], None],
    connect: Callable[..., Any] = HfApi,
) -> str | None:
    """Push the student; returns the address of the commit, None if nothing is to be pushed.

    A student that was pushed to the same place already is not pushed again.
    connect: makes the client from `token`; another one for tests.
    Raises: ConfigError without a token; RunStateError if the hub or the network refuses.
    """
    hub = config.hub
    if hub is None:
        return None
    require_token(config)
    way_out = "Remove the file: the student is pushed again"
    record = read_form_if_exists(run.path / PUSH_RECORD, _RECORD_FORM, way_out=way_out) or {}
    target = {"repository": hub.repository, "branch": hub.branch, "student": _identity(run)}
    if all(record.get(key) == value for key, value in target.items()):
        return str(record["commit"])
    notify(f"pushing {run.student_directory} to {hub.repository}")
    commit = _push(connect(token=os.environ[TOKEN_VARIABLE]), hub, run)
    write_json(run.path / PUSH_RECORD, {**target, "commit": commit})
    return commit


def _push(api: Any, hub: HubConfig, run: RunDirectory) -> str:
    try:
        api.create_repo(hub.repository, private=hub.private, repo_type="model", exist_ok=True)
        if hub.branch != "main":
            api.create_branch(hub.repository, branch=hub.branch, exist_ok=True)
        info = api.upload_folder(
            repo_id=hub.repository,
            folder_path=str(run.student_directory),
            repo_type="model",
            revision=hub.branch,
            commit_message=f"{run.path.name}: student distilled by distill_system",
        )
    except Exception as error:  # network, disk or hub: each library below raises its own kind
        raise RunStateError(
            f"the student could not be pushed to hub.repository={hub.repository!r}: "
            f"{_first_line(error)}. It stands in {run.student_directory}; the same command pushes "
            "it again, and hub=null leaves it where it is"
        ) from error
    return str(info.commit_url)


def _identity(run: RunDirectory) -> int:
    """Of the exported folder: it is made whole by a rename, so that its time says which it is."""
    return run.student_directory.stat().st_mtime_ns


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")

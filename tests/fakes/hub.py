"""A stand-in of the Hugging Face hub's client that refuses what the real one would."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from huggingface_hub import HfApi
from huggingface_hub.utils._validators import validate_repo_id


class FakeHub:
    """One hub for all clients: `client(token=...)` makes one, as HfApi(token=...) does.

    repositories: id -> {"private": bool, "branches": {name: {file: bytes}}}.
    down: every upload fails, as without a network.
    """

    def __init__(self, *, token: str) -> None:
        self.token = token
        self.repositories: dict[str, dict[str, Any]] = {}
        self.uploads = 0
        self.down = False

    def client(self, **arguments: Any) -> _Client:
        _require_signature(HfApi.__init__, arguments)
        if arguments.get("token") != self.token:
            raise PermissionError("401 Client Error: Invalid username or password.")
        return _Client(self)


class _Client:
    def __init__(self, hub: FakeHub) -> None:
        self._hub = hub

    def create_repo(self, repo_id: str, **arguments: Any) -> None:
        _require_signature(HfApi.create_repo, {"repo_id": repo_id, **arguments})
        validate_repo_id(repo_id)
        made = self._hub.repositories
        if repo_id in made and not arguments.get("exist_ok"):
            raise ValueError("409 Client Error: You already created this model repo")
        made.setdefault(
            repo_id, {"private": arguments.get("private", False), "branches": {"main": {}}}
        )

    def create_branch(self, repo_id: str, **arguments: Any) -> None:
        _require_signature(HfApi.create_branch, {"repo_id": repo_id, **arguments})
        branches = self._hub.repositories[repo_id]["branches"]
        if arguments["branch"] in branches and not arguments.get("exist_ok"):
            raise ValueError("409 Client Error: Reference already exists")
        branches.setdefault(arguments["branch"], dict(branches["main"]))

    def upload_folder(self, **arguments: Any) -> Any:
        _require_signature(HfApi.upload_folder, arguments)
        self._hub.uploads += 1
        if self._hub.down:
            raise ConnectionError("Cannot reach the hub\nand a second line")
        folder = Path(arguments["folder_path"])
        files = {
            str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()
        }
        _require_model(files)
        branch = self._hub.repositories[arguments["repo_id"]]["branches"][arguments["revision"]]
        branch.update(files)
        address = f"https://hub/{arguments['repo_id']}/commit/{self._hub.uploads}"
        return SimpleNamespace(commit_url=address)


def _require_signature(function: Any, arguments: dict[str, Any]) -> None:
    inspect.signature(function).bind(None, **arguments)


def _require_model(files: dict[str, bytes]) -> None:
    """What makes a folder a model on the hub; a card whose metadata is no YAML is refused there."""
    assert "config.json" in files, "a model without config.json"
    assert any(name.endswith(".safetensors") for name in files), "a model without weights"
    _, metadata, _ = files["README.md"].decode().split("---\n", 2)
    card = yaml.safe_load(metadata)
    assert card["library_name"] == "transformers", card

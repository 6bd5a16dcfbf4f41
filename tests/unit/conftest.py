"""Configurations of runs on models that need no training."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distill_system.config import RunConfig, load_config

Configure = Callable[..., RunConfig]


@pytest.fixture
def configure(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> Configure:
    """A run of two pretrained models of one tokenizer, with dotted overrides on top."""
    rows = [json.dumps({"prompt": f"w{index} w5", "response": "w6"}) for index in range(4, 16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "other.jsonl").write_text('{"prompt": "w40 w41", "response": "w42"}\n')
    rows_of: dict[str, Any] = {"type": "jsonl", "path": "rows.jsonl"}
    others = {"type": "jsonl", "path": "other.jsonl"}
    tree = {
        "name": "run",
        "runs_directory": str(tmp_path / "runs"),
        "data": {
            "directory": str(tmp_path),
            "max_prompt_tokens": 8,
            "prompts": rows_of,
            "held_out": others,
            "evaluation": {"test": others},
        },
        "teacher": {"path": str(tiny_model_folder(seed=1))},
        "student": {"path": str(tiny_model_folder(seed=2, num_layers=1))},
        "rollout": {"sampling": {"max_response_tokens": 8}},
        "distill": {"steps": 3, "optimizer": {"learning_rate": 1e-3}},
        "cluster": {"dashboard": False},
    }
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(tree))

    def build(*overrides: str) -> RunConfig:
        return load_config([path], overrides)

    return build


@dataclass(frozen=True)
class SmallDisk:
    """A file system of its own, of a few blocks."""

    folder: Path

    def fill(self, *, leave_bytes: int = 0) -> None:
        """Take all its room, or all but so much."""
        with suppress(OSError), (self.folder / "filler").open("ab", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        if leave_bytes:
            os.truncate(self.folder / "filler", self.filled_bytes - leave_bytes)

    @property
    def filled_bytes(self) -> int:
        return (self.folder / "filler").stat().st_size

    def free(self) -> None:
        """Give its room back."""
        (self.folder / "filler").unlink()

    def make_read_only(self, *, read_only: bool = True) -> None:
        """Let it take nothing more, or take writes again."""
        how = "remount,ro" if read_only else "remount,rw"
        subprocess.run(["mount", "-o", how, str(self.folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A real file system of 256 KiB in memory; skips the test where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a file system is not allowed here")
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)

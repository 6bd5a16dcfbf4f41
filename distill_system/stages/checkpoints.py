"""Checkpoints of one stage: written beside, then renamed; the newest whole one is found again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_system.errors import RunStateError
from distill_system.observe.run_directory import read_json, write_json

STATE_FILE = "state.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint: steps done, its folder, and what the driver kept in it."""

    step: int
    folder: Path
    state: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one stage, one folder each, named by steps done."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(
        self, step: int, state: Mapping[str, Any], write_learner: Callable[[Path], None]
    ) -> None:
        """Write a checkpoint and drop the oldest beyond `keep`; a crash leaves the ones before."""
        final = self.folder / f"step_{step:06d}"
        partial = final.with_suffix(".partial")
        for leftover in self.folder.glob("*.partial"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
        write_learner(partial)
        write_json(partial / STATE_FILE, {"step": step, **state})
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in self._whole()[: -self.keep]:
            shutil.rmtree(old)

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None.

        Raises: RunStateError if its state file cannot be read.
        """
        whole = self._whole()
        if not whole:
            return None
        try:
            state: dict[str, Any] = read_json(whole[-1] / STATE_FILE)
            return Checkpoint(state.pop("step"), whole[-1], state)
        except (RunStateError, KeyError) as error:
            raise RunStateError(
                f"the checkpoint {whole[-1]} is damaged ({error}): remove that folder to resume "
                "from the one before"
            ) from error

    def clear(self) -> None:
        """Remove all, once the stage's output stands."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _whole(self) -> list[Path]:
        """Folders that were renamed into place, oldest first."""
        return sorted(p for p in self.folder.glob("step_*") if p.suffix != ".partial")


def resume_point(store: CheckpointStore, *, resume: bool, stage: str) -> Checkpoint | None:
    """The checkpoint to continue from, None to begin.

    Raises: RunStateError if there is one and the person did not say --resume.
    """
    latest = store.latest()
    if latest is not None and not resume:
        raise RunStateError(
            f"{stage} has a checkpoint at step {latest.step} in {store.folder}: add --resume to "
            "continue from it, or give the run another name"
        )
    return latest

"""Checkpoints of one stage: written beside the run, verified, then renamed; found again on resume.

A folder `step_NNNNNN` holds the learner's files, the driver's `state.json`, and `manifest.json`:
the names, lengths and CRC-32s of all the others.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from distill_system.config.distill import BestConfig
from distill_system.errors import DeadlineError, DistillError, RunStateError
from distill_system.learner import FileRecord, describe_file, find_alterations, find_misfits
from distill_system.observe.run_directory import flush_folder, read_json, write_json

STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"


class Saver(Protocol):
    """What writes and reads the learner's part; LearnerGroup does."""

    def start_save(self, folder: Path) -> None:
        """Begin to write the state as it is now."""

    def finish_save(self, *, wait: bool) -> dict[str, FileRecord] | None:
        """The files written; None if that is still under way and wait is False."""

    def find_alterations(self, folder: Path, files: Mapping[str, FileRecord]) -> list[str]:
        """Read the files through; what is wrong with each that is not as written."""

    def load(self, folder: Path) -> None:
        """Take the state back."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint: steps done, its folder, what the driver kept in it, the learner's files.

    metrics: every metric of the stage as last measured when the checkpoint was begun; None if it
        was not finite.
    """

    step: int
    folder: Path
    state: dict[str, Any]
    metrics: dict[str, float | None] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)


class CheckpointStore:
    """The checkpoints of one stage, one folder each, named by steps done.

    keep: the newest so many stay.  best: these stay too.
    """

    def __init__(self, folder: Path, *, keep: int, best: BestConfig | None = None) -> None:
        self.folder = folder
        self.keep = keep
        self.best = best
        self._under_way: Path | None = None

    def start(
        self,
        step: int,
        state: Mapping[str, Any],
        learner: Saver,
        *,
        metrics: Mapping[str, float | None] | None = None,
    ) -> None:
        """Begin a checkpoint of this moment, after the one before is whole; see finish."""
        self.finish(learner, wait=True)
        self._remove_leftovers()
        partial = self._final(step).with_suffix(".partial")
        partial.mkdir(parents=True)
        write_json(
            partial / STATE_FILE, {"step": step, "metrics": dict(metrics or {}), "state": state}
        )
        learner.start_save(partial)
        self._under_way = partial

    def finish(self, learner: Saver, *, wait: bool) -> bool:
        """Rename what is under way once all of it is on disk; drop what is not to stay.

        Returns whether nothing is under way any more. A crash before leaves the ones before.
        """
        if self._under_way is None:
            return True
        files = learner.finish_save(wait=wait)
        if files is None:
            return False
        partial, self._under_way = self._under_way, None
        files[STATE_FILE] = describe_file(partial / STATE_FILE)
        write_json(partial / MANIFEST_FILE, {"files": {n: r._asdict() for n, r in files.items()}})
        final = partial.with_suffix("")
        if final.exists():
            _remove(final)
        partial.rename(final)
        flush_folder(self.folder)
        self._drop_old()
        return True

    @contextmanager
    def finished_on_failure(self, learner: Saver) -> Iterator[None]:
        """Let a failure in the block leave the checkpoint under way behind as a whole one.

        Unless that fails too, as where the learner is what failed; then the one before stands.
        """
        try:
            yield
        except DeadlineError:
            raise  # who did not answer in time may not answer now
        except DistillError:
            with suppress(DistillError):
                self.finish(learner, wait=True)
            raise

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint, or None.

        Raises: RunStateError if a file of it is missing or of another length, or its state.json was
            altered; what the learner wrote is read through by load.
        """
        whole = self._whole()
        if not whole:
            return None
        newest = whole[-1]
        try:
            files = _read_manifest(newest)
            damage = find_misfits(newest, files)
            damage = damage or find_alterations(newest, {STATE_FILE: files.pop(STATE_FILE)})
        except (RunStateError, KeyError, TypeError) as error:
            damage = [f"{MANIFEST_FILE} does not say what belongs to it ({error})"]
        if damage:
            raise self._damaged(newest, damage)
        return _read_state(newest, files)

    def load(self, checkpoint: Checkpoint, learner: Saver) -> None:
        """Give the learner its state back, after every byte was compared with what was written.

        Raises: RunStateError, naming the files that are missing, truncated or altered.
        """
        damage = learner.find_alterations(checkpoint.folder, checkpoint.files)
        if damage:
            raise self._damaged(checkpoint.folder, damage)
        learner.load(checkpoint.folder)

    def clear(self) -> None:
        """Remove all, once the stage's output stands."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _damaged(self, folder: Path, damage: Sequence[str]) -> RunStateError:
        others = [path for path in self._whole() if path != folder]
        then = f"go on from {others[-1].name}" if others else "begin this stage anew"
        return RunStateError(
            f"the checkpoint {folder} is damaged: {'; '.join(damage)}. Put the files back, or "
            f"remove that folder and --resume to {then}"
        )

    def _drop_old(self) -> None:
        whole = self._whole()
        stay = {*whole[-self.keep :], *self._find_best(whole)}
        for folder in whole:
            if folder not in stay:
                _remove(folder)

    def _find_best(self, whole: Sequence[Path]) -> list[Path]:
        """The best by the metric, of equals the earlier; those that have no figure are not among
        them."""
        if self.best is None:
            return []
        sign = 1.0 if self.best.mode == "min" else -1.0
        figures = [
            (_read_state(folder, {}).metrics.get(self.best.metric), folder) for folder in whole
        ]
        ranked = sorted((sign * figure, folder) for figure, folder in figures if figure is not None)
        return [folder for _, folder in ranked[: self.best.count]]

    def _remove_leftovers(self) -> None:
        """What a crash left half-written or half-removed."""
        for suffix in (".partial", ".removed"):
            for leftover in self.folder.glob(f"*{suffix}"):
                shutil.rmtree(leftover)

    def _final(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def _whole(self) -> list[Path]:
        """Folders that were renamed into place, oldest first."""
        folders = (path for path in self.folder.glob("step_*") if not path.suffix)
        return sorted(folders, key=lambda path: int(path.name.removeprefix("step_")))


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


def _remove(folder: Path) -> None:
    """Renamed first: a crash in between leaves no part of a checkpoint under a whole one's name."""
    shutil.rmtree(folder.rename(folder.with_suffix(".removed")))


def _read_manifest(folder: Path) -> dict[str, FileRecord]:
    files: Any = read_json(folder / MANIFEST_FILE)["files"]
    return {name: FileRecord(**record) for name, record in files.items()}


def _read_state(folder: Path, files: dict[str, FileRecord]) -> Checkpoint:
    form: Any = read_json(folder / STATE_FILE)
    return Checkpoint(form["step"], folder, form["state"], form["metrics"], files)

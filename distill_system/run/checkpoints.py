"""Checkpoints of one stage: written in the background, renamed when complete, verified on resume.

A folder's name is its state:

    step_000100.partial    being written by start() and finish(); removed if a crash left it
    step_000100            complete: finish() renames it once all files and the manifest are on disk
    step_000100.removed    being deleted; renamed first, so that a crash leaves no half of a
                           checkpoint under a complete one's name

A complete folder holds the learner's files, the driver's `state.json`, and `manifest.json` with the
name, length and CRC-32 of every other file.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from distill_system.config.distill import BestConfig
from distill_system.errors import DeadlineError, DistillError, RunStateError, WorkerLostError
from distill_system.learner import FileRecord, describe_file, find_alterations, find_misfits
from distill_system.observe.run_directory import flush_folder, read_json, write_json

STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"


class Saver(Protocol):
    """Writes and reads the learner's part of a checkpoint; LearnerGroup implements it."""

    def start_save(self, folder: Path) -> None:
        """Begin to write the state as it is now."""

    def finish_save(self, *, wait: bool) -> dict[str, FileRecord] | None:
        """The files written; None if writing goes on and wait is False."""

    def find_alterations(self, folder: Path, files: Mapping[str, FileRecord]) -> list[str]:
        """Read every byte of the files; one message for each that is not as written."""

    def load(self, folder: Path) -> None:
        """Restore the state from a folder."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint.

    step: steps done.  state: what the driver stored.  files: the learner's, by name.
    metrics: the last value of every metric of the stage when the checkpoint was begun; None if the
        value was not finite.
    """

    step: int
    folder: Path
    state: dict[str, Any]
    metrics: dict[str, float | None] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)


class CheckpointStore:
    """The checkpoints of one stage, one folder each, named by steps done.

    keep: how many of the newest stay on disk.  best: which others stay.
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
        """Begin to write a checkpoint of the present state; `finish` completes it.

        Waits until the checkpoint before is complete: one is written at a time.
        """
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
        """Complete the checkpoint that is being written, if all its files are on disk.

        Then deletes the checkpoints that are not to be kept. wait: wait for the files.
        Returns whether nothing is being written any more.
        """
        if self._under_way is None:
            return True
        files = learner.finish_save(wait=wait)
        if files is None:
            return False
        partial, self._under_way = self._under_way, None
        # The manifest comes last, and the rename after it: a complete folder always has one.
        files[STATE_FILE] = describe_file(partial / STATE_FILE)
        write_json(partial / MANIFEST_FILE, {"files": {n: r._asdict() for n, r in files.items()}})
        final = partial.with_suffix("")

        if final.exists():
            _remove(final)
        partial.rename(final)
        flush_folder(self.folder)  # a rename survives a power cut only once its folder is flushed
        self._drop_old()
        return True

    @contextmanager
    def finished_on_failure(self, learner: Saver) -> Iterator[None]:
        """If the block fails, still complete the checkpoint that is being written.

        If that fails too, because the learner itself is what failed, the checkpoint before stays
        the newest.
        """
        try:
            yield
        except DeadlineError:
            raise  # a worker hangs: waiting for the learner now could hang as well
        except WorkerLostError as lost:
            if lost.pool.endswith("learner"):
                raise
            with suppress(DistillError):
                self.finish(learner, wait=True)
            raise
        except DistillError:
            with suppress(DistillError):
                self.finish(learner, wait=True)
            raise

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint, or None.

        Checks names and lengths of all files and the content of state.json. The learner's files are
        large: `load` checks their content, on the machine that reads them.

        Raises: RunStateError if one of these checks fails.
        """
        complete = self._complete()
        if not complete:
            return None
        # If it is damaged, an older one is not used in its place: steps would be lost silently.
        return self._read_checked(complete[-1])

    def _read_checked(self, folder: Path) -> Checkpoint:
        try:
            files = _read_manifest(folder)
            damage = find_misfits(folder, files)
            damage = damage or find_alterations(folder, {STATE_FILE: files.pop(STATE_FILE)})
        except (RunStateError, KeyError, TypeError) as error:
            damage = [f"{MANIFEST_FILE} does not say what belongs to it ({error})"]
        if damage:
            raise self._damaged(folder, damage)
        return _read_state(folder, files)

    def find_best(self) -> Checkpoint:
        """The best complete checkpoint by the metric of `best`; its manifest is checked.

        Raises: RunStateError if no checkpoint has a finite value of the metric, or it is damaged.
        """
        assert self.best is not None, "the configuration asks for a metric beside export.weights"
        found = self._find_best(self._complete())
        if not found:
            raise RunStateError(
                f"export.weights=best: no checkpoint in {self.folder} has a finite value of "
                f"{self.best.metric} (distill.keep_best.metric). Give export.weights=last, or "
                "another metric, and --resume"
            )
        return self._read_checked(found[0])

    def load(self, checkpoint: Checkpoint, learner: Saver) -> None:
        """Verify the learner's files byte by byte, then restore its state from them.

        Raises: RunStateError, naming the files that are missing, truncated or altered.
        """
        damage = learner.find_alterations(checkpoint.folder, checkpoint.files)
        if damage:
            raise self._damaged(checkpoint.folder, damage)
        learner.load(checkpoint.folder)

    def clear(self) -> None:
        """Remove all checkpoints, once the stage's output exists."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _damaged(self, folder: Path, damage: Sequence[str]) -> RunStateError:
        others = [path for path in self._complete() if path != folder]
        then = f"go on from {others[-1].name}" if others else "begin this stage anew"
        return RunStateError(
            f"the checkpoint {folder} is damaged: {'; '.join(damage)}. Put the files back, or "
            f"remove that folder and --resume to {then}"
        )

    def _drop_old(self) -> None:
        complete = self._complete()
        kept = {*complete[-self.keep :], *self._find_best(complete)}
        for folder in complete:
            if folder not in kept:
                _remove(folder)

    def _find_best(self, complete: Sequence[Path]) -> list[Path]:
        """The best checkpoints by the metric, of equals the earlier.

        A checkpoint without a finite value of the metric is never among them.
        """
        if self.best is None:
            return []
        sign = 1.0 if self.best.mode == "min" else -1.0
        values = [
            (_read_state(folder, {}).metrics.get(self.best.metric), folder) for folder in complete
        ]
        ranked = sorted((sign * value, folder) for value, folder in values if value is not None)
        return [folder for _, folder in ranked[: self.best.count]]

    def _remove_leftovers(self) -> None:
        """Delete the folders that a crash left half written or half deleted."""
        for suffix in (".partial", ".removed"):
            for leftover in self.folder.glob(f"*{suffix}"):
                shutil.rmtree(leftover)

    def _final(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def _complete(self) -> list[Path]:
        """Folders of complete checkpoints, oldest first."""
        folders = (path for path in self.folder.glob("step_*") if not path.suffix)
        return sorted(folders, key=lambda path: int(path.name.removeprefix("step_")))


def resume_point(store: CheckpointStore, *, resume: bool, stage: str) -> Checkpoint | None:
    """The checkpoint to continue from; None if the stage begins.

    Raises: RunStateError if there is a checkpoint and --resume was not given.
    """
    latest = store.latest()
    if latest is not None and not resume:
        raise RunStateError(
            f"{stage} has a checkpoint at step {latest.step} in {store.folder}: add --resume to "
            "continue from it, or give the run another name"
        )
    return latest


def _remove(folder: Path) -> None:
    """Delete a complete checkpoint; see the module's list of states."""
    shutil.rmtree(folder.rename(folder.with_suffix(".removed")))


def _read_manifest(folder: Path) -> dict[str, FileRecord]:
    files: Any = read_json(folder / MANIFEST_FILE)["files"]
    return {name: FileRecord(**record) for name, record in files.items()}


def _read_state(folder: Path, files: dict[str, FileRecord]) -> Checkpoint:
    form: Any = read_json(folder / STATE_FILE)
    return Checkpoint(form["step"], folder, form["state"], form["metrics"], files)

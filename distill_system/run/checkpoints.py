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
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import NonNegativeInt, TypeAdapter
from typing_extensions import TypedDict

from distill_system.config.distill import BestConfig
from distill_system.data import check_position
from distill_system.errors import DeadlineError, DistillError, RunStateError, WorkerLostError
from distill_system.learner import FileRecord, describe_file, find_alterations, find_misfits
from distill_system.observe import RunWrites
from distill_system.observe.run_directory import flush_folder, read_form, write_json
from distill_system.observe.run_writes import no_answer

STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
_AS_WRITTEN = "It is not as a run writes it"


class Saver(Protocol):
    """Writes and reads the learner's part of a checkpoint; LearnerGroup implements it."""

    def start_save(self, folder: Path) -> None:
        """Begin to write the state as it is now."""

    def finish_save(self, *, wait: bool) -> dict[str, FileRecord] | None:
        """The files written; None if writing goes on, also if `wait` let it wait for a while."""

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
    writes: is told of a checkpoint that the disk did not take: the run goes on without it.
    failure: what was told of the last checkpoint, if the disk did not take it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        best: BestConfig | None = None,
        writes: RunWrites | None = None,
    ) -> None:
        self.folder = folder
        self.keep = keep
        self.best = best
        self.failure: str | None = None
        self._writes = writes or RunWrites()
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
        partial = self._final(step).with_suffix(".partial")
        form = {"step": step, "metrics": dict(metrics or {}), "state": state}
        try:
            self._writes.require(partial, lambda: self._begin_folder(partial, form))
        except OSError as error:
            self._give_up(partial, error)
            return
        learner.start_save(partial)
        self._under_way = partial

    def finish(self, learner: Saver, *, wait: bool) -> bool:
        """Complete the checkpoint that is being written, if all its files are on disk.

        Then deletes the checkpoints that are not to be kept. One that cannot be written is given
        up, and told: those before it stay. wait: wait for the files.
        Returns whether nothing is being written any more.
        Raises: RunStateError if the disk does not answer in time: the run cannot go on.
        """
        if self._under_way is None:
            return True
        partial, files = self._under_way, None
        deadline = time.monotonic() + self._writes.seconds
        while files is None:
            try:
                files = learner.finish_save(wait=wait)
            except RunStateError as error:
                self._under_way = None
                self._give_up(partial, error)
                return True
            if files is None and not wait:
                return False
            if files is None and time.monotonic() >= deadline:
                self._under_way = None
                # Its ranks have answered: what hangs is the disk.
                raise no_answer(partial, self._writes.seconds)
        self._under_way, written = None, files
        try:
            # In its turn: rows of the steps that it holds are on the disk before it is whole.
            self._writes.require(partial, lambda: self._complete_folder(partial, written))
        except OSError as error:
            self._give_up(partial, error)
            return True
        self.failure = None
        return True

    def _begin_folder(self, partial: Path, form: dict[str, Any]) -> None:
        self._remove_leftovers()
        partial.mkdir(parents=True)
        write_json(partial / STATE_FILE, form)

    def _complete_folder(self, partial: Path, files: dict[str, FileRecord]) -> None:
        """Give a folder whose files are written its manifest, and then its name; drop old ones."""
        # The manifest comes last, and the rename after it: a complete folder always has one.
        files[STATE_FILE] = describe_file(partial / STATE_FILE)
        write_json(partial / MANIFEST_FILE, {"files": {n: r._asdict() for n, r in files.items()}})
        final = partial.with_suffix("")
        if final.exists():
            _remove(final)
        partial.rename(final)
        flush_folder(self.folder)  # a rename survives a power cut only once its folder is flushed
        self._drop_old()

    def _give_up(self, partial: Path, error: Exception) -> None:
        step = _step_of(partial.with_suffix(""))
        complete = self._writes.require(partial, lambda: self._remove(partial))
        newest = f"{complete[-1].name} is the newest" if complete else "there is none before it"
        self.failure = f"the checkpoint after step {step} could not be written: {error}; {newest}"
        self._writes.give_up(f"{self.failure}. The run goes on, and tries again with the next")

    def _remove(self, partial: Path) -> list[Path]:
        """The complete checkpoints, after this one is gone: it may be what fills the disk."""
        shutil.rmtree(partial, ignore_errors=True)
        return self._complete()

    @contextmanager
    def finished_on_failure(self, learner: Saver) -> Iterator[None]:
        """If the block fails, still complete the checkpoint that is being written.

        If that fails too, because the learner itself is what failed, the checkpoint before stays
        the newest.
        """
        try:
            yield
        except DistillError as error:
            # Where a worker hangs, or the learner is lost, waiting for it now could hang as well.
            is_lost = isinstance(error, WorkerLostError) and error.pool.endswith("learner")
            if not is_lost and not isinstance(error, DeadlineError):
                with suppress(DistillError):
                    self.finish(learner, wait=True)
            raise

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint, or None.

        Checks names and lengths of all files and the content of state.json. The learner's files are
        large: `load` checks their content, on the machine that reads them.

        Raises: RunStateError if one of these checks fails.
        """
        return self._writes.require(self.folder, self._read_latest)

    def _read_latest(self) -> Checkpoint | None:
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
            if not damage:
                return _read_state(folder, files)
        except RunStateError as error:
            damage = [str(error)]
        raise self._damaged(folder, damage)

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
        self._writes.require(self.folder, lambda: shutil.rmtree(self.folder, ignore_errors=True))

    def _damaged(self, folder: Path, damage: Sequence[str]) -> RunStateError:
        others = [path for path in self._complete() if path != folder]
        then = f"go on from {others[-1].name}" if others else "begin this stage anew"
        return RunStateError(
            f"the checkpoint {folder} is damaged: {'; '.join(damage)}. Put the files back, or "
            f"remove that folder and --resume to {then}"
        )

    def _drop_old(self) -> None:
        """Delete what is not to be kept; where that cannot be told or done, nothing is."""
        try:
            complete = self._complete()
            kept = {*complete[-self.keep :], *self._find_best(complete)}
            for folder in complete:
                if folder not in kept:
                    _remove(folder)
        except (OSError, RunStateError) as error:
            self._writes.give_up(f"checkpoints that are not kept could not be removed: {error}")

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
        """Folders of complete checkpoints, oldest first.

        Raises: RunStateError for a name that is none of ours: which step it holds is not known.
        """
        folders = [path for path in self.folder.glob("step_*") if not path.suffix]
        for path in folders:
            if not (path.name.removeprefix("step_").isdecimal() and path.is_dir()):
                raise RunStateError(
                    f"{path}: expected a folder of a checkpoint such as step_000100. Move it "
                    "elsewhere, or remove it"
                )
        return sorted(folders, key=_step_of)


def resume_point(
    store: CheckpointStore, *, resume: bool, stage: str, steps: int | None = None
) -> Checkpoint | None:
    """The checkpoint to continue from; None if the stage begins.

    steps: of the whole stage, beyond which no checkpoint of it can be; None asks for nothing.
    Raises: RunStateError if there is a checkpoint and --resume was not given, or it is damaged or
        not of this stage.
    """
    latest = store.latest()
    if latest is None:
        return None
    if not resume:
        raise RunStateError(
            f"{stage} has a checkpoint at step {latest.step} in {store.folder}: add --resume to "
            "continue from it, or give the run another name"
        )
    if steps is not None and latest.step > steps:
        raise RunStateError(
            f"the checkpoint {latest.folder} is not of this run: {stage} has {steps} steps. Move "
            "it elsewhere, or remove it"
        )
    _require_positions(latest)
    return latest


def _require_positions(checkpoint: Checkpoint) -> None:
    """Check the positions of walks over prompts, before workers start for nothing."""
    streams = checkpoint.state.get("streams")
    walks = [checkpoint.state.get("frontier")]
    if isinstance(streams, dict):
        walks += [streams.get(name) for name in ("student", "teacher", "plain_text")]
    try:
        for walk in walks:
            if walk is not None:
                check_position(walk)
    except RunStateError as error:
        raise RunStateError(f"{checkpoint.folder / STATE_FILE}: {error}") from error


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _remove(folder: Path) -> None:
    """Delete a complete checkpoint; see the module's list of states."""
    shutil.rmtree(folder.rename(folder.with_suffix(".removed")))


class _Record(TypedDict):
    num_bytes: NonNegativeInt
    crc32: NonNegativeInt


class _Manifest(TypedDict):
    files: dict[str, _Record]


class _State(TypedDict):
    step: NonNegativeInt
    state: dict[str, Any]
    metrics: dict[str, float | None]


_MANIFEST_FORM, _STATE_FORM = TypeAdapter(_Manifest), TypeAdapter(_State)


def _read_manifest(folder: Path) -> dict[str, FileRecord]:
    path = folder / MANIFEST_FILE
    files = read_form(path, _MANIFEST_FORM, way_out=_AS_WRITTEN)["files"]
    outside = [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise RunStateError(f"{path} names a file outside of its folder, {outside[0]!r}")
    if STATE_FILE not in files or len(files) == 1:
        raise RunStateError(f"{path} does not name {STATE_FILE} and files of the learner")
    return {name: FileRecord(**record) for name, record in files.items()}


def _read_state(folder: Path, files: dict[str, FileRecord]) -> Checkpoint:
    """A checkpoint's own state, from a folder of this run that is called by its step."""
    path = folder / STATE_FILE
    form = read_form(path, _STATE_FORM, way_out=_AS_WRITTEN)
    if form["step"] != _step_of(folder):
        raise RunStateError(f"{path} is of step {form['step']}: the folder has another's name")
    return Checkpoint(form["step"], folder, form["state"], form["metrics"], files)

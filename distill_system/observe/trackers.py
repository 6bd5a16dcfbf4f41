"""Who is told of a run's metrics beside metrics.jsonl: one small interface, one class per tracker.

A tracker that fails, or hangs, is dropped and said once: no run ends or waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from distill_system.config.run import TrackerName
from distill_system.errors import ConfigError
from distill_system.observe.hosted_trackers import HOSTED
from distill_system.observe.run_directory import RunDirectory
from distill_system.writer_thread import WriterThread, is_done

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


HANG_SECONDS = 60.0
"""For one call of a tracker, and for what is left as the run ends."""


class Tracker(Protocol):
    """Takes the metrics of a run, step by step; called by one thread at a time."""

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Take the metrics of one step of one stage; values may be NaN or infinite."""

    def truncate_after(self, stage: str, step: int) -> None:
        """Forget what it has of this stage's later steps, where it can; the stage is resumed."""

    def close(self) -> None:
        """Hand over what is left; nothing comes after."""


class Trackers:
    """Several trackers as one.

    notify: takes the line that says which tracker failed.
    """

    def __init__(self, trackers: Mapping[str, Tracker], notify: Callable[[str], None]) -> None:
        self._trackers: dict[str, Tracker] = {}
        self._threads: dict[str, WriterThread] = {}
        self._notify = notify
        for name, tracker in trackers.items():
            self.add(name, tracker)

    def add(self, name: str, tracker: Tracker) -> None:
        """Tell this one too, of what is still to come."""
        self._trackers[name] = tracker
        self._threads[name] = WriterThread(name)

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """See Tracker."""
        self._tell_each(lambda tracker: tracker.log(stage, step, values))

    def truncate_after(self, stage: str, step: int) -> None:
        """See Tracker."""
        self._tell_each(lambda tracker: tracker.truncate_after(stage, step))

    def close(self) -> None:
        """See Tracker."""
        closing = self._tell_each(lambda tracker: tracker.close())
        for name, closed in closing.items():
            if not is_done(closed, HANG_SECONDS):
                self._drop_hanging(name)
        self._trackers.clear()

    def _tell_each(self, tell: Callable[[Tracker], None]) -> dict[str, Future[None]]:
        """Each tracker in a thread of its own; one that hangs gets nothing more."""
        for name in list(self._trackers):
            if self._threads[name].busy_seconds > HANG_SECONDS:
                self._drop_hanging(name)
        return {
            name: self._threads[name].offer(partial(self._tell, name, tell))
            for name in list(self._trackers)
        }

    def _tell(self, name: str, tell: Callable[[Tracker], None]) -> None:
        if name not in self._trackers:
            return
        try:
            tell(self._trackers[name])
        except Exception as error:  # of whatever library; metrics.jsonl holds every value
            self._drop(name, f"{type(error).__name__}: {error}")

    def _drop_hanging(self, name: str) -> None:
        self._drop(name, f"no answer for {HANG_SECONDS:.0f} s")

    def _drop(self, name: str, reason: str) -> None:
        if self._trackers.pop(name, None) is not None:
            self._notify(
                f"{name} failed and gets nothing more of this run: {reason}. "
                "Everything is in metrics.jsonl"
            )


def require_trackers(names: Sequence[TrackerName]) -> None:
    """Refuse a run whose trackers are not installed.

    Raises: ConfigError, with the command that installs what is missing.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"trackers: {', '.join(missing)} not installed here. Install with "
            f"pip install 'distill-system[{','.join(missing)}]', or leave it out of trackers"
        )


def open_trackers(
    names: Sequence[TrackerName],
    run: RunDirectory,
    run_name: str,
    *,
    notify: Callable[[str], None],
) -> Trackers:
    """The trackers of these names; one that cannot be opened is said and left out."""
    opened: dict[str, Tracker] = {}
    for name in dict.fromkeys(names):
        try:
            opened[name] = _open(name, run, run_name)
        except Exception as error:  # of whatever library: no key, no server, a name that is taken
            notify(
                f"{name} cannot be opened and gets nothing of this run: {type(error).__name__}: "
                f"{error}. Everything is in metrics.jsonl"
            )
    return Trackers(opened, notify)


def _open(name: TrackerName, run: RunDirectory, run_name: str) -> Tracker:
    return TensorBoardTracker(run) if name == "tensorboard" else HOSTED[name](run, run_name)


class TensorBoardTracker:
    """Event files in the run's folder, a folder per stage."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._writers: dict[str, SummaryWriter] = {}
        self._purge_steps: dict[str, int] = {}

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Add one scalar per metric, tagged stage/metric."""
        if stage not in self._writers:
            self._writers[stage] = self._open_writer(stage)
        for name, value in values.items():
            self._writers[stage].add_scalar(f"{stage}/{name}", value, step)

    def truncate_after(self, stage: str, step: int) -> None:
        """Let TensorBoard hide this stage's later steps."""
        self._purge_steps[stage] = step + 1
        writer = self._writers.pop(stage, None)
        if writer is not None:
            writer.close()

    def close(self) -> None:
        """Flush and close all event files."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _open_writer(self, stage: str) -> SummaryWriter:
        # Imported here: it takes seconds, and a process that only reads metrics does not need it.
        from torch.utils.tensorboard import SummaryWriter

        # purge_step makes TensorBoard hide all later steps of a folder. Each stage counts its
        # steps from 0, so with one folder, purging one stage would hide steps of another.
        folder = self._run.tensorboard_directory / stage
        purge_step = self._purge_steps.pop(stage, None)
        return SummaryWriter(str(folder), purge_step=purge_step, flush_secs=10)

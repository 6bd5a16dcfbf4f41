"""Where a run's time goes, kept over a resume.

Two views: stages and phases count the driver's clock (a phase is what the driver waited for);
pools count what each pool's workers did with all their time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from pydantic import TypeAdapter

from distill_system.observe.activity import join_stretches
from distill_system.observe.run_directory import RunDirectory, read_form_if_exists, to_json
from distill_system.observe.run_writes import RunWrites
from distill_system.records import PoolActivity

MAIN_STAGE = "distill"


@dataclass(slots=True)
class _Stage:
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    step: dict[str, float] = field(default_factory=dict)
    pools: dict[str, PoolActivity] = field(default_factory=dict)
    running_since: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedTimings:
    """The content of timings.json, as Timings.save writes it.

    seconds: of each stage.  tokens_per_second: see Timings.  phases: stage -> phase -> seconds.
    pools: stage -> pool -> what its workers did.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    tokens_per_second: dict[str, float] = field(default_factory=dict)
    phases: dict[str, dict[str, float]] = field(default_factory=dict)
    pools: dict[str, dict[str, PoolActivity]] = field(default_factory=dict)


_FORM = TypeAdapter(RecordedTimings)


class Timings:
    """Totals of a run, read from its timings.json if there is one; threads may share it.

    writes: takes the file where the disk does not.
    save() writes them, the running stages' time so far included; call it with each checkpoint.
    Leaving a stage saves too.  Phases may overlap, so a stage's phases can add up to more than it.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        clock: Callable[[], float] = time.perf_counter,
        writes: RunWrites | None = None,
    ) -> None:
        self._run = run
        self._clock = clock
        self._writes = writes or RunWrites()
        self._lock = threading.Lock()
        self._stages: dict[str, _Stage] = {}
        recorded = read_timings(run)
        for name, seconds in recorded.seconds.items():
            self._stages[name] = _Stage(
                seconds=seconds,
                phases=recorded.phases.get(name, {}),
                pools=recorded.pools.get(name, {}),
            )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time inside as this stage's; saves on the way out, also after an error."""
        with self._lock:
            self._find(name).running_since = self._clock()
        try:
            yield
        finally:
            with self._lock:
                stage = self._find(name)
                stage.seconds = self._seconds(stage)
                stage.running_since = None
            self.save()

    def restart(self, stage: str) -> None:
        """Count this stage from zero: it begins again, and what an earlier try took is not its."""
        with self._lock:
            is_running = self._find(stage).running_since is not None
            now = self._clock() if is_running else None
            self._stages[stage] = _Stage(running_since=now)

    @contextmanager
    def phase(self, name: str, *, stage: str = MAIN_STAGE) -> Iterator[None]:
        """Count the time inside as this phase's."""
        start = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - start
            with self._lock:
                for totals in (self._find(stage).phases, self._find(stage).step):
                    totals[name] = totals.get(name, 0.0) + seconds

    def pop_step(self, stage: str = MAIN_STAGE) -> dict[str, float]:
        """Seconds of each phase of the stage since the last pop: one step's."""
        with self._lock:
            found = self._find(stage)
            step, found.step = found.step, {}
            return step

    def add_activity(self, pools: Mapping[str, PoolActivity], *, stage: str = MAIN_STAGE) -> None:
        """Count what each pool's workers did in a stretch of a stage."""
        with self._lock:
            found = self._find(stage).pools
            for name, activity in pools.items():
                earlier = found.get(name)
                found[name] = activity if earlier is None else join_stretches(earlier, activity)

    @property
    def seconds(self) -> dict[str, float]:
        """Stage -> seconds, the running stages' time so far included."""
        with self._lock:
            return {name: self._seconds(stage) for name, stage in self._stages.items()}

    @property
    def tokens_per_second(self) -> dict[str, float]:
        """Tokens per busy second of one worker: by pool in the main stage, else by stage."""
        with self._lock:
            return {
                pool if name == MAIN_STAGE else name: activity.num_tokens / activity.busy_seconds
                for name, stage in self._stages.items()
                for pool, activity in stage.pools.items()
                if activity.busy_seconds > 0
            }

    def save(self) -> None:
        """Write timings.json, see RecordedTimings; later, where the disk does not take it now."""
        seconds, rates = self.seconds, self.tokens_per_second
        with self._lock:
            stages = self._stages.items()
            recorded = RecordedTimings(
                seconds=seconds,
                tokens_per_second=rates,
                phases={name: dict(stage.phases) for name, stage in stages},
                pools={name: dict(stage.pools) for name, stage in stages},
            )
            self._writes.write_text(self._run.timings_path, to_json(asdict(recorded)))

    def _find(self, name: str) -> _Stage:
        return self._stages.setdefault(name, _Stage())

    def _seconds(self, stage: _Stage) -> float:
        if stage.running_since is None:
            return stage.seconds
        return stage.seconds + self._clock() - stage.running_since


def read_timings(run: RunDirectory) -> RecordedTimings:
    """The run's timings.json; empty if there is none yet.

    Raises: RunStateError if something else stands there.
    """
    way_out = "Remove the file to count from zero"
    found = read_form_if_exists(run.timings_path, _FORM, way_out=way_out)
    return found or RecordedTimings()

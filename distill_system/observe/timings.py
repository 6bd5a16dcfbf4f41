"""Where a run's time goes: seconds per stage, seconds and tokens per phase, kept over a resume."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from distill_system.errors import RunStateError
from distill_system.observe.run_directory import RunDirectory, read_json, write_json

MAIN_STAGE = "distill"


@dataclass(slots=True)
class Phase:
    """One passage through a phase, open while the work is done; add the tokens it handled."""

    tokens: int = 0


@dataclass(slots=True)
class PhaseTotal:
    """What all passages through a phase came to."""

    seconds: float = 0.0
    tokens: int = 0

    def add(self, seconds: float, tokens: int) -> None:
        """Count one more passage."""
        self.seconds += seconds
        self.tokens += tokens


@dataclass(slots=True)
class _Stage:
    seconds: float = 0.0
    phases: dict[str, PhaseTotal] = field(default_factory=dict)
    step: dict[str, PhaseTotal] = field(default_factory=dict)
    running_since: float | None = None


class Timings:
    """Totals of a run, read from its timings.json if there is one; threads may share it.

    save() writes them, the running stages' time so far included; call it with each checkpoint.
    Leaving a stage saves too.  Phases may overlap, so a stage's phases can add up to more than it.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._lock = threading.Lock()
        self._stages: dict[str, _Stage] = {}
        if run.timings_path.exists():
            self._load(read_json(run.timings_path))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time inside as this stage's; saves on the way out, also after an error."""
        with self._lock:
            self._find(name).running_since = time.perf_counter()
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
            now = time.perf_counter() if is_running else None
            self._stages[stage] = _Stage(running_since=now)

    @contextmanager
    def phase(self, name: str, *, stage: str = MAIN_STAGE) -> Iterator[Phase]:
        """Count the time inside, and the tokens added to what is yielded, as this phase's."""
        phase, start = Phase(), time.perf_counter()
        try:
            yield phase
        finally:
            seconds = time.perf_counter() - start
            with self._lock:
                for totals in (self._find(stage).phases, self._find(stage).step):
                    totals.setdefault(name, PhaseTotal()).add(seconds, phase.tokens)

    def pop_step(self, stage: str = MAIN_STAGE) -> dict[str, float]:
        """Seconds of each phase of the stage since the last pop: one step's."""
        return {phase: total.seconds for phase, total in self._pop(stage).items()}

    def pop_step_metrics(self, stage: str = MAIN_STAGE) -> dict[str, float]:
        """The same as metrics: seconds/<phase> and, with tokens, tokens_per_second/<phase>."""
        step = self._pop(stage)
        seconds = {f"seconds/{phase}": total.seconds for phase, total in step.items()}
        return seconds | {
            f"tokens_per_second/{phase}": rate for phase, rate in _rates(step).items()
        }

    def _pop(self, stage: str) -> dict[str, PhaseTotal]:
        with self._lock:
            found = self._find(stage)
            step, found.step = found.step, {}
            return step

    @property
    def seconds(self) -> dict[str, float]:
        """Stage -> seconds, the running stages' time so far included."""
        with self._lock:
            return {name: self._seconds(stage) for name, stage in self._stages.items()}

    @property
    def tokens_per_second(self) -> dict[str, float]:
        """Phase -> tokens per second inside it, for phases that count tokens.

        A phase of distillation stands under its own name, one of another stage as stage/phase.
        """
        with self._lock:
            return {
                phase if name == MAIN_STAGE else f"{name}/{phase}": rate
                for name, stage in self._stages.items()
                for phase, rate in _rates(stage.phases).items()
            }

    def save(self) -> None:
        """Write timings.json.

        {"seconds": {stage: s}, "tokens_per_second": {phase: r},
         "phases": {stage: {phase: {"seconds", "tokens"}}}}
        """
        seconds, rates = self.seconds, self.tokens_per_second
        with self._lock:
            phases = {
                name: {
                    phase: {"seconds": total.seconds, "tokens": total.tokens}
                    for phase, total in stage.phases.items()
                }
                for name, stage in self._stages.items()
            }
            form = {"seconds": seconds, "tokens_per_second": rates, "phases": phases}
            write_json(self._run.timings_path, form)

    def _load(self, form: dict[str, Any]) -> None:
        try:
            for name, phases in form["phases"].items():
                totals = {phase: PhaseTotal(**total) for phase, total in phases.items()}
                self._stages[name] = _Stage(seconds=form["seconds"][name], phases=totals)
        except (KeyError, TypeError, AttributeError) as error:
            raise RunStateError(
                f"{self._run.timings_path}: expected seconds and phases of each stage as "
                f"Timings.save writes them ({error!r}); delete the file to count from zero"
            ) from error

    def _find(self, name: str) -> _Stage:
        return self._stages.setdefault(name, _Stage())

    @staticmethod
    def _seconds(stage: _Stage) -> float:
        if stage.running_since is None:
            return stage.seconds
        return stage.seconds + time.perf_counter() - stage.running_since


def _rates(phases: dict[str, PhaseTotal]) -> dict[str, float]:
    return {
        phase: total.tokens / total.seconds
        for phase, total in phases.items()
        if total.tokens and total.seconds
    }

"""A run that is killed as a whole, again and again, is the run that was never touched.

kill -9 of the driver, alone or with everything it started, at random moments of its life: while
workers start, while models are measured, between and within steps, while a checkpoint is written,
while the student is exported. DISTILL_SYSTEM_KILLS sets how often; each life costs the start of a
cluster. So is one that loses its workers, one after another, and goes on.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import Injector, Planned, Way, read_outcomes
from pipeline.command_line import Run, write_configuration
from run_comparison import judge

from distill_system.observe import RunDirectory
from distill_system.observe.metrics import MetricRow, read_metrics, read_prompts

Launch = Callable[..., Run]

KILLS = int(os.environ.get("DISTILL_SYSTEM_KILLS", "2"))
STEPS = 8 * KILLS + 4
LIFE_SECONDS = 150 + 5 * STEPS
SAVED_EVERY_SECONDS = 2.0
AGENTS_SECONDS = 120.0
"""Ray's agents want to tell the GCS that their raylet died, for a minute where it died as well."""
STARVED = "ResourceError: Ray could not start a local cluster"
"""Ray gives itself 30 s, which a machine that is busy with other things may not: a life more."""


@pytest.fixture
def folder(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> Path:
    """A configuration in which everything that has a state has one: critics, sources, plain text,
    the best."""
    teacher, student = tiny_model_folder(seed=1), tiny_model_folder(seed=2, num_layers=1)
    path = write_configuration(tmp_path, teacher, student)
    form = json.loads(path.read_text())
    form["rollout"]["engine"] = "transformers"  # each life starts in half the time
    rows = {"type": "jsonl", "path": "prompts.jsonl"}
    first, second = {**rows, "num_examples": 40}, {**rows, "skip": 40}
    form["data"]["prompts"] = {
        "type": "mixture",
        "sources": {"first": {"source": first, "weight": 3.0}, "second": {"source": second}},
    }
    form["data"]["plain_text"] = rows
    form["distill"] |= {
        "steps": STEPS,
        "language_model": {"weight": 0.1, "sequences_per_step": 3},
        "objective": {"type": "ammd", "critic": {"type": "gradient_ascent"}},
        "optimizer": {"type": "muon", "learning_rate": 1e-3, "warmup_steps": 2},
        "measure_every": 3,
        "evaluate_every": 6,
        "checkpoint_every": 2,
        "keep_best": {"metric": "held_out/on_policy_distance", "mode": "min"},
    }
    path.write_text(json.dumps(form))
    return tmp_path


def test_a_run_killed_again_and_again_is_the_unbroken_run(launch: Launch, folder: Path) -> None:
    _Lives(launch, folder, "unbroken").finish()
    lives = _Lives(launch, folder, "killed")
    for number, kind in enumerate(_kinds()):
        lives.live_until(kind, driver_alone=number == 0)
    lives.finish()

    ours, theirs = RunDirectory(folder / "killed"), RunDirectory(folder / "unbroken")
    verdict = judge(ours, theirs)
    assert verdict.is_the_same, verdict
    assert [row.step for row in read_metrics(ours)] == list(range(STEPS + 1))
    _check_prompts(ours)
    lives.check_clock(ours)
    assert _files(ours) == _files(theirs)
    _check_lost_workers(launch, folder)


def _check_lost_workers(launch: Launch, folder: Path) -> None:
    """A run that loses a worker of every kind is the unbroken one too, in one life.

    Every pool has one worker, so that a run cannot go on with others. The teacher's is stopped: it
    says nothing any more, and is lost when its deadline is over.
    """
    broken, unbroken = RunDirectory(folder / "broken"), RunDirectory(folder / "unbroken")
    deadlines = ("deadlines.call_seconds=25", "deadlines.publish_seconds=20")
    run = launch("train", folder / "run.yaml", "name=broken", *deadlines)
    injector = Injector(run, broken, seed=13)
    ways = {
        "student_rollout": Way.KILL,
        "teacher_scoring": Way.KILL,
        "teacher_rollout": Way.STOP,
        "learner": Way.KILL,
    }
    planned = [
        Planned(step=3 + 4 * at, pool=pool, way=way, moment=0.1)
        for at, (pool, way) in enumerate(ways.items())
    ]
    injector.carry_out(planned)
    run.finish(LIFE_SECONDS)
    assert run.code == 0, run.stderr
    assert run.orphans() == []
    assert {fault.pool for fault in injector.done} == set(ways), "all of them before its end"
    for outcome in read_outcomes(injector.done, broken):
        assert outcome.back_after is not None, outcome
    verdict = judge(broken, unbroken)
    assert verdict.is_the_same, verdict


def _kinds() -> list[str]:
    """Moments in a seeded order; the last one is the end, which the others must not reach."""
    wanted = ["checkpoint", "steps", "start", "steps", "before"]
    drawn = [wanted[at % len(wanted)] for at in range(KILLS - 1)]
    random.Random(KILLS).shuffle(drawn)
    return [*drawn, "end"]


class _Lives:
    """One life after another of one run, each ended by signal 9 at a moment that chance chooses."""

    def __init__(self, launch: Launch, folder: Path, name: str) -> None:
        self.launch = launch
        self.folder = folder
        self.run_folder = RunDirectory(folder / name)
        self.random = random.Random(2406)
        self.wall_seconds = 0.0
        self.learning_seconds = 0.0

    def begin(self) -> Run:
        self.born = time.monotonic()
        name = f"name={self.run_folder.path.name}"
        return self.launch("train", self.folder / "run.yaml", name, "--resume", "auto")

    def end(self) -> None:
        self.wall_seconds += time.monotonic() - self.born

    def live_until(self, kind: str, *, driver_alone: bool = False) -> None:
        """Kill it at a moment of a kind; only at the end may it be done before.

        driver_alone: what it started is to notice, and to end by itself.
        """
        run, rows, wait = self.begin(), self._last_step(), getattr(self, f"_{kind}")
        wait(run)
        if run.process.poll() is None:
            os.kill(run.process.pid, signal.SIGKILL)
        if driver_alone:
            run.process.wait()
            assert run.orphans(AGENTS_SECONDS) == []
        while processes := run.processes():
            for process in processes:
                process.kill()
        run.finish()
        self.end()
        if STARVED in run.stderr:
            self.live_until(kind, driver_alone=driver_alone)
            return
        assert run.code == -signal.SIGKILL or (kind == "end" and run.code == 0), run.stderr
        if self._last_step() > rows:  # the rows of this life, cut back to its checkpoint
            first = next(row for row in self._rows() if row.step > rows)
            self.learning_seconds += time.time() - first.time

    def finish(self) -> None:
        """The last life, which nobody ends."""
        run = self.begin().finish(LIFE_SECONDS)
        self.end()
        if STARVED in run.stderr:
            self.finish()
        else:
            assert run.code == 0, run.stderr

    def check_clock(self, run: RunDirectory) -> None:
        """The stage's seconds are those of all lives; a kill loses what was not saved yet."""
        counted = json.loads(run.timings_path.read_text())["seconds"]["distill"]
        assert self.learning_seconds - SAVED_EVERY_SECONDS * KILLS <= counted <= self.wall_seconds

    def _start(self, run: Run) -> None:
        self._sleep(15.0)

    def _before(self, run: Run) -> None:
        """Once the workers stand and models are measured, or the checkpoint is taken back."""
        timings = self.run_folder.timings_path
        known = timings.stat().st_mtime_ns if timings.exists() else 0
        _wait_closely(lambda: timings.exists() and timings.stat().st_mtime_ns > known, run)
        self._sleep(1.0)

    def _steps(self, run: Run) -> None:
        known = self._last_step()
        _wait_closely(lambda: self._last_step() > known, run)
        self._sleep(0.5)

    def _checkpoint(self, run: Run) -> None:
        """While one is written, or renamed, or an old one removed."""
        checkpoints = self.run_folder.checkpoints_directory / "distill"
        known = {*checkpoints.glob("*.partial")}
        _wait_closely(lambda: {*checkpoints.glob("*.partial")} - known, run)
        self._sleep(0.05)

    def _end(self, run: Run) -> None:
        """While the student is measured and exported; it may be done before."""
        _wait_closely(lambda: self._last_step() >= STEPS - 1, run)
        self._sleep(1.0)

    def _sleep(self, most: float) -> None:
        time.sleep(self.random.uniform(0.0, most))

    def _rows(self) -> list[MetricRow]:
        return read_metrics(self.run_folder)

    def _last_step(self) -> int:
        return max((row.step for row in self._rows()), default=-1)


def _wait_closely(condition: Callable[[], object], run: Run) -> None:
    """Return when the condition holds, which it may for milliseconds only, or the run has ended."""
    deadline = time.monotonic() + LIFE_SECONDS
    while not condition() and run.process.poll() is None:
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.002)


def _check_prompts(run: RunDirectory) -> None:
    """Every prompt of a source as often as any other of it, or once more; three of the first
    source for each of the second."""
    rows = read_prompts(run)
    assert [row.step for row in rows] == list(range(1, STEPS + 1))
    for stream in ("on_policy", "off_policy"):
        counts = Counter(at for row in rows for at in row.prompt_ids[stream])
        assert sum(counts.values()) == 4 * STEPS
        for source, size, share in (("first", 40, 0.75), ("second", 20, 0.25)):
            own = [counts[at] for at in counts if at.startswith(f"prompts.{source}:")]
            own += [0] * (size - len(own))
            assert max(own) - min(own) <= 1
            assert sum(own) == share * 4 * STEPS


def _files(run: RunDirectory) -> set[str]:
    """Everything that a run leaves, but TensorBoard's files, of which each life has its own."""
    names = {str(path.relative_to(run.path)) for path in run.path.rglob("*")}
    return {name for name in names if not name.startswith("tensorboard/")}

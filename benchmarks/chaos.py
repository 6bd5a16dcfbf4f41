"""A run whose workers are killed, stopped and cut off, held against the run that nobody touched.

Workers of every pool (student rollout, teacher rollout, scoring, evaluation, learner) are lost at
moments drawn by seed: killed (signal 9), stopped (SIGSTOP, found by its deadline) or cut off (the
cable of its node is pulled: network namespaces on this machine, three nodes, needs root; another
node comes 45 s later, as an autoscaler would bring it). In lockstep the run must be the unbroken
one to the bit; asynchronous (max_staleness 1) each step must learn from its own prompts.

    python benchmarks/chaos.py [--mode lockstep asynchronous] [--steps 60] [--faults 20]
        [--seed 0] [--kinds killed stopped "cut off"] [--minutes 4] [--folder F]

--minutes: for the last headline, so many minutes that begin with a killed worker, each after one
without, in one asynchronous run: the steps of the former over those of the latter. 0 leaves it out.

Columns: noticed s and back s count from the fault; back when everybody that it cost is replaced by
another who can work, engine start included. steps again: made again from the newest checkpoint.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

from record import write_result
from small_runs import write_configuration

from distill_system.observe import RunDirectory
from distill_system.observe.metrics import read_metrics

# small_runs has put tests/ on the path
from faults import Fault, Injector, Outcome, Way, plan_faults, read_outcomes  # isort: skip
from machines import RayNodes, ray_nodes  # isort: skip
from command_line import Run, start  # isort: skip
from run_comparison import Verdict, judge  # isort: skip

POOLS = {
    "student_rollout": {"count": 2, "cpus": 0.3},
    "teacher_rollout": {"count": 1, "cpus": 0.3},
    "teacher_scoring": {"count": 1, "cpus": 0.3},
    "evaluation": {"count": 1, "cpus": 0.3},
    "learner": {"count": 2, "cpus": 0.3},
}
NODES = ({"cpus": 1}, {"cpus": 1}, {"cpus": 1})
"""Three workers fit a node, and seven do not fit two: what a node takes with it waits for another.
The head keeps its cable."""

DEADLINES = {"call_seconds": 25, "publish_seconds": 20, "start_seconds": 240}
MODES = ("lockstep", "asynchronous")
MINUTE = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(Way), choices=list(Way), type=Way)
    parser.add_argument("--minutes", type=int, default=4)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--name", default="chaos")
    options = parser.parse_args()
    folder = options.folder or Path(mkdtemp(prefix="chaos"))
    folder.mkdir(parents=True, exist_ok=True)
    trials = [Trial(folder, mode, options) for mode in options.mode]
    for trial in trials:
        trial.run()
    share = share_with_a_fault_a_minute(folder, options) if options.minutes else {}
    write_result(
        options.name,
        [row for trial in trials for row in trial.rows()],
        headline(trials) | share,
        seeds={"seed": options.seed},
    )


class Trial:
    """One mode: the unbroken run, the broken one, and what is to be said of them."""

    def __init__(self, folder: Path, mode: str, options: argparse.Namespace) -> None:
        self.folder, self.mode, self.options = folder, mode, options
        self.outcomes: list[Outcome] = []
        self.survived = False
        self.verdict: Verdict | None = None

    def run(self) -> None:
        """Both runs, one after the other; the unbroken one is kept for another call."""
        unbroken = RunDirectory(self.folder / f"{self.mode}_unbroken")
        broken = RunDirectory(self.folder / f"{self.mode}_broken_{self.options.seed}")
        if not (unbroken.path / "report.html").exists():
            with Cluster(self.options.kinds) as cluster:
                _finish(cluster.start(self._configuration(unbroken)), unbroken)
        planned = plan_faults(
            self.options.faults,
            steps=self.options.steps,
            pools=list(POOLS),
            ways=self.options.kinds,
            seed=self.options.seed,
        )
        rmtree(broken.path, ignore_errors=True)
        with Cluster(self.options.kinds) as cluster:
            run = cluster.start(self._configuration(broken))
            injector = Injector(run, broken, self.options.seed, cluster.nodes)
            injector.carry_out(planned)
            injector.wait_for_end()
            run.finish()
            print(run.stderr)
            left = run.orphans()
        print(f"{self.mode}: {len(injector.done)} of {len(planned)} faults before the run's end")
        self.survived = run.code == 0 and bool(injector.done)
        self.outcomes = read_outcomes(injector.done, broken)
        if run.code == 0:
            self.verdict = judge(broken, unbroken)
            print(self.mode, self.verdict)
        if left:
            print(f"left behind: {left}")

    def rows(self) -> list[dict[str, object]]:
        """The table: a fault a row."""
        return [
            {
                "mode": self.mode,
                "worker": _named(outcome.fault),
                "what": outcome.fault.way.value,
                "after step": outcome.fault.step,
                "noticed s": _seconds(outcome.noticed_after),
                "back s": _seconds(outcome.back_after),
                "steps again": outcome.steps_again,
            }
            for outcome in self.outcomes
        ]

    def _configuration(self, run: RunDirectory) -> Path:
        staleness = 0 if self.mode == "lockstep" else 1
        return write_configuration(
            self.folder,
            name=run.path.name,
            seed=self.options.seed,
            distill={
                "steps": self.options.steps,
                "evaluate_every": 5 * max(1, self.options.steps // 20),
                "staleness": {"max_staleness": staleness},
            },
            pools=POOLS,
            deadlines=DEADLINES,
            faults={"max_replacements": self.options.faults},
        )


class Cluster:
    """Three nodes where cables are to be pulled, otherwise the cluster that a run starts itself."""

    def __init__(self, kinds: Sequence[Way]) -> None:
        self.nodes: RayNodes | None = None
        self._wants_nodes = Way.CUT in kinds
        self._stack = ExitStack()
        self._runs: list[Run] = []

    def __enter__(self) -> Cluster:
        if self._wants_nodes:
            self.nodes = self._stack.enter_context(ray_nodes(*NODES))
        return self

    def __exit__(self, *exception: object) -> None:
        for run in self._runs:
            run.end()
        self._stack.close()

    def start(self, configuration: Path) -> Run:
        """Begin a run here."""
        options: dict[str, Any] = {"log": configuration.with_suffix(".log")}
        if self.nodes is not None:
            options |= {"machine": self.nodes.head, "environment": self.nodes.environment}
        self._runs.append(start("train", configuration, **options))
        return self._runs[-1]


def headline(trials: Sequence[Trial]) -> dict[str, float]:
    """The figures of all trials together; a run that did not survive lost more than it tells."""
    outcomes = [outcome for trial in trials for outcome in trial.outcomes]
    verdicts = [trial.verdict for trial in trials if trial.verdict is not None]
    back = [each.back_after for each in outcomes if each.back_after is not None]
    exact = [t.verdict for t in trials if t.mode == "lockstep" and t.verdict is not None]
    return {
        "faults": len(outcomes),
        "survived": sum(len(trial.outcomes) for trial in trials if trial.survived),
        "lost_prompts": sum(verdict.lost_prompts for verdict in verdicts),
        "doubled_prompts": sum(verdict.doubled_prompts for verdict in verdicts),
        "equal_bytes": float(bool(exact) and all(verdict.is_the_same for verdict in exact)),
        "median_seconds_to_replace": statistics.median(back) if back else float("nan"),
    }


def share_with_a_fault_a_minute(folder: Path, options: argparse.Namespace) -> Mapping[str, float]:
    """Steps of minutes that begin with a loss, over those of minutes without one, in turn.

    One asynchronous run; what else the machine does is the same for both, more or less.
    """
    run_folder = RunDirectory(folder / f"minutes_{options.seed}")
    rmtree(run_folder.path, ignore_errors=True)
    pools = {pool: wanted for pool, wanted in POOLS.items() if pool != "evaluation"}
    configuration = write_configuration(
        folder,
        name=run_folder.path.name,
        seed=options.seed,
        distill={
            "steps": 1_000_000,
            "staleness": {"max_staleness": 1},
            "checkpoint_every": 20,
            "measure_every": 100,
        },
        pools=pools,
        deadlines=DEADLINES,
        faults={"max_replacements": 1000},
    )
    calm = stormy = 0
    with Cluster([Way.KILL]) as cluster:
        injector = Injector(cluster.start(configuration), run_folder, options.seed)
        injector.wait_for_step(5)
        for minute in range(options.minutes):
            calm += _count_steps(injector)
            injector.inject(list(pools)[minute % len(pools)], Way.KILL)
            stormy += _count_steps(injector)
            _wait_until_whole(injector)
    print(f"steps in {options.minutes} min without a loss: {calm}; with: {stormy}")
    return {"throughput_share_with_a_fault_a_minute": stormy / calm}


def _count_steps(injector: Injector) -> int:
    """Steps that stand after a minute and did not before it."""
    first = injector.last_step()
    time.sleep(MINUTE)
    return injector.last_step() - first


def _wait_until_whole(injector: Injector) -> None:
    """Return once all that was lost is replaced."""
    while any(
        outcome.back_after is None for outcome in read_outcomes(injector.done, injector.folder)
    ):
        assert injector.run.process.poll() is None, injector.run.finish().stderr
        time.sleep(1.0)


def _finish(run: Run, folder: RunDirectory) -> None:
    run.finish(seconds=3600.0)
    assert run.code == 0, run.stderr
    assert read_metrics(folder)


def _named(fault: Fault) -> str:
    return ", ".join(fault.workers)


def _seconds(value: float | None) -> float | str:
    return "-" if value is None else round(value, 1)


if __name__ == "__main__":
    main()

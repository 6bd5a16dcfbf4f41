"""Which prompts each step was trained on: one line a step, so that a run can prove it."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from distill_system.observe.json_lines import read_rows
from distill_system.observe.run_directory import RunDirectory, drop_half_line, write_text


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedPrompts:
    """One line of prompts.jsonl: the prompt ids of each stream that the step learned from."""

    stage: str
    step: int
    prompt_ids: dict[str, list[str]]


class PromptLog:
    """Writes one line per call to prompts.jsonl; threads may share it.

    Opening drops a last line that a crash left half-written.  On resume, call truncate_after with
    the checkpoint's step, so that no step stands in it twice.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._lock = threading.Lock()
        run.path.mkdir(parents=True, exist_ok=True)
        drop_half_line(run.prompts_path)
        self._file = run.prompts_path.open("a", encoding="utf-8")

    def log(self, stage: str, step: int, prompt_ids: Mapping[str, Sequence[str]]) -> None:
        """Write what a step of a stage was trained on.

        Args:
            stage: sft_teacher, sft_student or distill.
            step: as in metrics.jsonl.
            prompt_ids: stream -> ids, in the order of the batch; streams without any are left out.
        """
        row = TrainedPrompts(
            stage=stage,
            step=step,
            prompt_ids={stream: list(ids) for stream, ids in prompt_ids.items() if ids},
        )
        with self._lock:
            self._file.write(_to_line(row))
            self._file.flush()

    def truncate_after(self, stage: str, step: int) -> None:
        """Drop the lines of this stage whose step is later."""
        with self._lock:
            self._file.close()
            rows = read_prompts(self._run)
            kept = [row for row in rows if row.stage != stage or row.step <= step]
            write_text(self._run.prompts_path, "".join(map(_to_line, kept)))
            self._file = self._run.prompts_path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._file.close()


def read_prompts(run: RunDirectory) -> list[TrainedPrompts]:
    """All lines in the order written; none if there is no such file yet.

    A last line without its end, as a run that is still writing has, is left out.

    Raises:
        RunStateError: another line is not as PromptLog writes it; the message says which.
    """
    return read_rows(run.prompts_path, TrainedPrompts, expected="stage, step and prompt_ids")


def _to_line(row: TrainedPrompts) -> str:
    fields = {"stage": row.stage, "step": row.step, "prompt_ids": row.prompt_ids}
    return json.dumps(fields, ensure_ascii=False) + "\n"

"""Which prompts each step was trained on: one line a step, so that a run can prove it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distill_system.observe.json_lines import JsonLinesLog, read_rows
from distill_system.observe.run_directory import RunDirectory
from distill_system.observe.run_writes import RunWrites

_FIELDS = "stage, step and prompt_ids"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedPrompts:
    """One line of prompts.jsonl: the prompt ids of each stream that the step learned from."""

    stage: str
    step: int
    prompt_ids: dict[str, list[str]]


class PromptLog(JsonLinesLog[TrainedPrompts]):
    """Writes one line per call to prompts.jsonl; see JsonLinesLog for resume and threads."""

    def __init__(self, run: RunDirectory, *, writes: RunWrites | None = None) -> None:
        super().__init__(run.prompts_path, TrainedPrompts, expected=_FIELDS, writes=writes)

    def log(self, stage: str, step: int, prompt_ids: Mapping[str, Sequence[str]]) -> None:
        """Write what a step of a stage was trained on.

        Args:
            stage: sft_teacher, sft_student or distill.
            step: as in metrics.jsonl.
            prompt_ids: stream -> ids, in the order of the batch; streams without any are left out.
        """
        used = {stream: list(ids) for stream, ids in prompt_ids.items() if ids}
        self.append(TrainedPrompts(stage=stage, step=step, prompt_ids=used))


def read_prompts(run: RunDirectory) -> list[TrainedPrompts]:
    """All lines in the order written; see read_rows.

    Raises:
        RunStateError: a line is not as PromptLog writes it; the message says which.
    """
    return read_rows(run.prompts_path, TrainedPrompts, expected=_FIELDS)

"""What every stage holds in its hands: configuration, folder, cluster, data, and where to tell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_system.cluster import ClusterSession
from distill_system.config import RunConfig
from distill_system.data import RunData
from distill_system.observe import LiveView, MetricLog, PromptLog, RunDirectory, Timings


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """One process's hold on one run.

    tokenizer: a transformers tokenizer.  data: the sets that the stages of this process read.
    """

    config: RunConfig
    run: RunDirectory
    cluster: ClusterSession
    tokenizer: Any
    data: RunData
    log: MetricLog
    prompts: PromptLog
    timings: Timings
    view: LiveView
    resume: bool

    @property
    def teacher_path(self) -> str:
        """The teacher that scores and writes: fine-tuned by this run, or as it came."""
        return model_path(self.config, self.run, "teacher")

    @property
    def student_path(self) -> str:
        """The student that distillation starts from."""
        return model_path(self.config, self.run, "student")

    @property
    def max_model_length(self) -> int:
        """Longest prompt plus longest response, in tokens."""
        return max_model_length(self.config)


def max_model_length(config: RunConfig) -> int:
    """Longest prompt plus longest response, in tokens."""
    return config.data.max_prompt_tokens + config.rollout.sampling.max_response_tokens


def model_path(config: RunConfig, run: RunDirectory, role: str) -> str:
    """Where the model of a role stands once its supervised fine-tuning, if any, is done."""
    if role == "teacher":
        tuned, given = config.teacher.sft, config.teacher.path
    else:
        tuned, given = config.student.sft, config.student.path
    if tuned is None:
        assert given is not None, "the configuration gives a path or an architecture with sft"
        return str(Path(given).absolute()) if Path(given).is_dir() else given
    return str(sft_directory(run, role))


def sft_directory(run: RunDirectory, role: str) -> Path:
    """Where supervised fine-tuning puts a role's model."""
    return run.teacher_directory if role == "teacher" else run.student_sft_directory

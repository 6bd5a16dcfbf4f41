"""What every stage of a run needs: configuration, folder, cluster, data, logs and the live view."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill_system.cluster import ClusterSession
from distill_system.config import RunConfig
from distill_system.config.model import ModelConfig
from distill_system.data import RunData
from distill_system.observe import LiveView, MetricLog, PromptLog, RunDirectory, RunWrites, Timings
from distill_system.stopping import StopRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """What one process needs to run stages of one run.

    tokenizer: a transformers tokenizer.  data: the sets that the stages of this process read.
    writes: of the files that the run can do without for a while.
    stop: whether a person wants the run to end, which stages look at between two steps.
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
    stop: StopRequest = field(default_factory=StopRequest)
    writes: RunWrites = field(default_factory=RunWrites)

    @property
    def teacher_path(self) -> str:
        """Folder or hub name of the teacher: fine-tuned by this run, or as it was given."""
        return model_path(self.config, self.run, "teacher")

    @property
    def student_path(self) -> str:
        """Folder or hub name of the student that distillation starts from."""
        return model_path(self.config, self.run, "student")


def model_path(config: RunConfig, run: RunDirectory, role: str) -> str:
    """Folder or hub name of a role's model after its supervised fine-tuning, if it has any."""
    model: ModelConfig = getattr(config, role)
    if model.sft is None:
        given = model.path
        assert given is not None, "the configuration gives a path or an architecture with sft"
        # Absolute, because Ray may start workers in another working directory; a hub name is not.
        return str(Path(given).absolute()) if Path(given).is_dir() else given
    return str(sft_directory(run, role))


def sft_directory(run: RunDirectory, role: str) -> Path:
    """The folder into which supervised fine-tuning writes a role's model."""
    return run.teacher_directory if role == "teacher" else run.student_sft_directory

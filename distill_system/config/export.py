"""Configuration of the exported student: its precision, which weights, and where it is pushed."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from distill_system.config.base import ConfigModel


class ExportConfig(ConfigModel):
    """The student that a run leaves behind, in runs_directory/name/student."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of the exported weights. The evaluation after distillation is that of the exported
    weights. null: bfloat16 where learner.compute_dtype or rollout.student_engine.dtype is bfloat16,
    else float32."""
    weights: Literal["last", "best"] = "last"
    """last: those of the last step. best: those of the best checkpoint by distill.keep_best."""


class HubConfig(ConfigModel):
    """Push the exported student to the Hugging Face hub when the run is done. The token is read
    from the environment variable HF_TOKEN, and from nowhere else."""

    repository: str
    """Such as owner/name; it is made if it does not exist."""
    private: bool = True
    """Whether a repository that is made is private; one that exists stays as it is."""
    branch: Annotated[str, Field(min_length=1)] = "main"
    """Branch that is pushed to; it is made if it does not exist."""

    @field_validator("repository")
    @classmethod
    def _check(cls, repository: str) -> str:
        name = r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?"
        bad = "--" in repository or ".." in repository or len(repository) > 96
        if bad or not re.fullmatch(rf"{name}/{name}", repository) or repository.endswith(".git"):
            raise ValueError(
                "expected owner/name of letters, digits, '.', '_' and '-' (no '--' or '..', at "
                f"most 96 characters), got {repository!r}"
            )
        return repository

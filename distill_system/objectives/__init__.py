"""The objectives: pure torch, one file per method, behind one seam (rows.py)."""

from __future__ import annotations

from distill_system.config.objective import AmmdConfig, ObjectiveConfig
from distill_system.objectives.ammd import Ammd, measure_distance
from distill_system.objectives.rows import Objective, StudentHead, TeacherRows, TokenRows
from distill_system.objectives.supervised import Supervised
from distill_system.objectives.vocabulary import read_vocabulary, unit_rows

__all__ = [
    "StudentHead",
    "TeacherRows",
    "TokenRows",
    "build_objective",
    "measure_distance",
    "read_vocabulary",
    "unit_rows",
]

OBJECTIVES = {AmmdConfig: Ammd}


def build_objective(config: ObjectiveConfig | None, *, max_response_tokens: int) -> Objective:
    """The objective that the configuration names; None is supervised fine-tuning."""
    if config is None:
        return Supervised()
    return OBJECTIVES[type(config)](config, max_response_tokens=max_response_tokens)

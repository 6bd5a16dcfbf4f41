"""A configuration in -> what each worker will hold and what will travel out, before it starts.

Reads the models' config.json and nothing else.
"""

from distill_system.planning.learner_memory import LearnerLoad, learner_memory
from distill_system.planning.memory import (
    Memory,
    MemoryPart,
    ScorerLoad,
    engine_memory,
    scorer_memory,
)
from distill_system.planning.plan import Plan, WorkerPlan, make_plan
from distill_system.planning.shapes import (
    ModelShape,
    architecture_shape,
    measure_shape,
    read_shape,
)
from distill_system.planning.table import render_plan

__all__ = [
    "LearnerLoad",
    "Memory",
    "MemoryPart",
    "ModelShape",
    "Plan",
    "ScorerLoad",
    "WorkerPlan",
    "architecture_shape",
    "engine_memory",
    "learner_memory",
    "make_plan",
    "measure_shape",
    "read_shape",
    "render_plan",
    "scorer_memory",
]

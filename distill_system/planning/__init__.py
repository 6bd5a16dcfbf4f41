"""A configuration in -> what each worker will hold and what will travel out, before it starts.

Reads the models' config.json and nothing else.
"""

from distill_system.planning.learner_memory import learner_memory
from distill_system.planning.loads import LearnerLoad
from distill_system.planning.memory import Memory
from distill_system.planning.plan import Plan, WorkerPlan, make_plan
from distill_system.planning.scorer_memory import scorer_memory
from distill_system.planning.shapes import ModelShape, architecture_shape, measure_shape, read_shape
from distill_system.planning.table import render_plan

__all__ = [
    "LearnerLoad",
    "Memory",
    "ModelShape",
    "Plan",
    "WorkerPlan",
    "architecture_shape",
    "learner_memory",
    "make_plan",
    "measure_shape",
    "read_shape",
    "render_plan",
    "scorer_memory",
]

"""Students cut from their teachers: the blocks, heads, neurons and units that matter most."""

from distill_system.cutting.cut_student import CutReport, CutRequest, cut_student
from distill_system.cutting.importance import Importance, measure_importance
from distill_system.cutting.surgery import Choice, Shape, cut_model

__all__ = [
    "Choice",
    "CutReport",
    "CutRequest",
    "Importance",
    "Shape",
    "cut_model",
    "cut_student",
    "measure_importance",
]

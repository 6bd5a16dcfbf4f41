"""The frozen teacher reads trajectories and says what the objective needs of it."""

from distill_system.scoring.pool import ScoringPool
from distill_system.scoring.ranked import RankedScorer
from distill_system.scoring.scorer import Shipped, TeacherScorer

__all__ = ["RankedScorer", "ScoringPool", "Shipped", "TeacherScorer"]

"""The frozen teacher reads trajectories and says what the objective needs of it."""

from distill_system.scoring.continuous import ContinuousScoring
from distill_system.scoring.pool import ScoredChunk, ScoringPool
from distill_system.scoring.scorer import Shipped, TeacherScorer

__all__ = ["ContinuousScoring", "ScoredChunk", "ScoringPool", "Shipped", "TeacherScorer"]

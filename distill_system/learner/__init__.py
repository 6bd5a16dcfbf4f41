"""Collate, forward, critics up, student down, optimizer: N ranks under torch.distributed."""

from distill_system.learner.group import LearnerGroup
from distill_system.learner.learner import Learner, ModelSource
from distill_system.learner.optimizer import learning_rate_at

__all__ = ["Learner", "LearnerGroup", "ModelSource", "learning_rate_at"]

"""Collate, forward, critics up, student down, optimizer: N ranks under torch.distributed."""

from distill_system.learner.checkpoint_files import (
    FileRecord,
    describe_file,
    find_alterations,
    find_misfits,
)
from distill_system.learner.group import LearnerGroup
from distill_system.learner.learner import Learner
from distill_system.learner.optimizer import learning_rate_at
from distill_system.learner.student import ModelSource

__all__ = [
    "FileRecord",
    "Learner",
    "LearnerGroup",
    "ModelSource",
    "describe_file",
    "find_alterations",
    "find_misfits",
    "learning_rate_at",
]

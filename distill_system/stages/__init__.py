"""The stages of a run, each able to run alone and skipped when its output exists."""

from distill_system.stages.train import STAGES, train

__all__ = ["STAGES", "train"]

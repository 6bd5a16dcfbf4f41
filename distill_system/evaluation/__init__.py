"""Evaluation: generations in, scores with their standard errors out."""

from distill_system.evaluation.evaluate import SplitEvaluation, evaluate_splits

__all__ = ["SplitEvaluation", "evaluate_splits"]

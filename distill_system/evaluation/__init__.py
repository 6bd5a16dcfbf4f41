"""Evaluation: generations in, scores with their standard errors out."""

from distill_system.evaluation.evaluate import (
    SplitEvaluation,
    check_evaluation,
    evaluate_splits,
)

__all__ = ["SplitEvaluation", "check_evaluation", "evaluate_splits"]

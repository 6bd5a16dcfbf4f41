"""Comparison: finished runs of several objectives and seeds in, one verdict with error bars out."""

from distill_system.comparison.plan import Plan, read_plan, run_directory, run_key, write_plan
from distill_system.comparison.write import ComparisonFiles, write_comparison

__all__ = [
    "ComparisonFiles",
    "Plan",
    "read_plan",
    "run_directory",
    "run_key",
    "write_comparison",
    "write_plan",
]

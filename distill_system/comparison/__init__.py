"""Compares finished runs of several objectives and seeds: means, error bars, significance."""

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

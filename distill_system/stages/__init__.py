"""The stages of a run, each able to run alone and skipped when its output exists (train.py)."""

"""The stages of a run (train.py): each can run alone, and is skipped if its output exists."""

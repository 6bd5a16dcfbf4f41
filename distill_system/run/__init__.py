"""What a run holds: its context, workers and their arguments, checkpoints, exports and checks."""

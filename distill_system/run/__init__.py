"""What the stages of a run share: context, workers, checkpoints, export, checks."""

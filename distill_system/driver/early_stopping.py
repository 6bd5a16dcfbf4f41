"""Measurements of a held-out metric in; whether the distillation should end, out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from distill_system.config.distill import EarlyStoppingConfig


class EarlyStopping:
    """Counts measurements without a gain; what it decides follows from these alone.

    config: None never ends a run.  best: the value that the next must beat; None before the first.
    """

    def __init__(self, config: EarlyStoppingConfig | None) -> None:
        self.config = config
        self.best: float | None = None
        self.without_gain = 0

    @property
    def is_due(self) -> bool:
        """Whether the run should end now."""
        return self.config is not None and self.without_gain >= self.config.patience

    @property
    def reason(self) -> str:
        """For a person: what did not get better for how long."""
        assert self.config is not None, "is_due comes first"
        best = "any finite value" if self.best is None else f"{self.best:.4g}"
        return (
            f"distill.early_stopping: {self.config.metric} was not better than {best} by more "
            f"than {self.config.min_gain:g} in {self.without_gain} measurements in a row"
        )

    def observe(self, metrics: Mapping[str, float | None]) -> None:
        """Count a step's metrics, if the one of the configuration is among them.

        A value that is not finite is no gain.
        """
        if self.config is None or self.config.metric not in metrics:
            return
        value = metrics[self.config.metric]
        if self._is_better(value):
            self.best, self.without_gain = value, 0
        else:
            self.without_gain += 1

    def _is_better(self, value: float | None) -> bool:
        assert self.config is not None, "observe has looked"
        if value is None or not math.isfinite(value):
            return False
        if self.best is None:
            return True
        gain = self.best - value if self.config.mode == "min" else value - self.best
        return gain > self.config.min_gain

    def state(self) -> dict[str, Any]:
        """For a checkpoint; restore takes it back."""
        metric = None if self.config is None else self.config.metric
        return {"metric": metric, "best": self.best, "without_gain": self.without_gain}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on counting; from zero where the metric is another one than was counted."""
        if self.config is not None and state.get("metric") == self.config.metric:
            self.best, self.without_gain = state["best"], state["without_gain"]

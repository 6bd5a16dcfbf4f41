"""Plots of modelled pools for docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from modelled_runs import Measured

COLOURS = {0: "#8a8f98", 1: "#a6cbe3", 2: "#6ba3c8", 4: "#2f6f9f", 8: "#163d5c"}


def draw_scaling(found: Sequence[Measured], path: Path) -> None:
    """Speed-up over the barrier loop and the learner's idle share, a line for each S."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    speed, idle = figure.subplots(1, 2)
    barrier = {
        one.setting.workers: one.step_seconds for one in found if one.setting.max_staleness == 0
    }
    for most in dict.fromkeys(one.setting.max_staleness for one in found):
        line = [one for one in found if one.setting.max_staleness == most]
        workers = [one.setting.workers for one in line]
        how = {
            "color": COLOURS[most],
            "marker": "o",
            "markersize": 3,
            "label": f"S = {most}" if most else "barrier",
        }
        speed.plot(workers, [barrier[w.setting.workers] / w.step_seconds for w in line], **how)
        idle.plot(workers, [one.learner_idle for one in line], **how)
    speed.set_title("speed-up over the barrier loop", loc="left", fontsize=10)
    speed.set_ylim(bottom=0)
    idle.set_title("learner's idle share", loc="left", fontsize=10)
    idle.set_ylim(0, 1)
    for panel in (speed, idle):
        panel.set_xscale("log", base=2)
        panel.set_xticks(list(barrier), [str(count) for count in barrier])
        panel.set_xlabel("student rollout workers")
        _tidy(panel)
    speed.legend(fontsize=8, frameon=False)
    _save(figure, path)


def draw_ages(found: Sequence[Measured], path: Path, *, workers: int) -> None:
    """Share of on-policy tokens by staleness, a panel for each S."""
    shown = [
        one for one in found if one.setting.workers == workers and one.setting.max_staleness > 0
    ]
    figure = Figure(figsize=(9, 2.4), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for panel, one in zip(panels, shown, strict=True):
        ages = {age: share for age, share in one.ages.items() if age != "older"}
        panel.bar(list(ages), list(ages.values()), color=COLOURS[one.setting.max_staleness])
        panel.set_title(f"S = {one.setting.max_staleness}", loc="left", fontsize=10)
        panel.set_xlabel("staleness")
        _tidy(panel)
    panels[0].set_ylabel("share of tokens")
    _save(figure, path)


def _tidy(panel: Any) -> None:
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    with mpl.rc_context({"svg.hashsalt": "pipeline", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})

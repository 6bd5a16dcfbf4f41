"""Bars of tokens per second, TRL's beside ours, for docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

COLOURS = {"TRL": "#8a8f98", "ours": "#2f6f9f"}


def draw_rates(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One panel for each kind of lengths; the line on a bar goes from lowest to highest round."""
    kinds = list(dict.fromkeys(row["lengths"] for row in rows))
    most = max(sum(row["lengths"] == kind for row in rows) for kind in kinds)
    figure = Figure(figsize=(9, 0.8 + 0.34 * most * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), 1, squeeze=False, sharex=True)[:, 0]
    for panel, kind in zip(panels, kinds, strict=True):
        shown = [row for row in rows if row["lengths"] == kind]
        _draw_bars(panel, shown)
        panel.set_title(f"{kind} lengths", loc="left", fontsize=10)
    panels[-1].set_xlabel("response tokens per second")
    with mpl.rc_context({"svg.hashsalt": "pipeline", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def _draw_bars(panel: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    rates = [row["tokens_per_s"] for row in rows]
    spread = [
        [rate - row["lowest"] for rate, row in zip(rates, rows, strict=True)],
        [row["highest"] - rate for rate, row in zip(rates, rows, strict=True)],
    ]
    colours = [COLOURS[row["system"].split(",")[0]] for row in rows]
    panel.barh([row["system"] for row in rows], rates, xerr=spread, color=colours, height=0.7)
    panel.invert_yaxis()
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)

"""What staleness costs, from a comparison's compare.json: table and plot of docs/benchmarks.md.

    python benchmarks/staleness.py [--comparison F]

Each run behind the learner against its objective's run at max_staleness 0: the difference of the
mean over the test sets, paired by seed, ± its standard error over seeds. Prints a markdown table
and writes results/staleness.svg.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from record import RESULTS

WAYS = ("1_wait", "4_wait", "4_reissue", "4_weigh")
OBJECTIVES = {"ammd": "ammd", "reverse_kl_on_policy": "reverse_kl", "jsd_mixed": "jsd"}
METRICS = {
    "exact_match_greedy": 1,
    "exact_match_sampled": 1,
    "rouge_l_greedy": 1,
    "rouge_l_sampled": 1,
    "on_policy_distance": 4,
    "off_policy_distance": 4,
}
"""With the decimals that are shown; the distances have no test sets."""

Scores = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comparison", type=Path, default=RESULTS / "compare_staleness.json")
    scores = json.loads(parser.parse_args().comparison.read_text())["scores"]
    print("| objective | S, what is too old | " + " | ".join(METRICS) + " |")
    print("|---" * (2 + len(METRICS)) + "|")
    for base, name in _runs(scores):
        cells = [_cell(scores, metric, base, name) for metric in METRICS]
        print(f"| {base} | {_way(name)} | " + " | ".join(cells) + " |")
    draw_costs(scores, RESULTS / "staleness.svg")


def difference(scores: Scores, metric: str, base: str, name: str) -> tuple[float, float]:
    """Mean over seeds and its standard error, in the metric's own unit."""
    one, other = (_found(scores, metric)[run]["per_seed"] for run in (name, base))
    paired = [one[seed] - other[seed] for seed in one]
    return statistics.mean(paired), statistics.stdev(paired) / len(paired) ** 0.5


def draw_costs(scores: Scores, path: Path) -> None:
    """One panel for each score in percent; a bar is one standard error to either side."""
    metrics = [metric for metric, decimals in METRICS.items() if decimals == 1]
    runs = [(base, name) for base, name in _runs(scores) if base != name]
    labels = [f"{base}, S = {_way(name)}" for base, name in runs]
    figure = Figure(figsize=(11, 0.8 + 0.3 * len(runs)), layout="constrained")
    for panel, metric in zip(figure.subplots(1, len(metrics), sharey=True), metrics, strict=True):
        means, errors = zip(*(difference(scores, metric, *run) for run in runs), strict=True)
        panel.axvline(0, color="#8a8f98", linewidth=1)
        panel.errorbar(means, labels, xerr=errors, fmt="o", color="#2f6f9f", markersize=4)
        panel.set_title(metric.replace("_", " "), loc="left", fontsize=9)
        panel.set_xlim(-2, 2)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panel.invert_yaxis()
    figure.supxlabel("points more than at S = 0, paired by seed, ± one standard error", fontsize=9)
    with mpl.rc_context({"svg.hashsalt": "staleness", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def _runs(scores: Scores) -> list[tuple[str, str]]:
    """(run at S = 0, run) of what was compared."""
    there = _found(scores, "exact_match_greedy")
    names = {base: [base, *(f"{of}_behind_{w}" for w in WAYS)] for base, of in OBJECTIVES.items()}
    return [
        (base, name) for base, all_names in names.items() for name in all_names if name in there
    ]


def _found(scores: Scores, metric: str) -> Mapping[str, Any]:
    sets = scores[metric]
    found: Mapping[str, Any] = sets.get("average", next(iter(sets.values())))["objectives"]
    return found


def _cell(scores: Scores, metric: str, base: str, name: str) -> str:
    decimals, found = METRICS[metric], _found(scores, metric)[name]
    cell = f"{found['mean']:.{decimals}f} ± {found['stderr']:.{decimals}f}"
    if name == base:
        return cell
    mean, error = difference(scores, metric, base, name)
    return f"{cell} ({mean:+.{decimals}f} ± {error:.{decimals}f})"


def _way(name: str) -> str:
    return name.partition("_behind_")[2].replace("_", ", ") or "0"


if __name__ == "__main__":
    main()

"""A run's files in, one self-contained report.html out; and that of a curriculum of runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml

from distill_system.observe.curves import (
    DISTANCE_CURVES,
    HELD_OUT_CURVES,
    LEARNER_CURVES,
    RESPONSE_CURVES,
    STALENESS_CURVES,
    Chart,
    assign_phase_colors,
    draw_busy_shares,
    draw_curves,
    draw_scores,
    draw_sources,
    draw_supervised_loss,
    draw_throughput,
)
from distill_system.observe.fault_log import read_faults, tell_faults
from distill_system.observe.formats import format_metric
from distill_system.observe.metrics import MetricRow, read_metrics
from distill_system.observe.pages import render_page
from distill_system.observe.recorded import read_config
from distill_system.observe.run_directory import RunDirectory, write_json, write_text
from distill_system.observe.summary import build_summary, read_evaluation

DISTANCE_TITLES = {
    "cross_entropy": "Held-out cross-entropy",
    "forward_kl": "Held-out KL to the teacher",
    "on_policy": "On-policy distance",
    "off_policy": "Off-policy distance",
}
ROLES = {"teacher": "teacher", "before": "student, before", "after": "student, distilled"}
POOL_PARTS = {"busy": "series-3", "blocked": "series-2", "starved": "grid"}
"""What a pool's workers do with their time -> its colour on the page."""
CLEAR_STANDARD_ERRORS = 1.96
"""A gain of more standard errors than this is coloured; chance makes such a one in 20."""


def write_report(run: RunDirectory) -> None:
    """Write report.html from the parts of the run that exist; the page names missing ones.

    Raises: RunStateError if a part exists and cannot be read.
    """
    filters = {"gain_class": classify_gain}
    write_text(run.report_path, render_page("observe/report.html", _collect(run), filters=filters))


def _collect(run: RunDirectory) -> dict[str, Any]:
    """The values of all names in the template."""
    summary, rows = build_summary(run), read_metrics(run)
    config = read_config(run)
    metric = find_headline_metric(summary["scores"], config)
    return {
        "summary": summary,
        "metric": metric,
        "headline": write_headline(summary, metric),
        "sections": _draw_sections(run, rows, metric),
        "throughput": draw_throughput(rows),
        "phase_colors": assign_phase_colors(rows),
        "phase_shares": compute_phase_shares(rows),
        "pool_charts": [
            *draw_busy_shares(rows, summary["pools"]),
            *draw_curves(rows, "distill", STALENESS_CURVES),
        ],
        "pool_parts": POOL_PARTS,
        "faults": tell_faults(read_faults(run)),
        "samples": collect_samples(run),
        "config": yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else "",
        "roles": name_roles(config),
        "is_tuned": is_tuned(config),
        "distance_titles": DISTANCE_TITLES,
    }


def is_tuned(config: Mapping[str, Any]) -> bool:
    """Whether the student was fine-tuned before it was distilled."""
    return bool((config.get("student") or {}).get("sft"))


def name_roles(config: Mapping[str, Any]) -> dict[str, str]:
    """Each evaluated model with its name for people."""
    return {**ROLES, "before": "student, SFT"} if is_tuned(config) else dict(ROLES)


def find_headline_metric(
    scores: Mapping[str, Mapping[str, object]], config: Mapping[str, Any]
) -> str | None:
    """The first of evaluation.metrics, greedy; without a configuration the first score found."""
    known = [metric for split in scores.values() for metric in split]
    wanted = [f"{name}_greedy" for name in config.get("evaluation", {}).get("metrics", ())]
    return next((metric for metric in [*wanted, *known] if metric in known), None)


def write_headline(summary: Mapping[str, Any], metric: str | None) -> str:
    """One sentence: the main split's score, held-out losses and distances, before and after."""
    parts = []
    split = _find_main_split(summary["scores"], metric)
    if split is not None and metric is not None:
        score = summary["scores"][split][metric]
        error = score["gain_stderr"]
        spread = "" if error is None else f" ± {error:.1f}"
        parts.append(
            f"{format_metric(metric)}, {split.replace('_', ' ')}: {score['before']:.1f} → "
            f"{score['after']:.1f} ({score['gain']:+.1f}{spread}, {score['num_examples']} examples)"
        )
    for name, distance in summary["distances"].items():
        before, after = distance["before"], distance["after"]
        if before and after is not None:
            verb = "falls" if after < before else "rises"
            share = abs(after / before - 1)
            title = DISTANCE_TITLES[name].lower()
            parts.append(f"{title} {before:.4f} → {after:.4f}, {verb} by {share:.0%}")
    return "; ".join(parts)


def _find_main_split(scores: Mapping[str, Any], metric: str | None) -> str | None:
    """in_distribution, or else the first split that has a score both before and after."""
    compared = [
        name for name, split in scores.items() if split.get(metric, {}).get("gain") is not None
    ]
    return "in_distribution" if "in_distribution" in compared else next(iter(compared), None)


def _draw_sections(
    run: RunDirectory, rows: Sequence[MetricRow], metric: str | None
) -> list[tuple[str, list[Chart]]]:
    """Title and charts of each section that is not empty."""
    sections = [
        ("Held-out losses", draw_curves(rows, "distill", HELD_OUT_CURVES)),
        ("Scores during training", _draw_scores(run, metric)),
        ("Distances to the teacher", draw_curves(rows, "distill", DISTANCE_CURVES)),
        ("Sources of the prompts", draw_sources(rows)),
        ("Learner", draw_curves(rows, "distill", LEARNER_CURVES)),
        ("Responses", draw_curves(rows, "distill", RESPONSE_CURVES)),
        ("Supervised fine-tuning", draw_supervised_loss(rows)),
    ]
    return [(title, charts) for title, charts in sections if charts]


def _draw_scores(run: RunDirectory, metric: str | None) -> list[Chart]:
    if metric is None:
        return []
    labels = sorted(path.stem for path in run.evaluations_directory.glob("step_*.json"))
    found = [read_evaluation(run, label) for label in ("before", *labels, "after")]
    evaluations = sorted((item for item in found if item), key=lambda item: int(item["step"]))
    sampled = metric.replace("_greedy", "_sampled")
    return draw_scores(evaluations, metric, format_metric(metric)) + draw_scores(
        evaluations, sampled, format_metric(sampled)
    )


def compute_phase_shares(rows: Sequence[MetricRow]) -> dict[str, float]:
    """Phase of distillation -> its share of the seconds of all phases, the largest first."""
    seconds = {
        phase: sum(
            row.metrics.get(f"seconds/{phase}") or 0.0 for row in rows if row.stage == "distill"
        )
        for phase in assign_phase_colors(rows)
    }
    total = sum(seconds.values())
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return {phase: value / total for phase, value in ordered} if total > 0 else {}


def collect_samples(run: RunDirectory) -> dict[str, list[dict[str, Any]]]:
    """Split -> the prompts to show, each with its references and the texts of each role."""
    samples: dict[str, dict[tuple[int, str], dict[str, Any]]] = {}
    for role in ROLES:
        evaluation = read_evaluation(run, role) or {"splits": {}}
        for split, found in evaluation["splits"].items():
            for index, shown in enumerate(found["shown"]):
                card = samples.setdefault(split, {}).setdefault(
                    (index, shown["prompt"]),
                    {"prompt": shown["prompt"], "references": shown["references"], "texts": {}},
                )
                card["texts"][role] = {key: shown[key] for key in ("greedy", "sampled")}
    return {split: list(cards.values()) for split, cards in samples.items()}


def classify_gain(score: Mapping[str, float | None], metric: str) -> str:
    """The gain's CSS class: up, down, unclear (within chance) or plain (no direction is better)."""
    gain, error = score["gain"], score["gain_stderr"]
    if gain is None or metric.startswith(("mean_length", "ended_share")):
        return "plain"
    if error is None or math.isclose(gain, 0.0) or abs(gain) < CLEAR_STANDARD_ERRORS * error:
        return "unclear"
    return "up" if gain > 0 else "down"


def write_curriculum(run: RunDirectory, stages: Mapping[str, RunDirectory]) -> None:
    """Write both files from the stages that have begun.

    run: the curriculum's own folder.  stages: the run of each stage, in order.
    summary.json is {"run": name, "stages": [summary of each stage and "stage": its name]}.
    Raises: RunStateError if a part of a stage exists and cannot be read.
    """
    begun = {name: stage for name, stage in stages.items() if stage.config_path.exists()}
    rows = [{"stage": name, **build_summary(stage)} for name, stage in begun.items()]
    write_json(run.summary_path, {"run": run.path.name, "stages": rows})
    scores = rows[0]["scores"] if rows else {}
    config = read_config(run)
    values = {
        "run": run.path.name,
        "metric": find_headline_metric(scores, config),
        "splits": list(scores),
        "stages": [
            {**row, **_describe(stage), "report": f"{stage.path.name}/report.html"}
            for row, stage in zip(rows, begun.values(), strict=True)
        ],
        "planned": list(stages),
        "distance_titles": DISTANCE_TITLES,
        "charts": _draw(begun),
    }
    page = render_page("observe/curriculum.html", values, filters={"gain_class": classify_gain})
    write_text(run.report_path, page)


def _describe(stage: RunDirectory) -> dict[str, Any]:
    """What may differ from stage to stage, for people."""
    config = read_config(stage)
    teacher, distill = config.get("teacher") or {}, config.get("distill") or {}
    path = teacher.get("path")
    return {
        "teacher": str(path or "random weights").removeprefix(f"{stage.path.parent}/"),
        "tuned": teacher.get("sft") is not None,
        "objective": (distill.get("objective") or {}).get("type"),
    }


def _draw(stages: Mapping[str, RunDirectory]) -> list[Chart]:
    """Held-out losses over all stages; a stage's steps follow those before it."""
    return draw_curves(list(_rows(stages)), "distill", HELD_OUT_CURVES)


def _rows(stages: Mapping[str, RunDirectory]) -> Iterator[MetricRow]:
    before = 0
    for stage in stages.values():
        rows = [row for row in read_metrics(stage) if row.stage == "distill"]
        yield from (replace(row, step=before + row.step) for row in rows)
        before += max((row.step for row in rows), default=0)

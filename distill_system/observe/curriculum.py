"""The runs of a curriculum's stages in, its summary.json and report.html out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from distill_system.observe.curves import HELD_OUT_CURVES, Chart, draw_curves
from distill_system.observe.metrics import MetricRow, read_metrics
from distill_system.observe.pages import render_page
from distill_system.observe.recorded import read_config
from distill_system.observe.report import DISTANCE_TITLES, classify_gain, find_headline_metric
from distill_system.observe.run_directory import RunDirectory, write_json, write_text
from distill_system.observe.summary import build_summary


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

"""Writes distill.json, the Grafana dashboard of runs: `python deploy/grafana/make_dashboard.py`.

A table of rows, each of panels, each of queries. A unit test holds the file against this table and
the table against the names and labels that the package exports.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).with_name("distill.json")

RUN = 'run=~"$run"'
"""What every query is limited to."""

TEACHERS = 'pool=~"teacher_.+"'

WIDTH, HEIGHT, COLUMNS = 6, 7, 24


@dataclass(frozen=True, slots=True)
class Panel:
    """A chart, a number (stat) or a table.

    queries: (PromQL, legend) pairs.  unit: in Grafana's words.  note: shown behind the title's
    small i.
    """

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    note: str = ""
    kind: str = "timeseries"


def newest(metric: str, *by: str, where: str = "") -> str:
    """The series of ray_distill_<metric>, one per run and `by`.

    A run that was resumed stands there twice for some seconds: max takes one of them.
    """
    labels = ", ".join(("run", *by))
    limits = ", ".join([RUN, where] if where else [RUN])
    return f"max by ({labels}) (ray_distill_{metric}{{{limits}}})"


def chart(title: str, *queries: tuple[str, str], unit: str = "short", note: str = "") -> Panel:
    """A panel of lines over time."""
    return Panel(title, queries, unit, note)


PROGRESS = [
    Panel(
        "Step",
        (
            (
                f"{newest('step', 'stage')} / {newest('total_steps', 'stage')}",
                "{{run}} {{stage}}",
            ),
        ),
        "percentunit",
        "Steps done of each stage's total.",
        "stat",
    ),
    Panel(
        "Time left",
        ((newest("remaining_seconds", "stage"), "{{run}} {{stage}}"),),
        "s",
        "By the mean time of the steps so far.",
        "stat",
    ),
    Panel(
        "Since the last step",
        (
            (
                f"time() - {newest('last_progress_time_seconds', 'stage')} "
                f"and {newest('stage_running', 'stage')} == 1",
                "{{run}} {{stage}}",
            ),
        ),
        "s",
        "Grows while a step, a measurement or an evaluation is under way.",
        "stat",
    ),
    Panel(
        "What is run",
        (
            (
                newest("run_info", "version", "objective", "teacher", "student", "report"),
                "{{run}}",
            ),
        ),
        kind="table",
    ),
]

LEARNING = [
    chart("Loss", (newest("learner_loss", "stage"), "{{run}} {{stage}}")),
    chart(
        "Held-out distances",
        (newest("held_out_on_policy_distance"), "{{run}} on-policy"),
        (newest("held_out_off_policy_distance"), "{{run}} off-policy"),
        note="What the best critic finds between student and teacher; 0 where they are the same.",
    ),
    chart(
        "Held-out losses, nats per token",
        (newest("held_out_cross_entropy"), "{{run}} cross-entropy"),
        (newest("held_out_forward_kl"), "{{run}} KL to the teacher"),
    ),
    chart(
        "Scores",
        (
            newest("evaluation_score", "split", "score", "decoding"),
            "{{run}} {{split}} {{score}} {{decoding}}",
        ),
        note="Of the evaluations during training: distill.evaluate_every.",
    ),
]

HEALTHY = [
    chart(
        "Mean length of responses, tokens",
        (newest("learner_mean_student_response_tokens"), "{{run}} student"),
        (newest("text_mean_tokens", "author"), "{{run}} {{author}}"),
        note="A drift up or down: the student exploits the objective by its answers' length.",
    ),
    chart(
        "Share of the student's responses that end",
        (newest("learner_student_ended_share"), "{{run}}"),
        unit="percentunit",
    ),
    chart(
        "Entropy, nats per token",
        (newest("text_entropy", "author"), "{{run}} {{author}}"),
        note="Of the text of each step. Down to nothing: the student always says the same.",
    ),
    chart(
        "Different trigrams",
        (newest("text_distinct_trigrams", "author"), "{{run}} {{author}}"),
        unit="percentunit",
        note="Of all trigrams in a step's text. Down: loops, or one answer to every prompt.",
    ),
    chart(
        "Most likely tokens in common with the teacher",
        (newest("held_out_top_token_overlap"), "{{run}}"),
        unit="percentunit",
        note="Of 16, on held-out prompts. It rises where distillation succeeds.",
    ),
    chart(
        "Collapse",
        (newest("collapse", "signal"), "{{run}} {{signal}}"),
        note="1: outside of its limit in distill.collapse.",
    ),
    chart(
        "Log-probability gap, nats",
        (newest("learner_logprob_gap"), "{{run}}"),
        note="Between what the engines recorded and the learner's own: a rise means stale or wrong "
        "weights in an engine.",
    ),
    chart(
        "Staleness, versions",
        (newest("learner_mean_staleness"), "{{run}} mean"),
        (newest("learner_max_staleness"), "{{run}} most"),
        note="Age of the student's tokens; asynchronous runs alone.",
    ),
    chart(
        "Workers lost and replaced",
        (newest("pool_faults", "pool"), "{{run}} {{pool}}"),
        note="Since the run's process began; faults.jsonl in its folder says why.",
    ),
]

POOLS = [
    chart(
        "Busy share",
        (newest("pool_busy_share", "pool"), "{{run}} {{pool}}"),
        unit="percentunit",
        note="The pool that bounds an asynchronous run is busy all the time.",
    ),
    chart(
        "Starved share",
        (newest("pool_starved_share", "pool"), "{{run}} {{pool}}"),
        unit="percentunit",
        note="Nothing to work on: what comes before it is too slow. In lockstep all that is idle.",
    ),
    chart(
        "Blocked share",
        (newest("pool_blocked_share", "pool"), "{{run}} {{pool}}"),
        unit="percentunit",
        note="No room for what it would hand on: what comes after it is too slow.",
    ),
    chart("Queue before each pool", (newest("pool_queued", "pool"), "{{run}} {{pool}}")),
    chart(
        "Predicted gain of one more worker",
        (newest("pool_speedup", "pool"), "{{run}} {{pool}}"),
        note="Step time now over step time with one more worker; 1: none. Scale the highest one.",
    ),
    chart("Workers", (newest("pool_workers", "pool"), "{{run}} {{pool}}")),
    chart(
        "Engines: sequences",
        (newest("engine_running", "worker"), "{{run}} {{worker}} running"),
        (newest("engine_waiting", "worker"), "{{run}} {{worker}} waiting"),
    ),
    chart(
        "Engines: use of the key-value cache",
        (newest("engine_cache_use", "worker"), "{{run}} {{worker}}"),
        unit="percentunit",
        note="At 100 % sequences are pushed out and read again: raise kv_cache_mebibytes.",
    ),
    chart(
        "Engines: tokens written per second",
        (newest("engine_tokens_per_second", "worker"), "{{run}} {{worker}}"),
    ),
    chart(
        "Engines: version of the weights",
        (newest("engine_weight_version", "worker"), "{{run}} {{worker}}"),
        note="An engine that stays behind has lost the learner.",
    ),
]

COST = [
    chart(
        "Response tokens learned from per second",
        (newest("step_tokens_per_second"), "{{run}}"),
    ),
    chart(
        "Tokens written",
        (newest("written_tokens", "author"), "{{run}} {{author}}"),
        note="To be learned from, since the run's process began.",
    ),
    chart(
        "Seconds of one worker per teacher token",
        (
            f"1 / {newest('pool_tokens_per_second', 'pool', where=TEACHERS)}",
            "{{run}} {{pool}}",
        ),
        unit="s",
        note="Busy worker-seconds for each token that the teacher writes or reads.",
    ),
    chart(
        "Bytes shipped per teacher token",
        (newest("bytes_per_teacher_token", "field"), "{{run}} {{field}}"),
        unit="bytes",
    ),
    chart(
        "Where a step's time goes",
        (newest("phase_seconds", "phase"), "{{run}} {{phase}}"),
        unit="s",
    ),
    chart("GPUs held", (newest("pool_gpus", "pool"), "{{run}} {{pool}}")),
    Panel(
        "GPU-hours in the range shown",
        (
            (
                f"sum by (run) (sum_over_time({newest('pool_gpus', 'pool')}[$__range:1m])) / 60",
                "{{run}}",
            ),
        ),
        note="GPUs that the pools of the distillation held, minute by minute, over every life of "
        "the run.",
        kind="stat",
    ),
]

ROWS: dict[str, list[Panel]] = {
    "How far is it?": PROGRESS,
    "Is it learning?": LEARNING,
    "Is it healthy?": HEALTHY,
    "Which pool do I scale?": POOLS,
    "What does it cost?": COST,
}


def build_dashboard() -> dict[str, Any]:
    """The dashboard as Grafana's JSON model."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        place = {"x": 0, "y": top, "w": COLUMNS, "h": 1}
        panels.append(
            {"id": len(panels) + 1, "type": "row", "title": title, "gridPos": place, "panels": []}
        )
        for index, panel in enumerate(row):
            line, column = divmod(index, COLUMNS // WIDTH)
            place = {
                "x": column * WIDTH,
                "y": top + 1 + line * HEIGHT,
                "w": WIDTH,
                "h": HEIGHT,
            }
            panels.append(_build_panel(panel, len(panels) + 1, place))
        top += 1 + HEIGHT * -(-len(row) // (COLUMNS // WIDTH))
    return {
        "uid": "distill-system",
        "title": "Distillation",
        "tags": ["distill-system"],
        "schemaVersion": 39,
        "version": 1,
        "refresh": "10s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [_SOURCE, _RUNS]},
        "panels": panels,
    }


_DATA = {"type": "prometheus", "uid": "${datasource}"}

_SOURCE = {
    "name": "datasource",
    "type": "datasource",
    "label": "Data source",
    "query": "prometheus",
    "refresh": 1,
}

_RUNS = {
    "name": "run",
    "type": "query",
    "label": "Run",
    "datasource": _DATA,
    "query": {"query": "label_values(ray_distill_run_info, run)", "refId": "runs"},
    "multi": True,
    "includeAll": True,
    "allValue": ".+",
    "current": {"text": "All", "value": "$__all"},
    "refresh": 2,
    "sort": 1,
}


def _build_panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    is_table = panel.kind == "table"
    targets = [
        {
            "datasource": _DATA,
            "expr": query,
            "legendFormat": legend,
            "refId": chr(ord("A") + index),
            **({"instant": True, "format": "table"} if is_table else {}),
        }
        for index, (query, legend) in enumerate(panel.queries)
    ]
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.note,
        "datasource": _DATA,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "targets": targets,
    }


if __name__ == "__main__":
    DASHBOARD.write_text(json.dumps(build_dashboard(), indent=1) + "\n", encoding="utf-8")

"""The charts of the report and the metrics in each: rows of the metric log in, charts out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from distill_system.observe.charts import Line, LineStyle, draw_lines
from distill_system.observe.metrics import MetricRow

SERIES = ("series-1", "series-2", "series-3", "series-4", "series-5", "series-6")
"""Colours for lines that have no colour of their own, in the order in which they are used."""

WHOLE_STEP = "step"
"""seconds/step is the duration of the whole step, not one of its phases."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One drawn chart.  legend: (label, colour, pattern) of each line; empty for a single line."""

    title: str
    note: str
    legend: tuple[tuple[str, str, str], ...]
    svg: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One chart to draw: its title, what its numbers are, (label, metric) of each line."""

    title: str
    note: str
    lines: tuple[tuple[str, str], ...]


HELD_OUT_CURVES = (
    Curve(
        title="Held-out cross-entropy",
        note="nats per token of the teacher's responses; lower is closer to the teacher",
        lines=(("cross-entropy", "held_out/cross_entropy"),),
    ),
    Curve(
        title="Held-out KL to the teacher",
        note="nats per token, on responses that the teacher sampled",
        lines=(("KL(teacher || student)", "held_out/forward_kl"),),
    ),
)
DISTANCE_CURVES = (
    Curve(
        title="On-policy distance",
        note="critic units; lower is closer to the teacher",
        lines=(
            ("per batch", "learner/on_policy_distance"),
            ("held-out data", "held_out/on_policy_distance"),
        ),
    ),
    Curve(
        title="Off-policy distance",
        note="critic units; lower is closer to the teacher",
        lines=(
            ("per batch", "learner/off_policy_distance"),
            ("held-out data", "held_out/off_policy_distance"),
        ),
    ),
)
LEARNER_CURVES = (
    Curve(title="Loss", note="what the step descends", lines=(("loss", "learner/loss"),)),
    Curve(
        title="Cross-entropy",
        note="nats per token of the teacher's responses",
        lines=(("cross-entropy", "learner/cross_entropy"),),
    ),
    Curve(
        title="Reward-to-go",
        note="mean over the student's responses, critic units",
        lines=(("reward-to-go", "learner/reward_to_go"),),
    ),
    Curve(
        title="Gradient norm", note="before clipping", lines=(("norm", "learner/gradient_norm"),)
    ),
    Curve(title="Learning rate", note="", lines=(("learning rate", "learner/learning_rate"),)),
    Curve(
        title="Sampler against learner",
        note="mean |log-probability gap|, nats; a rise means stale or wrong weights",
        lines=(("gap", "learner/logprob_gap"),),
    ),
)
RESPONSE_CURVES = (
    Curve(
        title="Mean length of responses",
        note="tokens",
        lines=(
            ("student", "learner/mean_student_response_tokens"),
            ("teacher", "teacher_text/mean_tokens"),
        ),
    ),
    Curve(
        title="Responses that end by themselves",
        note="share of the student's",
        lines=(("ended", "learner/student_ended_share"),),
    ),
    Curve(
        title="Entropy of the text",
        note="nats per token, of each step's text",
        lines=(("student", "student_text/entropy"), ("teacher", "teacher_text/entropy")),
    ),
    Curve(
        title="Different trigrams",
        note="share of all trigrams in each step's text; down: the text repeats itself",
        lines=(
            ("student", "student_text/distinct_trigrams"),
            ("teacher", "teacher_text/distinct_trigrams"),
        ),
    ),
    Curve(
        title="Most likely tokens in common with the teacher",
        note="share of 16, on the student's held-out text; rises where distillation succeeds",
        lines=(("overlap", "held_out/top_token_overlap"),),
    ),
)
STALENESS_CURVES = (
    Curve(
        title="Staleness",
        note="versions between the student that wrote a token and the one that learns from it",
        lines=(("mean", "learner/mean_staleness"), ("oldest", "learner/max_staleness")),
    ),
)


def draw_curves(rows: Sequence[MetricRow], stage: str, curves: Sequence[Curve]) -> list[Chart]:
    """The charts of one stage; a chart none of whose metrics was logged is left out."""
    charts = []
    for curve in curves:
        lines = [
            _line(rows, stage, label, metric, SERIES[index])
            for index, (label, metric) in enumerate(curve.lines)
        ]
        charts += draw_chart(curve.title, curve.note, lines)
    return charts


def draw_supervised_loss(rows: Sequence[MetricRow]) -> list[Chart]:
    """The losses of fine-tuning teacher and student; two charts, since their steps differ."""
    charts = []
    for role in ("teacher", "student"):
        color = "teacher" if role == "teacher" else "before"
        line = _line(rows, f"sft_{role}", "loss", "learner/loss", color)
        charts += draw_chart(f"Supervised loss, {role}", "nats per response token", [line])
    return charts


def draw_throughput(rows: Sequence[MetricRow]) -> list[Chart]:
    """Tokens per second of the whole step, and tokens per busy worker-second of each pool."""
    colors = {**assign_phase_colors(rows), WHOLE_STEP: "ink"}
    lines = [
        _line(rows, "distill", phase.replace("_", " "), f"tokens_per_second/{phase}", color)
        for phase, color in colors.items()
    ]
    return draw_chart(
        "Throughput by pool", "tokens per second of one busy worker; the whole step", lines
    )


def draw_busy_shares(rows: Sequence[MetricRow], pools: Iterable[str]) -> list[Chart]:
    """The busy share of each pool over the steps."""
    lines = [
        _line(rows, "distill", pool.replace("_", " "), f"busy_share/{pool}", color)
        for pool, color in zip(pools, cycle(SERIES), strict=False)
    ]
    return draw_chart("Busy share by pool", "of its workers' time", lines)


def draw_sources(rows: Sequence[MetricRow]) -> list[Chart]:
    """How the prompts' sources were weighed, and what the weights follow."""
    charts = []
    for metric, title, note in (
        ("source_weight", "Weights of the sources", "share of the prompts"),
        ("source_perplexity_ratio", "Student's perplexity over the teacher's", "held-out rows"),
    ):
        names = dict.fromkeys(n for r in rows for n in r.metrics if n.startswith(f"{metric}/"))
        lines = [
            _line(rows, "distill", name.partition("/")[2], name, color)
            for name, color in zip(names, cycle(SERIES), strict=False)
        ]
        charts += draw_chart(title, note, lines)
    return charts


def assign_phase_colors(rows: Sequence[MetricRow]) -> dict[str, str]:
    """Phase of distillation -> its colour, the same in every chart of the report."""
    names = {name for row in rows if row.stage == "distill" for name in row.metrics}
    phases = {name.removeprefix("seconds/") for name in names if name.startswith("seconds/")}
    return dict(zip(sorted(phases - {WHOLE_STEP}), cycle(SERIES), strict=False))


def draw_scores(evaluations: Sequence[Mapping[str, Any]], metric: str, title: str) -> list[Chart]:
    """One score of every split over the steps at which it was measured.

    evaluations: from summary.read_evaluation, in the order of their steps.
    metric: e.g. exact_match_greedy.
    title: the chart's.
    """
    if len(evaluations) < 3:
        return []  # two points (before and after) are shown in a table instead
    splits = dict.fromkeys(name for evaluation in evaluations for name in evaluation["splits"])
    lines = []
    for index, split in enumerate(splits):
        measured = [
            (evaluation["step"], evaluation["splits"][split]["scores"][metric])
            for evaluation in evaluations
            if metric in evaluation["splits"].get(split, {}).get("scores", {})
        ]
        line = Line(
            label=split,
            points=[(step, score["mean"]) for step, score in measured],
            errors=[score["stderr"] for _, score in measured],
            color=SERIES[index % len(SERIES)],
            style="measured",
        )
        lines.append(line)
    return draw_chart(title, "percent, with one standard error", lines)


def _line(rows: Sequence[MetricRow], stage: str, label: str, metric: str, color: str) -> Line:
    points = [
        (row.step, row.metrics[metric])
        for row in rows
        if row.stage == stage and metric in row.metrics
    ]
    style: LineStyle = "measured" if metric.startswith("held_out/") else "noisy"
    if metric == "learner/learning_rate":
        style = "exact"
    return Line(label=label, points=points, color=color, style=style)


def draw_chart(title: str, note: str, lines: Sequence[Line]) -> list[Chart]:
    """The chart of these lines; none if no line has a point."""
    drawn = [line for line in lines if any(value is not None for _, value in line.points)]
    if not drawn:
        return []
    legend = tuple((line.label, line.color, line.pattern) for line in drawn)
    shown = legend if len(drawn) > 1 else ()
    return [Chart(title=title, note=note, legend=shown, svg=draw_lines(drawn))]

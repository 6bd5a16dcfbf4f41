"""Formats numbers and metric names for pages and tables."""

from __future__ import annotations

METRIC_TITLES = {
    "exact_match": "Exact match",
    "rouge_l": "ROUGE-L",
    "rouge_l_stemmed": "ROUGE-L, stemmed",
    "bleu": "BLEU",
    "accuracy": "Accuracy",
    "mean_length": "Mean length, tokens",
    "ended_share": "Ended by itself",
}


def format_metric(metric: str) -> str:
    """exact_match_greedy -> Exact match, greedy."""
    name, _, decoding = metric.rpartition("_")
    return f"{METRIC_TITLES.get(name, name.replace('_', ' '))}, {decoding}"


def format_value(value: float | None, digits: int = 1) -> str:
    """A number, or a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"  # noqa: RUF001  # a real dash


def format_signed(value: float | None, digits: int = 1) -> str:
    """A number with its sign, or a dash for None."""
    if value is None:
        return "–"  # noqa: RUF001  # a real dash
    return f"{value:+.{digits}f}".replace("-", "−")  # noqa: RUF001  # a real minus

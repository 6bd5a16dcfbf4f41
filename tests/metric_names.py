"""The metric names of docs/metrics.md, for tests that compare them with what is reported."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs/metrics.md"


@cache
def documented_metrics() -> frozenset[str]:
    """Every name in a first column of a table, and the form of the evaluation's names."""
    text = PAGE.read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.+?`) \|", text, flags=re.MULTILINE)
    names = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    names += re.findall(r"`(evaluation/<[^`]+)`", text)
    return frozenset(name for name in names if re.fullmatch(r"[a-z_]+(/[a-z_<>]+)+", name))


def pattern_of(name: str) -> re.Pattern[str]:
    """A name in which <this> or {} stands for a word, as a pattern."""
    parts = re.split(r"<\w+>|\{\}", name)
    return re.compile(r"[^/]+".join(re.escape(part) for part in parts))


def is_documented(name: str) -> bool:
    """Whether a metric's name, or a form of names with <this>, {} or * in it, is in the page."""
    filled, form = re.sub(r"<\w+>|\{\}|\*", "x_x", name), pattern_of(name.replace("*", "{}"))
    known = documented_metrics()
    return any(pattern_of(each).fullmatch(filled) for each in known) or any(
        form.fullmatch(each) for each in known
    )

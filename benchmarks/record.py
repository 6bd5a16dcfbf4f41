"""One form for every benchmark: a table for people, a JSON with machine, versions and seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from distill_system.observe.environment import describe_environment

RESULTS = Path(__file__).parent / "results"


def write_result(
    name: str,
    rows: Sequence[Mapping[str, object]],
    headline: Mapping[str, float],
    *,
    seeds: Mapping[str, int],
) -> None:
    """Print the rows and write benchmarks/results/<name>.json."""
    table = Table(title=name)
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(_shown(value) for value in row.values()))
    console = Console()
    console.print(table)
    for key, value in headline.items():
        console.print(f"{key}: {_shown(value)}")
    RESULTS.mkdir(exist_ok=True)
    form = {"name": name, "headline": headline, "rows": rows, **describe_environment(seeds=seeds)}
    (RESULTS / f"{name}.json").write_text(json.dumps(form, indent=1) + "\n")


def _shown(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)

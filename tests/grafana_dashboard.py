"""The queries of deploy/grafana/distill.json, as Grafana would send them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "deploy/grafana"

VARIABLES = {
    "$run": ".+",
    "$__range": "5m",
    ":1m]": ":1s]",  # whole minutes pass too slowly for a test
}


def panel_queries() -> Iterator[tuple[str, str]]:
    """Title and PromQL of every query of every panel."""
    dashboard = json.loads((FOLDER / "distill.json").read_text("utf-8"))
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def filled_query(query: str) -> str:
    """A query with Grafana's variables filled in."""
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    return query

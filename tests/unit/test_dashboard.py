"""The dashboard and the alerts of deploy/ against what the package exports."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_dashboard import FOLDER, panel_queries
from metric_names import documented_metrics

from distill_system.config import load_config
from distill_system.observe.live import LiveTask
from distill_system.observe.run_gauges import SUMMED, Gauges, Rate, RunGauges, describe_load
from distill_system.observe.series import PREFIX, Series
from distill_system.records import EngineLoad

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "deploy/prometheus/alerts.yaml"


@pytest.fixture(scope="module")
def exported():
    """Name -> labels of every series of a run and of its engines."""
    found: dict[str, set[str]] = {}

    def record(series, value):
        found[PREFIX + series.name] = set(series.label_names)

    gauges = Gauges({"run": "r", "node": "n"}, record=record)
    config = load_config([ROOT / "configs/quickstart.yaml"])
    run = RunGauges(config, report=Path("report.html"), gauges=gauges)
    LiveTask("distill", 3, 1, run.show_progress).update(2, {})
    names = [re.sub(r"<age>", "3", name) for name in documented_metrics()]
    names = [re.sub(r"<\w+>", "learner", name) for name in names]
    run.log("distill", 1, dict.fromkeys([*names, "evaluation/a/bleu_greedy", *SUMMED], 1.0))
    load = EngineLoad(running=1, waiting=1, cache_use=0.1, written_tokens=1, version=1)
    for name in describe_load(load, Rate(), 0.0):
        gauges.set(Series.of(f"distill_engine_{name}", pool="p", worker="w"), 1.0)
    gauges.flush()
    return found


def _alert_queries():
    [group] = yaml.safe_load(ALERTS.read_text("utf-8"))["groups"]
    return [(rule["alert"], rule["expr"]) for rule in group["rules"]]


def _used(query):
    """Name -> labels that a query reads of it: limits in braces, and what it is sorted by."""
    found = {}
    for match in re.finditer(r"\b(ray_\w+)(?:\{([^}]*)\})?", query):
        limits = re.findall(r"(\w+)\s*=~?", match[2] or "")
        found.setdefault(match[1], set()).update(limits, _sorted_by(query, match.start()))
    return found


def _sorted_by(query, position):
    """Labels of the `by (...) (` blocks that are open at a position."""
    open_blocks, labels = [], []
    for block in re.finditer(r"by \(([^)]*)\) (?=\()|[()]", query[:position]):
        if block[1] is not None:
            labels = block[1].split(", ")
        elif block[0] == "(":
            open_blocks.append(labels)
            labels = []
        else:
            open_blocks.pop()
    return {label for block in open_blocks for label in block}


@pytest.mark.parametrize(
    ("title", "query"), [*panel_queries(), *_alert_queries()], ids=lambda text: str(text)[:30]
)
def test_every_query_reads_series_and_labels_that_the_package_exports(title, query, exported):
    used = _used(query)
    assert used, f"{title} reads no series"
    for name, labels in used.items():
        assert name in exported, f"{title}: {name}"
        wrong = labels - exported[name]
        assert not wrong, f"{title}: {name} has no label {wrong}"


def test_a_label_or_name_that_does_not_exist_would_be_found():
    query = 'sum by (run) (max by (run, pol) (ray_distill_step{stage=~"x"}) > ray_distill_steps)'
    expected = {"ray_distill_step": {"run", "pol", "stage"}, "ray_distill_steps": {"run"}}
    assert _used(query) == expected


def test_legends_name_labels_that_the_query_keeps():
    for panel in json.loads((FOLDER / "distill.json").read_text("utf-8"))["panels"]:
        for target in panel.get("targets", ()):
            [by, *_] = re.findall(r"by \(([^)]*)\)", target["expr"])
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= set(by.split(", "))


def test_the_dashboard_is_what_its_table_makes():
    made = runpy.run_path(str(FOLDER / "make_dashboard.py"))["build_dashboard"]()
    assert json.loads((FOLDER / "distill.json").read_text("utf-8")) == made, (
        "write it anew: python deploy/grafana/make_dashboard.py"
    )


def test_panels_have_numbers_of_their_own_and_do_not_overlap():
    panels = json.loads((FOLDER / "distill.json").read_text("utf-8"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    assert all(json.dumps(place).isascii() for place in panels)


def test_every_alert_says_which_run_and_why():
    [group] = yaml.safe_load(ALERTS.read_text("utf-8"))["groups"]
    for rule in group["rules"]:
        assert "$labels.run" in rule["annotations"]["summary"], rule["alert"]
        assert len(rule["annotations"]["reason"]) > 40, rule["alert"]
        assert rule["labels"]["severity"] in ("page", "warn")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Prometheus is not installed")
def test_alerts_are_raised_when_they_should_be_and_only_then():
    """Series of made-up runs, judged by Prometheus's own rule tester."""
    cases = Path(__file__).with_name("alert_cases.yaml")
    done = subprocess.run(
        ["promtool", "test", "rules", cases], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_grafana_knows_every_field_of_the_dashboard() -> None:
    """Its published types keep what Grafana reads, and drop any other field."""
    types = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    plugins = pytest.importorskip("grafana_foundation_sdk.cog.plugins")
    encoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder")
    plugins.register_default_plugins()
    ours = json.loads((FOLDER / "distill.json").read_text(encoding="utf-8"))

    def kept(dashboard: Any) -> Any:
        return json.loads(encoder.JSONEncoder().encode(types.Dashboard.from_json(dashboard)))

    assert _missing(ours, kept(ours)) == []
    wrong = json.loads(json.dumps(ours).replace('"expr"', '"expression"'))
    assert len(_missing(wrong, kept(wrong))) >= 30


def _missing(given: Any, kept: Any, where: str = "") -> list[str]:
    """Where in a JSON value something is not, or is another, in what was kept of it."""
    if isinstance(given, dict) and isinstance(kept, dict):
        pairs = [(name, given[name], kept.get(name)) for name in given]
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        pairs = [(str(row), *pair) for row, pair in enumerate(zip(given, kept, strict=True))]
    else:
        return [] if given == kept else [where]
    return [lost for name, a, b in pairs for lost in _missing(a, b, f"{where}/{name}")]

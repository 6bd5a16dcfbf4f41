"""A run and its engines on Ray's endpoint, and in a real Prometheus where one is installed."""

from __future__ import annotations

import io
import re
import shutil
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
from grafana_dashboard import filled_query, panel_queries
from metric_names import documented_metrics
from prometheus_client.parser import text_string_to_metric_families
from prometheus_server import started_prometheus
from rich.console import Console

from distill_system.config import load_config
from distill_system.config.rollout import EngineConfig
from distill_system.observe import EngineGauges, LiveView, MetricLog, RunDirectory, RunGauges
from distill_system.observe.run_gauges import Gauges, node_address
from distill_system.observe.series import PREFIX, to_series
from distill_system.records import Author, Prompt
from distill_system.rollout import RolloutWorker, Sampling, engine_environment

DEADLINE_SECONDS = 90
CONFIG = load_config([Path(__file__).parents[2] / "configs/quickstart.yaml"], ["name=night"])
POOLS = ("student_rollout", "teacher_rollout", "teacher_scoring", "learner")
FILLED = {
    "pool": POOLS,
    "phase": (*POOLS, "publish"),
    "field": ("features", "logprobs"),
    "age": ("0", "1"),
    "role": ("student", "teacher"),
    "split": ("in_distribution",),
    "score": ("exact_match", "rouge_l"),
    "decoding": ("greedy", "sampled"),
    "source": ("math", "code"),
}


def _fill(name):
    """A documented name with every word that may stand in it."""
    hole = re.search(r"<(\w+)>", name)
    if hole is None:
        return [name]
    words = [name.replace(hole[0], word, 1) for word in FILLED[hole[1]]]
    return [filled for word in words for filled in _fill(word)]


def _every_metric():
    """Each metric of docs/metrics.md, with values that tell them apart."""
    names = [filled for name in sorted(documented_metrics()) for filled in _fill(name)]
    return {name: 1.0 + number / 64 for number, name in enumerate(names)}


@pytest.fixture(scope="module")
def shown(tiny_model_folder, tmp_path_factory):
    """A cluster on which a run shows its metrics, and a real engine stands ready."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")  # 10 s where nothing is said
        context = ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=True,
            log_to_driver=False,
            namespace="test",
        )
    gauges = Gauges({"run": "night", "node": node_address()}, refresh_seconds=0.3)
    view = LiveView("night", console=Console(file=io.StringIO()))
    folder = tmp_path_factory.mktemp("run")
    worker = _start_worker(tiny_model_folder(max_position_embeddings=2048))
    try:
        with (
            MetricLog(RunDirectory(folder), run_name="night") as log,
            RunGauges(CONFIG, report=folder / "report.html", gauges=gauges) as run,
        ):
            view.listen(run.show_progress)
            log.add_tracker("Prometheus", run)
            log.log("distill", 3, _every_metric())
            view.start("distill", 40, first_step=2).update(3, {})
            url = f"http://{node_address()}:{context.address_info['metrics_export_port']}/metrics"
            nodes = (
                Path(context.address_info["session_dir"]) / "prom_metrics_service_discovery.json"
            )
            yield SimpleNamespace(
                url=url,
                nodes=nodes,
                worker=worker,
                run=run,
            )
    finally:
        ray.shutdown()


def _start_worker(model):
    remote = ray.remote(RolloutWorker).options(
        num_cpus=1, runtime_env={"env_vars": engine_environment(uses_gpu=False)}
    )
    worker = remote.remote(
        name="student_rollout-0",
        model_path=str(model),
        author=Author.STUDENT,
        engine=EngineConfig(max_num_sequences=4, kv_cache_mebibytes=16),
        max_model_length=2048,
        uses_gpu=False,
        vocabulary_size=64,
        load_report=EngineGauges(run="night", pool="student_rollout", refresh_seconds=0.3),
    )
    ray.get(worker.ready.remote(), timeout=DEADLINE_SECONDS)
    return worker


def _write_texts(worker):
    """Begin 400 texts of which 4 run at once; returns the reference."""
    prompts = [
        Prompt(prompt_id=str(n), token_ids=np.array([1, 5 + n % 50], np.int32), text="")
        for n in range(400)
    ]
    sampling = Sampling(temperature=1.0, max_response_tokens=2000)
    return worker.generate.remote(prompts, sampling, 0, "many")


def _wait_for(look, what):
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (found := look()):
        assert time.monotonic() < deadline, f"{what} never came"
        time.sleep(0.3)
    return found


def _read_page(url):
    """Every line of the endpoint by name, each with labels and value."""
    page = urllib.request.urlopen(url, timeout=10).read().decode()
    found = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def test_every_metric_stands_on_rays_endpoint_with_run_stage_and_node(shown):
    wanted = {metric: to_series(metric) for metric in _every_metric()}
    names = {PREFIX + series.name for series in wanted.values()}
    _wait_for(lambda: names <= _read_page(shown.url).keys(), names)
    page = _read_page(shown.url)
    for metric, value in _every_metric().items():
        labels = {"run": "night", "stage": "distill", **dict(wanted[metric].labels)}
        [found] = [
            (have, number)
            for have, number in page[PREFIX + wanted[metric].name]
            if labels.items() <= have.items()
        ]
        assert found[1] == value, metric
        assert found[0]["node"] == node_address()
    [(_, step)], [(_, total)] = (page[f"ray_distill_{n}"] for n in ("step", "total_steps"))
    assert (step, total) == (3, 40)


@pytest.fixture(scope="module")
def prometheus(shown, tmp_path_factory):
    if shutil.which("prometheus") is None:
        pytest.skip("Prometheus is not installed: apt-get install prometheus")
    _wait_for(shown.nodes.exists, "the file of the nodes' addresses")
    with started_prometheus(tmp_path_factory.mktemp("prometheus"), shown.nodes) as server:
        yield server


def test_an_engine_is_seen_while_it_writes(shown, prometheus):
    """The figures agree with what was asked: 400 texts, 4 at a time."""
    texts = _write_texts(shown.worker)

    def look(name):
        return prometheus.query(f'ray_distill_engine_{name}{{run="night"}}')

    [(labels, running)] = _wait_for(
        lambda: [each for each in look("running") if each[1] > 0], "a running text"
    )
    assert 0 < running <= 4
    assert labels["pool"] == "student_rollout"
    assert labels["worker"] == "student_rollout-0"
    assert labels["node"] == node_address()
    assert "WorkerId" not in labels
    for name, most in (("tokens_per_second", np.inf), ("cache_use", 1.0), ("waiting", 396)):
        query = f"max_over_time(ray_distill_engine_{name}[1m]) > 0"
        [(_, value)] = _wait_for(lambda q=query: prometheus.query(q), name)
        assert value <= most
    written = sum(t.num_response_tokens for t in ray.get(texts, timeout=DEADLINE_SECONDS))
    _wait_for(lambda: [v for _, v in look("written_tokens") if v == written], written)
    _wait_for(lambda: [v for _, v in look("running") if v == 0], "an idle engine")


def test_every_panel_of_the_dashboard_has_data(shown, prometheus):
    assert _wait_for(lambda: prometheus.query("ray_distill_learner_loss"), "the loss")
    empty = [
        f"{panel}: {query}"
        for panel, query in panel_queries()
        if not _wait_for_data(prometheus, filled_query(query))
    ]
    assert empty == []


def _wait_for_data(prometheus, query):
    """Whether a query has data within a few scrapes."""
    for _ in range(10):
        if found := prometheus.query(query):
            return found
        time.sleep(1)
    return None


def test_every_alert_is_judged_and_none_is_raised_for_a_run_that_goes_well(prometheus):
    [group] = _wait_for(lambda: prometheus.ask("rules")["groups"], "the rules")
    judged = _wait_for(
        lambda: all(
            rule["health"] == "ok" for rule in prometheus.ask("rules")["groups"][0]["rules"]
        ),
        f"the judgement of {group['rules']}",
    )
    assert judged


def test_what_a_run_showed_is_gone_when_it_has_ended(shown, prometheus):
    """Its last test: the run's block is left, and the worker ends."""
    query = '{__name__=~"ray_distill_.+", run="night"}'
    assert prometheus.query(query)
    shown.run.__exit__(None, None, None)
    ray.kill(shown.worker)
    _wait_for(lambda: not prometheus.query(query), "the end of every series")
    assert prometheus.query("max_over_time(ray_distill_step[5m])")

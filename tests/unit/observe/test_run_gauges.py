"""What a run shows, without Ray: values by series, set again and again until the run ends."""

import io
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from distill_system.config import load_config
from distill_system.observe import EngineGauges, LiveView, MetricLog, RunDirectory, RunGauges
from distill_system.observe import run_gauges as module
from distill_system.observe.run_gauges import Gauges, Rate, describe_load
from distill_system.observe.series import Series
from distill_system.records import EngineLoad

CONFIG = load_config(
    [Path(__file__).parents[3] / "configs/quickstart.yaml"],
    ["name=night", "pools.student_rollout.gpus=0.5", "pools.learner.gpus=1"],
)
RUN = {"run": "night", "node": "here"}


class Endpoint:
    """Stands for Ray's: how often each series was set, and to what."""

    def __init__(self):
        self.values: dict[Series, list[float]] = {}

    def record(self, series, value):
        self.values.setdefault(series, []).append(value)

    def last(self, name, **labels):
        return self.values[Series.of(f"distill_{name}", **RUN, **labels)][-1]


@pytest.fixture
def endpoint():
    return Endpoint()


@pytest.fixture
def gauges(endpoint):
    return Gauges(RUN, refresh_seconds=0.01, record=endpoint.record)


@pytest.fixture
def run(gauges):
    return RunGauges(CONFIG, report=Path("/runs/night/report.html"), gauges=gauges)


def test_a_steps_metrics_are_shown_with_run_node_stage_and_pool(run, gauges, endpoint):
    run.log("distill", 3, {"learner/loss": 0.5, "busy_share/learner": 0.25})
    run.log("sft_student", 9, {"learner/loss": 2.0})
    gauges.flush()
    assert endpoint.last("learner_loss", stage="distill") == 0.5
    assert endpoint.last("learner_loss", stage="sft_student") == 2.0
    assert endpoint.last("pool_busy_share", stage="distill", pool="learner") == 0.25


def test_what_a_step_had_is_summed_up(run, gauges, endpoint):
    for tokens in (10, 30):
        run.log("distill", 1, {"sampled_tokens/teacher": tokens, "learner/response_tokens": 2.0})
    gauges.flush()
    assert endpoint.last("written_tokens", stage="distill", author="teacher") == 40
    assert endpoint.last("sampled_tokens", stage="distill", author="teacher") == 30
    assert endpoint.last("learned_tokens", stage="distill") == 4


def test_gpus_follow_the_workers_and_a_learner_counts_all_its_ranks(run, gauges, endpoint):
    run.log("distill", 1, {"workers/student_rollout": 3.0, "workers/learner": 1.0})
    gauges.flush()
    assert endpoint.last("pool_gpus", pool="student_rollout") == 1.5
    assert endpoint.last("pool_gpus", pool="learner") == CONFIG.pools.learner.count


def test_what_is_run_is_one_series(run, gauges, endpoint):
    gauges.flush()
    [shown] = [dict(s.labels) for s in endpoint.values if s.name == "distill_run_info"]
    assert shown["objective"] == CONFIG.distill.objective.type
    assert shown["report"] == "/runs/night/report.html"
    assert shown["version"]
    assert shown["teacher"] == "made by the run"


def test_a_values_series_lives_as_long_as_the_block_and_no_longer(run, endpoint):
    """Ray shows a value that is set once for 20 s, and a step may take minutes."""
    with run:
        run.log("distill", 1, {"learner/loss": 0.5})
        deadline = time.monotonic() + 30
        while sum(map(len, endpoint.values.values())) < 20:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    before = sum(map(len, endpoint.values.values()))
    time.sleep(0.1)
    assert sum(map(len, endpoint.values.values())) == before


def test_progress_is_that_of_the_live_view(run, gauges, endpoint, monkeypatch):
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("distill_system.observe.live.time", clock)
    view = LiveView("night", console=Console(file=io.StringIO()))
    view.listen(run.show_progress)
    task = view.start("distill", 40, first_step=10)
    gauges.flush()
    assert endpoint.last("total_steps", stage="distill") == 40
    assert endpoint.last("step", stage="distill") == 10
    assert Series.of("distill_remaining_seconds", **RUN, stage="distill") not in endpoint.values
    before = time.time()
    now[0] = 30.0
    task.update(20, {})
    gauges.flush()
    assert endpoint.last("step", stage="distill") == 20
    assert endpoint.last("remaining_seconds", stage="distill") == 60.0  # 10 steps took 30 s
    assert before <= endpoint.last("last_progress_time_seconds", stage="distill") <= time.time()
    assert endpoint.last("stage_running", stage="distill") == 1
    task.finish()
    gauges.flush()
    assert endpoint.last("stage_running", stage="distill") == 0


def test_a_run_tells_its_gauges_what_it_tells_the_file(run, gauges, endpoint, tmp_path):
    with MetricLog(RunDirectory(tmp_path), run_name="night") as log:
        log.add_tracker("Prometheus", run)
        log.log("distill", 1, {"queued/teacher_scoring": 7})
    gauges.flush()
    assert endpoint.last("pool_queued", stage="distill", pool="teacher_scoring") == 7


def _load(tokens, cache_use=0.5):
    return EngineLoad(running=2, waiting=1, cache_use=cache_use, written_tokens=tokens, version=4)


def test_an_engine_is_shown_with_its_rate():
    rate = Rate()
    assert describe_load(_load(100), rate, 10.0)["tokens_per_second"] == 0.0
    shown = describe_load(_load(160), rate, 14.0)
    assert shown == {
        "running": 2,
        "waiting": 1,
        "cache_use": 0.5,
        "written_tokens": 160,
        "tokens_per_second": 15.0,
        "weight_version": 4,
    }
    assert describe_load(_load(130), rate, 15.0)["tokens_per_second"] == 0.0  # some were dropped
    assert "cache_use" not in describe_load(_load(0, cache_use=None), rate, 16.0)


def test_an_engine_is_read_in_a_thread_of_its_own(endpoint, monkeypatch):
    monkeypatch.setattr(module, "node_address", lambda: "there")
    monkeypatch.setattr(module, "Gauges", lambda labels: Gauges(labels, record=endpoint.record))
    EngineGauges(run="night", pool="student_rollout").start("student_rollout-3", lambda: _load(5))
    labels = {"run": "night", "node": "there", "pool": "student_rollout"}
    series = Series.of("distill_engine_running", worker="student_rollout-3", **labels)
    deadline = time.monotonic() + 30
    while series not in endpoint.values:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert endpoint.values[series] == [2.0]

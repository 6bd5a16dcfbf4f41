"""Trackers: what each library itself has of a run, read back by its own reader."""

from __future__ import annotations

import json
import math
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from distill_system.errors import ConfigError
from distill_system.observe import RunDirectory, require_trackers, write_report, write_summary
from distill_system.observe import hosted_trackers as hosted
from distill_system.observe import trackers as module
from distill_system.observe.metrics import MetricLog, read_metrics
from distill_system.observe.run_directory import write_json

ROWS = [
    ("sft_student", 1, {"learner/loss": 3.5}),
    ("distill", 1, {"learner/loss": 0.5, "busy_share/learner": 0.25}),
    ("distill", 2, {"learner/loss": math.nan}),
    ("distill", 3, {"learner/loss": 0.125}),
]


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "night")
    write_json(run.config_path, {"name": "night", "distill": {"steps": 3, "staleness": {}}})
    return run


def _live(run, tracker, rows=ROWS):
    """One life of a run with one tracker."""
    said = []
    with MetricLog(run, run_name="night", trackers=(tracker,), notify=said.append) as log:
        for stage, step, metrics in rows:
            log.log(stage, step, metrics)
    assert said == []
    return json.loads(run.trackers_path.read_text("utf-8"))[tracker]


@pytest.mark.filterwarnings("ignore")  # what its own dependencies deprecate in each other
def test_mlflow_has_every_value_and_goes_on_in_the_same_run(run, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "nights")
    monkeypatch.chdir(tmp_path)  # where a local store puts its files
    kept = _live(run, "mlflow", ROWS[:3])
    assert _live(run, "mlflow", ROWS[3:]) == kept
    client = mlflow.MlflowClient()
    [found] = client.search_runs([client.get_experiment_by_name("nights").experiment_id])
    assert found.info.run_id == kept["id"]
    assert found.info.run_name == "night"
    assert found.info.status == "FINISHED"
    assert found.data.params["distill.steps"] == "3"
    history = client.get_metric_history(kept["id"], "distill/learner/loss")
    assert [(m.step, m.value) for m in history if m.step != 2] == [(1, 0.5), (3, 0.125)]
    assert [math.isnan(m.value) for m in history if m.step == 2] == [True]
    [only] = client.get_metric_history(kept["id"], "sft_student/learner/loss")
    assert (only.step, only.value) == (1, 3.5)


@pytest.mark.filterwarnings("ignore")
def test_wandb_writes_offline_to_the_runs_folder(run, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "planted" + "0" * 33)
    kept = _live(run, "wandb", ROWS[:3])
    assert _live(run, "wandb", ROWS[3:]) == kept
    assert kept["url"] is None
    files = sorted(run.path.glob("wandb/offline-run-*/run-*.wandb"))
    assert {path.name for path in files} == {f"run-{kept['id']}.wandb"}
    rows = _read_rows(files, count=4)
    by_step = {
        row["distill/step"]: row["distill/learner/loss"] for row in rows if "distill/step" in row
    }
    assert list(by_step) == [1, 2, 3]
    assert (by_step[1], by_step[3]) == (0.5, 0.125)
    assert {"sft_student/step": 1, "sft_student/learner/loss": 3.5}.items() <= rows[0].items()
    planted = [path for path in run.path.rglob("*") if _holds(path, b"planted000")]
    assert planted == [], "a secret of the environment stands in no file of the run"


def _read_rows(files, *, count):
    """W&B's own process writes the end of a file a moment after the run has finished."""
    deadline = time.monotonic() + 60
    while len(rows := [row for path in files for row in _read_wandb(path)]) < count:
        assert time.monotonic() < deadline, rows
        time.sleep(0.1)
    return rows


def _holds(path, secret):
    return path.is_file() and secret in path.read_bytes()


def _read_wandb(path):
    """Rows of history of an offline file, by W&B's own messages in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    for data in _read_log(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            yield {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }


def _read_log(content):
    """Blocks of 32 KiB; a record is checksum, length, kind and data, or parts of its data."""
    position, whole = 7, b""  # after W&B's own header
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


@pytest.mark.filterwarnings("ignore")
def test_trackio_has_every_value_and_goes_on_in_the_same_run(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("TRACKIO_PROJECT", "nights")
    pytest.importorskip("trackio")
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    kept = _live(run, "trackio", ROWS[:3])
    assert _live(run, "trackio", ROWS[3:]) == kept
    assert kept["url"] == "trackio show --project nights"
    rows = storage.get_logs("nights", "night")
    losses = {
        row["distill/step"]: row["distill/learner/loss"] for row in rows if "distill/step" in row
    }
    assert list(losses) == [1, 2, 3]
    assert (losses[1], losses[3]) == (0.5, 0.125)
    assert capsys.readouterr().out == ""


class Fake(hosted.HostedTracker):
    """A tracker without a library."""

    title = "wandb"

    def _open(self, kept):
        self.rows = []
        opened.append((self.name, self.config["name"], dict(kept)))
        return {"id": kept.get("id", "x1"), "url": "https://somewhere/<x1>"}

    def log(self, stage, step, values):
        self.rows.append((stage, step))

    def close(self):
        pass


opened: list[tuple[str, str, dict[str, str]]] = []


def test_where_a_run_is_seen_stands_in_summary_and_report_and_a_second_life_is_told_of_the_first(
    run, monkeypatch
):
    monkeypatch.setitem(hosted.HOSTED, "wandb", Fake)
    opened.clear()
    assert write_summary(run)["trackers"] == {}
    for _life in range(2):
        _live(run, "wandb")
    assert opened[0] == ("night", "night", {})
    assert opened[1][2] == {"id": "x1", "url": "https://somewhere/<x1>"}
    assert write_summary(run)["trackers"] == {"wandb": "https://somewhere/<x1>"}
    write_report(run)
    page = run.report_path.read_text("utf-8")
    assert '<a href="https://somewhere/&lt;x1&gt;">' in page
    assert "<x1>" not in page


def test_a_tracker_that_cannot_be_opened_is_said_and_the_run_goes_on(run, monkeypatch):
    class Refusing(Fake):
        def _open(self, kept):
            raise PermissionError("no API key")

    monkeypatch.setitem(hosted.HOSTED, "wandb", Refusing)
    said = []
    names: tuple[Any, ...] = ("tensorboard", "wandb")
    with MetricLog(run, run_name="night", trackers=names, notify=said.append) as log:
        log.log("distill", 1, {"learner/loss": 1.0})
    [line] = said
    assert "wandb cannot be opened" in line
    assert "no API key" in line
    assert len(read_metrics(run)) == 1
    assert list(run.tensorboard_directory.rglob("events*"))
    assert not run.trackers_path.exists()


def test_no_tracker_at_all_leaves_the_file_alone(run):
    with MetricLog(run, run_name="night", trackers=()) as log:
        log.log("distill", 1, {"learner/loss": 1.0})
    assert {path.name for path in run.path.iterdir()} == {"config.json", "metrics.jsonl"}


def test_what_is_not_installed_is_told_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: name if name == "tensorboard" else None)
    require_trackers(("tensorboard",))
    with pytest.raises(ConfigError, match=r"mlflow, trackio.*distill-system\[mlflow,trackio\]"):
        require_trackers(("tensorboard", "mlflow", "trackio"))


def test_every_tracker_has_an_extra_and_a_name_in_the_configuration():
    pages = (Path(__file__).parents[3] / "pyproject.toml").read_text("utf-8")
    for name in hosted.HOSTED:
        assert f"\n{name} = [" in pages

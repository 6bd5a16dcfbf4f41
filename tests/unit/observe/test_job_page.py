"""A job's metadata follows its run, on records that only remember; Ray's own: tests/pipeline."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from distill_system.observe.job_page import JobPage
from distill_system.observe.live import LiveTask


class Records:
    """One job's record, and how often it was written."""

    def __init__(self, **record):
        self.record, self.written = record, 0

    def read(self, job_id):
        assert job_id == "raysubmit_1"
        return self.record

    def write(self, job_id, record):
        self.record, self.written = record, self.written + 1


@pytest.fixture(autouse=True)
def job(monkeypatch):
    """This process is a job, in a Ray session."""
    told = {"runtime_env": {}, "metadata": {"job_submission_id": "raysubmit_1"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(told))
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))


def _page(records, said=None):
    notify = [].append if said is None else said.append
    return JobPage("night", Path("/runs/night/report.html"), notify=notify, records=records)


def _task(page):
    return LiveTask("distill", 40, 0, page.show_progress)


def test_run_step_and_report_stand_beside_what_the_submitter_gave():
    records = Records(status="RUNNING", entrypoint="x", metadata={"owner": "me"})
    _task(_page(records)).update(3, {})
    metadata = dict(records.record["metadata"])
    assert metadata.pop("step").startswith("distill 3/40, ETA ")
    assert metadata == {"owner": "me", "run": "night", "report": "/runs/night/report.html"}
    assert records.record["entrypoint"] == "x"


def test_it_is_not_written_with_every_step_but_once_more_at_the_end():
    records = Records(status="RUNNING", metadata=None)
    task = _task(_page(records))
    for step in range(1, 41):
        task.update(step, {})
    assert records.written == 1
    task.finish()
    assert records.written == 2
    assert records.record["metadata"]["step"].startswith("distill 40/40, done in ")


def test_a_job_that_is_being_stopped_is_left_alone():
    records = Records(status="STOPPED", metadata={})
    _task(_page(records)).update(3, {})
    assert records.written == 0


def test_a_run_that_is_no_job_writes_nothing(monkeypatch):
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    records = Records(status="RUNNING", metadata={})
    _task(_page(records)).update(3, {})
    assert records.written == 0


def test_a_page_that_cannot_be_kept_is_said_once():
    class Gone(Records):
        def read(self, job_id):
            raise ConnectionError("the head is gone")

    said = []
    task = _task(_page(Gone(), said))
    task.update(3, {})
    task.finish()
    [line] = said
    assert "the head is gone" in line

"""A submitted job's page in Ray's dashboard: run, step and report, in the job's metadata.

Whoever submits a job gives it metadata once; how far it is, only the run itself knows. Ray keeps a
job's record in its key-value store and has no call that changes the metadata alone. While the
driver runs nobody else writes to the record, so it is read, changed and written back here.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from distill_system.observe.live import LiveTask

_JOB_OF_THIS_PROCESS = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Where Ray tells the process of a submitted job what its job is."""

_RECORD = "_ray_internal_job_info_"
_NAMESPACE = "job"

SECONDS_BETWEEN = 5.0


class JobRecords(Protocol):
    """Ray's records of submitted jobs."""

    def read(self, job_id: str) -> dict[str, Any] | None:
        """The record of a job; None if there is none."""

    def write(self, job_id: str, record: dict[str, Any]) -> None:
        """Replace it."""


class RayJobRecords:
    """Those of the session that this process is in."""

    def read(self, job_id: str) -> dict[str, Any] | None:
        """See JobRecords."""
        from ray.experimental import internal_kv

        found = internal_kv._internal_kv_get(_RECORD + job_id, namespace=_NAMESPACE)
        return None if found is None else json.loads(found)

    def write(self, job_id: str, record: dict[str, Any]) -> None:
        """See JobRecords."""
        from ray.experimental import internal_kv

        key, value = _RECORD + job_id, json.dumps(record)
        internal_kv._internal_kv_put(key, value, overwrite=True, namespace=_NAMESPACE)


class JobPage:
    """Keeps the metadata of the job that this process is; does nothing where it is none.

    notify: takes a line for the person, where the page cannot be kept.
    """

    def __init__(
        self,
        run_name: str,
        report: Path,
        *,
        notify: Callable[[str], None],
        records: JobRecords | None = None,
    ) -> None:
        self._fixed = {"run": run_name, "report": str(report.absolute())}
        self._job_id = find_job_id()
        self._records = records or RayJobRecords()
        self._notify = notify
        self._shown_at = float("-inf")

    def show_progress(self, task: LiveTask) -> None:
        """Show how far a stage is; at most every few seconds."""
        now = time.monotonic()
        is_due = task.is_finished or now - self._shown_at >= SECONDS_BETWEEN
        if self._job_id is None or not is_due or not _has_session():
            return
        self._shown_at = now
        step = f"{task.stage} {task.step}/{task.total_steps}, {task.clock}"
        try:
            self._write(self._job_id, {**self._fixed, "step": step})
        except Exception as error:  # a key-value store that is gone, a record of another form
            self._job_id = None
            self._notify(f"Ray's page of this job no longer follows the run: {error!r}")

    def _write(self, job_id: str, shown: dict[str, str]) -> None:
        record = self._records.read(job_id)
        if record is None or record["status"] != "RUNNING":
            return  # it is being stopped: the record is its supervisor's
        metadata = {**(record.get("metadata") or {}), **shown}
        self._records.write(job_id, {**record, "metadata": metadata})


def find_job_id() -> str | None:
    """The submission id of the job that this process is; None outside of one."""
    told = os.environ.get(_JOB_OF_THIS_PROCESS)
    if told is None:
        return None
    found = (json.loads(told).get("metadata") or {}).get("job_submission_id")
    return None if found is None else str(found)


def _has_session() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())

"""The jobs of a Ray cluster, through the HTTP address of its dashboard.

An address in -> submitted jobs, their states, their logs. Every failure is one sentence.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from distill_system.cluster.reach import (
    CONNECT_SECONDS,
    TOKEN_REMEDY,
    Speech,
    listen_at,
    require_token_where_asked,
)
from distill_system.errors import ResourceError, RunStateError

REQUEST_SECONDS = 60.0
"""For the dashboard to answer one request; Ray's own client waits for ever."""

RECONNECT_SECONDS = 1.0

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")

_DASHBOARD = "the jobs of a cluster are at its dashboard, usually http://HEAD:8265"

for _name in ("dashboard_sdk", "job.sdk"):  # they set a level of their own as they are imported
    logging.getLogger(f"ray.dashboard.modules.{_name}").setLevel(logging.WARNING)

_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOrder:
    """A job to submit.

    entrypoint: the driver's shell line.  num_cpus, num_gpus, memory_bytes, resources: what the
    driver itself reserves; with none of them it runs on the head node.
    """

    submission_id: str
    entrypoint: str
    runtime_environment: Mapping[str, Any]
    metadata: Mapping[str, str]
    num_cpus: float = 0.0
    num_gpus: float = 0.0
    memory_bytes: int = 0
    resources: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as the cluster knows it.

    status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.  exit_code: the driver's, once it ended
    by itself.  started, ended: seconds since the epoch.
    """

    submission_id: str
    status: str
    message: str
    metadata: Mapping[str, str]
    exit_code: int | None
    started: float | None
    ended: float | None

    @property
    def has_ended(self) -> bool:
        """Whether it will not change any more."""
        return self.status in ENDED

    @property
    def run(self) -> str:
        """The name of its run, "" for a job of someone else."""
        return self.metadata.get("run", "")


class JobClient:
    """Submits, lists, reads and stops jobs.

    address: of the dashboard; None takes RAY_API_SERVER_ADDRESS, or RAY_ADDRESS where it begins
    with http.
    Raises: ConfigError for no address; ResourceError if no dashboard of our Ray answers there.
    """

    def __init__(self, address: str | None) -> None:
        self.address = _dashboard_address(address)
        require_token_where_asked()
        _require_http(self.address)
        self._client = _connect(self.address)
        _require_same_ray(self.address, self._client.ray_version)

    def submit(self, order: JobOrder) -> str:
        """Send a job; returns its submission id."""
        with _told(self.address):
            submitted: str = self._client.submit_job(
                entrypoint=order.entrypoint,
                submission_id=order.submission_id,
                runtime_env=dict(order.runtime_environment),
                metadata=dict(order.metadata),
                entrypoint_num_cpus=order.num_cpus or None,
                entrypoint_num_gpus=order.num_gpus or None,
                entrypoint_memory=order.memory_bytes or None,
                entrypoint_resources=dict(order.resources) or None,
            )
        return submitted

    def jobs(self) -> list[Job]:
        """Every job that was submitted to this cluster, the newest first."""
        with _told(self.address):
            every = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(every, key=lambda job: job.started or 0.0, reverse=True)

    def job(self, submission_id: str) -> Job:
        """One job as it is now."""
        with _told(self.address):
            return _job(self._client.get_job_info(submission_id))

    def find(self, name: str) -> Job:
        """The newest job of this run, or the one with this submission id.

        Raises: RunStateError if there is none.
        """
        every = self.jobs()
        for job in every:
            if name in (job.run, job.submission_id):
                return job
        known = ", ".join(dict.fromkeys(job.run for job in every if job.run)) or "none"
        raise RunStateError(
            f"{self.address} knows no job of a run {name!r}: expected a run's name or a submission "
            f"id; runs it knows: {known}"
        )

    def stop(self, submission_id: str) -> None:
        """Ask a job to end by SIGTERM; returns at once."""
        with _told(self.address):
            self._client.stop_job(submission_id)

    def log(self, submission_id: str) -> str:
        """What the driver has written so far."""
        with _told(self.address):
            return str(self._client.get_job_logs(submission_id))

    def follow(self, submission_id: str, write: Callable[[str], None]) -> None:
        """Pass on what the driver writes, from its first line, until the job has ended.

        A connection that breaks is opened again, and what was passed on is left out.
        """
        tail = _Tail(write)
        while True:
            try:
                with _told(self.address):
                    asyncio.run(self._pass_on(submission_id, tail))
                return
            except ResourceError:
                if self.job(submission_id).has_ended:
                    tail.begin()
                    tail.add(self.log(submission_id))
                    return
                time.sleep(RECONNECT_SECONDS)

    async def _pass_on(self, submission_id: str, tail: _Tail) -> None:
        tail.begin()
        lines: AsyncIterator[str] = self._client.tail_job_logs(submission_id)
        async for text in lines:
            tail.add(text)


class _Tail:
    """Passes on a text that is read from its beginning again and again, each part once."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._written = 0
        self._read = 0

    def begin(self) -> None:
        """What is added next is the text's beginning."""
        self._read = 0

    def add(self, part: str) -> None:
        """The text's next part."""
        self._read += len(part)
        new = self._read - self._written
        if new > 0:
            self._write(part[-new:])
            self._written = self._read


class _Client(JobSubmissionClient):  # type: ignore[misc]  # Ray publishes no types
    """Ray's client, with a deadline on every request."""

    answer_seconds = CONNECT_SECONDS

    @property
    def ray_version(self) -> str:
        """The cluster's."""
        return str(self._server_ray_version)

    def _do_request(self, method: str, endpoint: str, **arguments: Any) -> Any:
        arguments.setdefault("timeout", (CONNECT_SECONDS, self.answer_seconds))
        return super()._do_request(method, endpoint, **arguments)


def _connect(address: str) -> _Client:
    """Ray's client, once it has read the version that the dashboard says it has."""
    with _told(address), _given_address_alone():
        try:
            client = _Client(address)
        except (KeyError, RuntimeError, json.JSONDecodeError) as error:
            if "is running on the cluster" in str(error):  # a Ray before 2.0
                raise
            raise ResourceError(
                f"{address}: a web server answers there, and it is no Ray dashboard; {_DASHBOARD}"
            ) from error
    client.answer_seconds = REQUEST_SECONDS
    return client


@contextmanager
def _told(address: str) -> Iterator[None]:
    """Turn what goes wrong between here and the cluster into one sentence."""
    try:
        yield
    except AuthenticationError as error:
        which = "refuses this" if "failed" in str(error).partition(":")[0] else "asks for a"
        raise ResourceError(f"{address} {which} token: {TOKEN_REMEDY}") from error
    except (RuntimeError, OSError, ValueError) as error:  # those of `requests` are OSErrors
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ResourceError(f"{address}: {said[-1] if said else type(error).__name__}") from error


def _dashboard_address(given: str | None) -> str:
    address = given or os.environ.get(_ADDRESS_VARIABLES[0], "")
    joined = os.environ.get(_ADDRESS_VARIABLES[1], "")
    if not address and joined.startswith(("http://", "https://")):
        address = joined
    if not address:
        raise ResourceError(f"expected --address, got none: {_DASHBOARD}")
    if address.startswith("ray://"):
        raise ResourceError(f"--address {address}: ray:// is Ray Client; {_DASHBOARD}")
    if "://" not in address:
        address = f"http://{address}"
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ResourceError(f"--address {address}: expected http://HOST:PORT; {_DASHBOARD}")
    return address.rstrip("/")


def _require_http(address: str) -> None:
    """Raises: ResourceError unless a web server answers; one behind TLS is asked by Ray alone."""
    parts = urlsplit(address)
    assert parts.hostname is not None, "checked when the address was read"
    if parts.scheme == "https":
        return
    try:
        speech = listen_at(parts.hostname, parts.port or 80)
    except OSError as error:
        raise ResourceError(
            f"no Ray cluster answers at {address}: {error}; {_DASHBOARD}, and it must have been "
            "started with the cluster (`ray start --head --dashboard-host=...`)"
        ) from error
    if speech is not Speech.HTTP:
        raise ResourceError(f"{address}: what answers there speaks {speech.value}; {_DASHBOARD}")


def _require_same_ray(address: str, theirs: str) -> None:
    if theirs != ray.__version__:
        raise ResourceError(
            f"{address}: the cluster runs Ray {theirs}, and this version of distill-system runs "
            f"with Ray {ray.__version__}: start the cluster with that one, or submit with the "
            "distill-system that its environment has"
        )


@contextmanager
def _given_address_alone() -> Iterator[None]:
    """Hide the variables that Ray's client prefers to the address it is given."""
    hidden = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _job(details: JobDetails) -> Job:
    return Job(
        submission_id=details.submission_id,
        status=str(details.status.value),
        message=details.message or "",
        metadata=dict(details.metadata or {}),
        exit_code=details.driver_exit_code,
        started=None if details.start_time is None else details.start_time / 1000.0,
        ended=None if details.end_time is None else details.end_time / 1000.0,
    )

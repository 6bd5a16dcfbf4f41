"""One local Ray for all tests of a file; it ends with the file, other tests want none."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from distill_system.cluster import ClusterSession, RayWorkers, WorkerRequest
from distill_system.config import RunConfig, load_config
from distill_system.config.pools import PoolConfig

QUICKSTART = Path(__file__).parents[3] / "configs/quickstart.yaml"


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What the session tells the person."""
    return []


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_config(
        [QUICKSTART],
        [
            "cluster.dashboard=false",
            "deadlines.resources_seconds=3",
            "deadlines.call_seconds=60",
        ],
    )


@pytest.fixture(scope="module")
def sigterm_handler() -> Iterator[Callable[..., None]]:
    """What stands for SIGTERM when the session begins, as the command line's own would."""

    def on_sigterm(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, on_sigterm)
    yield on_sigterm
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def session(
    config: RunConfig, said: list[str], sigterm_handler: Callable[..., None]
) -> Iterator[ClusterSession]:
    with ClusterSession(config, notify=said.append) as session:
        yield session


@pytest.fixture
def workers(session: ClusterSession) -> Iterator[Callable[..., RayWorkers]]:
    """Starts a pool of workers of a class written in a test's module; ends it after the test."""
    started: list[RayWorkers] = []

    def start(worker_class: type, *, count: int = 1, **fields: Any) -> RayWorkers:
        ray.cloudpickle.register_pickle_by_value(sys.modules[worker_class.__module__])
        request = {
            "name": worker_class.__name__.lower(),
            "worker_class": worker_class,
            "arguments": [{}] * count,
            "pool": PoolConfig(cpus=0.1),
        }
        started.append(session.start_workers(WorkerRequest(**{**request, **fields})))
        return started[-1]

    yield start
    for group in started:
        session.stop_workers(group)

"""Where a local cluster listens: on localhost alone, or where other machines reach it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from ray._private import ray_constants

from distill_system.config.pools import ClusterConfig


def local_arguments(config: ClusterConfig) -> dict[str, Any]:
    """What ray.init is told of a local cluster beside what it is told of every cluster."""
    host = "127.0.0.1" if config.listen_on == "localhost" else "0.0.0.0"
    return {"include_dashboard": config.dashboard, "dashboard_host": host}


@contextmanager
def listening_on(where: Literal["localhost", "network"]) -> Iterator[None]:
    """A cluster that ray.init starts in the block listens there with all of its processes.

    Ray takes the machine's own address for 127.0.0.1 in all of its arguments. On systems on which
    it starts no cluster of several machines it does not, and its processes listen on loopback
    alone; this is the switch. Every process is told its address as it starts, so that the switch
    is read in this block alone.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = where == "network" and before
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before

"""Real Ray workers that come and go: demand, background starts, places given back."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.util import placement_group_table

from distill_system.cluster import ClusterSession, RayWorkers, StartingWorker, WorkerRequest
from distill_system.config.pools import PoolConfig
from distill_system.errors import ModelError, ResourceError, WorkerError

Start = Callable[..., RayWorkers]


class Clerk:
    """Tells who and where it is."""

    def __init__(self, *, name: str = "nobody", start_error: Exception | None = None) -> None:
        if start_error is not None:
            raise start_error
        self.name = name

    def ready(self) -> int:
        return os.getpid()

    def describe(self) -> str:
        return self.name

    def place(self) -> str:
        return str(ray.get_runtime_context().get_placement_group_id())

    def sit(self, seconds: float) -> None:
        time.sleep(seconds)


def _request(**fields: Any) -> WorkerRequest:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    whole: dict[str, Any] = {
        "name": "clerk",
        "worker_class": Clerk,
        "arguments": [{"name": "first"}],
        "pool": PoolConfig(cpus=0.1),
    }
    return WorkerRequest(**{**whole, **fields})


def _wait_until_ready(starting: StartingWorker, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while starting.poll() is None:
        assert time.monotonic() < deadline, f"{starting.name} is still {starting.stage}"
        time.sleep(0.02)


def _demand() -> list[dict[str, float]]:
    """Bundles that the cluster's autoscaler is told of, read where it reads them."""
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    state = get_cluster_resource_state(client)
    return [
        dict(request.resources_bundle)
        for gang in state.pending_gang_resource_requests
        for request in gang.requests
    ]


def _wait_for_demand(expected: list[dict[str, float]], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while _demand() != expected and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _demand() == expected


def _placed() -> int:
    return sum(group["state"] == "CREATED" for group in placement_group_table().values())


def _wait_until_placed_are(count: int, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while _placed() != count and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _placed() == count


def _grow(session: ClusterSession, group: RayWorkers, name: str) -> int:
    worker_id = group.take_id()
    starting = session.begin_worker(_request(), worker_id, {"name": name})
    _wait_until_ready(starting)
    session.adopt_worker(group, starting)
    return worker_id


def _names(group: RayWorkers) -> list[str]:
    calls = [group.start(worker_id, "describe") for worker_id in group.members]
    return list(group.finish(calls, what="names"))


def test_a_pool_grows_and_shrinks_and_never_gives_an_id_twice(
    session: ClusterSession, workers: Start
) -> None:
    group = workers(Clerk, arguments=[{"name": "first"}])
    begin = _placed()
    assert _grow(session, group, "second") == 1
    assert (group.members, group.count, _names(group)) == ((0, 1), 2, ["first", "second"])
    [pid] = group.finish([group.start(1, "ready")], what="a process id")
    group.remove(1)
    assert _grow(session, group, "third") == 2
    assert (group.members, _names(group)) == ((0, 2), ["first", "third"])
    _wait_until_placed_are(begin + 1)
    assert not psutil.pid_exists(pid)


def test_a_call_under_way_at_a_removed_worker_fails_with_its_name_and_others_go_on(
    session: ClusterSession, workers: Start
) -> None:
    group = workers(Clerk, count=2)
    group.finish([group.start(at, "ready") for at in group.members], what="a start")
    lost = group.start(1, "sit", 60.0)
    group.remove(1)
    with pytest.raises(WorkerError, match=r"^clerk-1 .* died while the run waited for a rest"):
        group.finish([lost], what="a rest")
    assert _names(group) == ["nobody"]


def test_a_worker_without_a_place_is_demand_until_it_is_given_up(session: ClusterSession) -> None:
    huge = PoolConfig(cpus=0.5, custom_resources={"huge_memory": 2.0})
    starting = session.begin_worker(_request(pool=huge), 5, {})
    _wait_for_demand([{"CPU": 0.5, "huge_memory": 2.0}])
    begin = time.monotonic()
    assert starting.poll() is None
    assert time.monotonic() - begin < 2.0, "polling waits for nothing, not for its 3 s"
    expected = (
        r"did not place .*'huge_memory': 2.0.* for clerk-5 within .*resources_seconds=3: free"
    )
    with pytest.raises(ResourceError, match=expected):
        _wait_until_ready(starting)
    [node] = ray.nodes()
    assert re.fullmatch(
        r"no place for \{'CPU': 0\.5, 'huge_memory': 2\.0\}: free \{'CPU': \S+\} of "
        rf"\{{'CPU': \S+\}} on {re.escape(node['NodeName'])}",
        starting.no_place,
    )
    _wait_for_demand([])


def test_a_new_worker_that_cannot_load_leaves_nothing_behind(
    session: ClusterSession, workers: Start
) -> None:
    group = workers(Clerk)
    group.finish([group.start(0, "ready")], what="a start")
    begin = _placed()
    starting = session.begin_worker(_request(), 7, {"start_error": ModelError("no such folder")})
    with pytest.raises(ModelError, match=r"^clerk-7: no such folder$"):
        _wait_until_ready(starting)
    _wait_until_placed_are(begin)
    assert _names(group) == ["nobody"], "the run goes on"


def test_ending_all_ends_a_ready_worker_that_no_group_has_taken_in(session: ClusterSession) -> None:
    begin = _placed()
    starting = session.begin_worker(_request(), 0, {})
    _wait_until_ready(starting)
    session.stop_all()
    _wait_until_placed_are(begin)


def test_workers_side_by_side_share_a_place(session: ClusterSession) -> None:
    arguments: list[dict[str, Any]] = [{}, {}]
    pools = session.start_pools(
        [
            _request(name="reader", arguments=arguments, colocate_with="writer"),
            _request(name="writer", arguments=arguments),
        ]
    )
    reader, writer = (
        group.finish([group.start(at, "place") for at in group.members], what="places")
        for group in pools
    )
    assert reader == writer
    assert len(set(reader)) == 2
    bundles = [placement_group_table()[place]["bundles"] for place in reader]
    assert bundles == [{0: {"CPU": 0.2}}] * 2
    for group in pools:
        session.stop_workers(group)


def test_one_message_names_every_pool_that_waits(session: ClusterSession, said: list[str]) -> None:
    said.clear()
    huge = PoolConfig(cpus=0.5, custom_resources={"huge_memory": 2.0})
    with pytest.raises(ResourceError) as caught:
        session.start_pools(
            [
                _request(name="small"),
                _request(name="writer", pool=huge),
                _request(name="reader", colocate_with="writer"),
                _request(name="ranks", arguments=[{}, {}], pool=huge, gang=True),
            ]
        )
    expected = (
        "1 x {'CPU': 0.6, 'huge_memory': 2.0} for writer and reader, "
        "2 x {'CPU': 0.5, 'huge_memory': 2.0} for ranks together"
    )
    assert f"did not place {expected} within 3 s: free" in str(caught.value)
    assert said[0].startswith(f"waiting for resources: want {expected}; free")
    _wait_for_demand([])

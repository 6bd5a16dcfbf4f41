"""Placing, starting and ending real Ray workers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import ray
from ray._private import ray_constants

from distill_system.cluster import ClusterSession, RayWorkers
from distill_system.cluster.listening import local_arguments
from distill_system.cluster.predecessors import wait_until_gone
from distill_system.config import RunConfig
from distill_system.config.pools import ClusterConfig, PoolConfig
from distill_system.errors import ResourceError, RunStateError, WorkerError
from distill_system.logs import log_environment

Start = Callable[..., RayWorkers]
QUICKSTART = Path(__file__).parents[3] / "configs/quickstart.yaml"


class Sitter:
    """Tells where it is."""

    def __init__(self, *, name: str = "nobody") -> None:
        self.name = name

    def ready(self) -> int:
        return os.getpid()

    def sit(self, seconds: float) -> None:
        time.sleep(seconds)

    def describe(self) -> tuple[str, str]:
        return self.name, os.environ.get("ROOM", "")

    def visible_gpus(self) -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")


def _pids(group: RayWorkers) -> list[int]:
    calls = [group.start(index, "ready") for index in range(group.count)]
    return list(group.finish(calls, what="process ids"))


@pytest.mark.parametrize("gang", [False, True])
def test_each_worker_has_its_arguments_environment_and_process(workers: Start, gang: bool) -> None:
    group = workers(
        Sitter,
        arguments=[{"name": "left"}, {"name": "right"}],
        environment={"ROOM": "kitchen"},
        gang=gang,
    )
    calls = [group.start(index, "describe") for index in range(2)]
    assert group.finish(calls, what="names") == [("left", "kitchen"), ("right", "kitchen")]
    assert len(set(_pids(group))) == 2
    seen = [group.start(index, "visible_gpus") for index in range(2)]
    assert group.finish(seen, what="GPUs") == ["", ""]  # none was asked for


@pytest.mark.parametrize("gang", [False, True])
def test_workers_and_places_are_called_after_run_pool_and_index(workers: Start, gang: bool) -> None:
    """As Ray's dashboard shows them; two pools of one name do not get in each other's way."""
    before = _names()
    for _ in range(2):
        _pids(workers(Sitter, arguments=[{}, {}], gang=gang))
    called = sorted(name.rpartition(" ")[0] for name in _names() - before)
    each = ["quickstart sitter-0", "quickstart sitter-1"]
    # two workers each, and a place each or one for both
    expected = [*each, "quickstart sitter"] if gang else [*each, *each]
    assert called == sorted(expected * 2)


def _names() -> set[str]:
    """Of all workers and places that the session has or had."""
    places = ray.util.placement_group_table().values()
    return {*ray.util.list_named_actors(), *(place["name"] for place in places)}


def test_stopping_ends_the_processes_and_gives_their_resources_back(
    session: ClusterSession, workers: Start
) -> None:
    whole = PoolConfig(cpus=ray.cluster_resources()["CPU"])
    for _ in range(2):  # the second pool needs what the first one had
        group = workers(Sitter, pool=whole)
        [pid] = _pids(group)
        session.stop_workers(group)
        assert _has_ended(pid)
        session.stop_workers(group)  # a second time does nothing


def _has_ended(pid: int, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not psutil.pid_exists(pid)


def test_what_the_cluster_lacks_is_told_with_what_it_has(workers: Start, said: list[str]) -> None:
    said.clear()
    begin = time.monotonic()
    with pytest.raises(ResourceError) as caught:
        workers(Sitter, count=2, pool=PoolConfig(cpus=0.5, custom_resources={"huge_memory": 2.0}))
    assert time.monotonic() - begin < 30.0
    message = str(caught.value)
    assert "did not place 2 x {'CPU': 0.5, 'huge_memory': 2.0} for sitter within 3 s" in message
    assert f"of {{'CPU': {ray.cluster_resources()['CPU']}}}" in message
    assert "pools.*.count" in message
    assert said[0].startswith("waiting for resources: want 2 x {'CPU': 0.5, 'huge_memory': 2.0}")


def test_abandoning_ends_what_waits_for_a_worker(session: ClusterSession, workers: Start) -> None:
    group = workers(Sitter)
    _pids(group)
    call = group.start(0, "sit", 60.0)
    threading.Timer(0.5, session.abandon_all).start()
    with pytest.raises(WorkerError, match="died while the run waited for a rest"):
        group.finish([call], what="a rest")


def test_the_handler_of_sigterm_is_left_as_it_was(
    session: ClusterSession, sigterm_handler: Callable[..., None]
) -> None:
    """Ray's own would end this process without a word."""
    assert signal.getsignal(signal.SIGTERM) is sigterm_handler


def test_a_cluster_is_reached_from_this_machine_alone_unless_asked(session: ClusterSession) -> None:
    assert ray.util.get_node_ip_address() == "127.0.0.1"
    assert ray_constants.ENABLE_RAY_CLUSTER, "what others start in this process listens as before"
    wide = ClusterConfig(listen_on="network", dashboard=False)
    assert local_arguments(wide) == {"include_dashboard": False, "dashboard_host": "0.0.0.0"}


def test_sigterm_is_heard_after_a_session_too() -> None:
    """Ray's end would leave the system's own answer, which ends a process without a word.

    And the session of that process listens where others reach it, as it is asked to.
    """
    program = """
import os, signal, sys
from distill_system.cluster.session import ClusterSession
from distill_system.config import load_config
from ray._private.services import node_ip_address_from_perspective
import ray
signal.signal(signal.SIGTERM, lambda *_: print("heard", flush=True))
overrides = ["cluster.dashboard=false", "cluster.listen_on=network"]
with ClusterSession(load_config([sys.argv[1]], overrides), notify=print):
    assert ray.util.get_node_ip_address() == node_ip_address_from_perspective()
os.kill(os.getpid(), signal.SIGTERM)
print("alive", flush=True)
"""
    arguments = [sys.executable, "-c", program, str(QUICKSTART)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split()[-2:] == ["heard", "alive"], done.stderr


def test_a_cluster_that_does_not_answer_is_told_at_once(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(ResourceError, match=r"RAY_ADDRESS=127\.0\.0\.1:9.*unset RAY_ADDRESS"):
        ClusterSession(config, notify=print).__enter__()


def test_only_the_driver_of_the_run_itself_meets_drivers_before_it(config: RunConfig) -> None:
    """Others may evaluate models beside it, and so may a run of this name elsewhere."""
    first, second = (ClusterSession(config, notify=print, trains=True) for _ in range(2))
    assert first.namespace == second.namespace
    elsewhere = config.model_copy(update={"runs_directory": "/elsewhere"})
    others = [ClusterSession(config, notify=print) for _ in range(2)]
    others.append(ClusterSession(elsewhere, notify=print, trains=True))
    assert len({first.namespace, *(other.namespace for other in others)}) == 4


DRIVER = """
import sys, time
import ray
ray.init(address=sys.argv[1], namespace=sys.argv[2], log_to_driver=False, logging_level="ERROR")

@ray.remote(num_cpus=0)
class Sitter:
    def ready(self):
        return True

sitter = Sitter.options(name="learner-0-abcdef").remote()
ray.get(sitter.ready.remote())
print("begun", flush=True)
time.sleep(300)
"""


def test_workers_of_a_killed_driver_are_waited_for_and_those_of_a_living_one_refuse(
    session: ClusterSession,
) -> None:
    """What a retry meets that begins as soon as its driver was killed."""
    arguments = [sys.executable, "-c", DRIVER, ray.get_runtime_context().gcs_address, "another"]
    said: list[str] = []
    # A driver finds a cluster that listens on localhost only if it looks there (docs/security.md).
    looks_there = {**os.environ, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=looks_there) as driver:
        threading.Timer(120.0, driver.kill).start()  # or readline would wait for ever
        try:
            assert driver.stdout is not None
            assert driver.stdout.readline() == "begun\n"
            wait_until_gone("a third", notify=said.append, seconds=0.0)
            with pytest.raises(RunStateError, match=r"trains this run already.*learner-0-abcdef"):
                wait_until_gone("another", notify=said.append, seconds=0.5)
        finally:
            driver.kill()
    wait_until_gone("another", notify=said.append, seconds=60.0)
    assert said[0] == "waiting for workers of a driver before this one to end: learner-0-abcdef"


def test_each_worker_has_a_log_of_its_own(workers: Start, tmp_path: Path) -> None:
    environment = log_environment(tmp_path / "logs", level="info", json_lines=False)
    [pid] = _pids(workers(Sitter, environment=environment))
    first, second = (tmp_path / "logs/sitter-0.log").read_text().splitlines()
    assert re.search(rf" INFO  sitter-0 begins: process {pid} on \S+, whose streams are /", first)
    [streams] = re.findall(r"streams are (\S+)$", first)
    assert list(Path(streams).parent.glob(f"{Path(streams).name}.out"))
    assert re.search(r" INFO  sitter-0 is ready after \d+\.\d s$", second)


class Breaker(Sitter):
    """Cannot start."""

    def __init__(self) -> None:
        raise ResourceError("no memory for it")


def test_a_worker_that_cannot_start_says_so_in_its_log(workers: Start, tmp_path: Path) -> None:
    environment = log_environment(tmp_path, level="error", json_lines=True)
    with pytest.raises(ResourceError, match="no memory"):
        _pids(workers(Breaker, environment=environment))
    [line] = (tmp_path / "breaker-0.log").read_text().splitlines()
    row = json.loads(line)
    assert (row["level"], row["message"]) == ("error", "breaker-0 could not start")
    assert row["traceback"].endswith("ResourceError: no memory for it\n")


def test_a_node_without_the_runs_folder_is_told_before_anything_is_learned(
    workers: Start, tmp_path: Path
) -> None:
    environment = log_environment(tmp_path / "runs/mine/logs", level="info", json_lines=False)
    with pytest.raises(RunStateError, match=rf"sitter-0 on .*{tmp_path}/runs/mine is not there"):
        _pids(workers(Sitter, environment=environment))
    assert not (tmp_path / "runs").exists()

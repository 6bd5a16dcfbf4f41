"""What the watch over Ray makes of its answers, and of none."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from distill_system.cluster import ray_watch
from distill_system.cluster.ray_watch import RayWatch, ask_for_nodes
from distill_system.errors import ConfigError


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Begins to watch a Ray that answers as is given; returns what the run is ended with, or ""."""
    monkeypatch.setattr(ray_watch, "LOOK_SECONDS", 0.01)

    class Context:
        def get_node_id(self) -> str:
            return "here"

    monkeypatch.setattr(ray, "get_runtime_context", Context)

    def look(nodes: Any, *, before: Any = lambda watched: None) -> str:
        def answer(seconds: float) -> Any:
            look.asked_for.append(seconds)  # type: ignore[attr-defined]
            return nodes

        monkeypatch.setattr(ray_watch, "ask_for_nodes", answer)
        said: list[str] = []
        ended = threading.Event()

        def end(problem: str) -> None:
            said.append(problem)
            ended.set()

        watched = RayWatch(end=end)
        watched.begin()
        before(watched)
        ended.wait(0.5)
        watched.stop()
        return said[0] if said else ""

    look.asked_for = []  # type: ignore[attr-defined]
    return look


def _node(name: str, *, alive: bool = True) -> dict[str, object]:
    return {"NodeID": name, "Alive": alive}


def test_a_ray_that_answers_ends_nothing(watch: Any) -> None:
    assert watch([_node("here"), _node("there", alive=False)]) == "", "another node may be lost"


def test_a_control_process_that_says_nothing_ends_the_run(watch: Any) -> None:
    assert "gcs_server" in watch(None)


@pytest.mark.parametrize(("ray_waits", "seconds"), [(None, 60.0), ("600", 600.0), ("5", 60.0)])
def test_a_head_is_waited_for_as_long_as_ray_waits_for_it(
    watch: Any, monkeypatch: pytest.MonkeyPatch, ray_waits: str | None, seconds: float
) -> None:
    monkeypatch.delenv("RAY_gcs_rpc_server_reconnect_timeout_s", raising=False)
    if ray_waits is not None:
        monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", ray_waits)
    assert f"not answered for {seconds:g} s" in watch(None)
    assert watch.asked_for == [seconds]


def test_a_machine_that_ray_has_given_up_ends_the_run(watch: Any) -> None:
    assert "raylet" in watch([_node("there"), _node("here", alive=False)])


def test_a_shutdown_may_take_its_time_and_no_longer(
    watch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert watch(None, before=RayWatch.expect_end) == "", "it answers no more, as it should"
    monkeypatch.setattr(ray_watch, "SHUT_DOWN_SECONDS", 0.05)
    assert "did not shut down" in watch(None, before=RayWatch.expect_end)


def test_a_question_that_hangs_or_fails_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_watch, "read_nodes", lambda seconds: threading.Event().wait(5.0))
    assert ask_for_nodes(0.05) is None

    def fail(seconds: float) -> None:
        raise ConnectionError("gone")

    monkeypatch.setattr(ray_watch, "read_nodes", fail)
    assert ask_for_nodes(0.05) is None
    answers = iter([ConnectionError("it starts anew"), [_node("here")]])

    def come_back(seconds: float) -> object:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(ray_watch, "read_nodes", come_back)
    assert ask_for_nodes(5.0) == [_node("here")]
    monkeypatch.setattr(ray_watch, "read_nodes", lambda seconds: [_node("here")])
    assert ask_for_nodes(5.0) == [_node("here")]


def test_a_head_that_has_come_back_without_its_tables_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answer(seconds: float) -> None:
        raise RuntimeError("RPC error: WrongClusterID: Perhaps the client is accessing GCS after")

    monkeypatch.setattr(ray_watch, "read_nodes", answer)
    monkeypatch.setattr(ray_watch, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=str))
    said: list[str] = []
    ended = threading.Event()

    def end(problem: str) -> None:
        said.append(problem)
        ended.set()

    watched = RayWatch(end=end)
    watched.begin()
    assert ended.wait(5.0)
    watched.stop()
    assert "come back without its tables" in said[0]


def test_a_time_that_is_no_number_is_refused_by_its_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "soon")
    with pytest.raises(ConfigError, match="timeout_s='soon': expected a number of seconds"):
        RayWatch()

"""Waiting for real Ray workers: results in order, and who failed at what."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from distill_system.cluster import EveryWorker, RayWorkers
from distill_system.cluster.liveness import LivenessMonitor
from distill_system.cluster.waiting import MANY_CALLS
from distill_system.errors import (
    DeadlineError,
    DistillError,
    ModelError,
    NonFiniteError,
    ResourceError,
    WorkerError,
)

Start = Callable[..., RayWorkers]


class Speaker:
    """Does what a test asks of a worker."""

    def __init__(self, *, start_error: Exception | None = None) -> None:
        if start_error is not None:
            raise start_error

    def ready(self) -> int:
        return os.getpid()

    def say(self, word: Any) -> Any:
        return word

    def say_late(self, word: Any, seconds: float) -> Any:
        time.sleep(seconds)
        return word

    def say_or_raise(self, word: Any) -> Any:
        if isinstance(word, Exception):
            raise word
        return word

    def fail(self, error: Exception) -> None:
        raise error

    def fail_late(self, error: Exception, seconds: float) -> None:
        time.sleep(seconds)
        raise error


def test_results_come_in_the_order_of_the_calls(workers: Start) -> None:
    group = workers(Speaker, count=2)
    late = group.start(0, "say_late", "first", 0.5)
    soon = group.start(1, "say", "second")
    assert group.finish([late, soon], what="words") == ["first", "second"]
    assert group.finish([late, soon], what="words", fetch=False) == []


def test_many_unhurried_calls_are_heard_of_together(workers: Start) -> None:
    group = workers(Speaker, count=2)
    group.finish([group.start(index, "ready") for index in range(2)], what="a start")
    how: dict[str, Any] = {"what": "words", "seconds": 60.0, "together_seconds": 60.0}
    many = [group.start(0, "say_late", index, 0.02) for index in range(MANY_CALLS + 1)]
    assert group.wait_any([], unhurried=many, **how) == many
    few = [group.start(0, "say_late", index, 0.3) for index in range(MANY_CALLS)]
    assert group.wait_any([], unhurried=few, **how) == few[:1]


def test_an_urgent_call_does_not_wait_for_company(workers: Start) -> None:
    group = workers(Speaker, count=2)
    group.finish([group.start(index, "ready") for index in range(2)], what="a start")
    many = [group.start(0, "say_late", index, 0.1) for index in range(MANY_CALLS + 20)]
    urgent = group.start(1, "say_late", "urgent", 1.0)
    done = group.wait_any(
        [urgent], what="words", seconds=60.0, unhurried=many, together_seconds=60.0
    )
    assert urgent in done
    assert 1 < len(done) < len(many)


def test_waits_that_bring_nothing_for_as_long_as_a_call_may_take_end_together(
    workers: Start,
) -> None:
    group = workers(Speaker, count=2)
    group.finish([group.start(index, "ready") for index in range(2)], what="a start")
    group.call_seconds = 0.8
    how: dict[str, Any] = {"what": "three words", "seconds": 0.5}
    late = group.start(1, "say_late", "late", 30.0)
    assert group.wait_any([late], **how) == []
    time.sleep(0.5)  # time between two waits is not the workers' silence
    soon = group.start(0, "say", "soon")
    assert group.wait_any([late, soon], **how) == [soon]
    assert group.wait_any([late], **how) == []
    with pytest.raises(DeadlineError, match=r"waited 1 s for three words from speaker-1: 1 of 1"):
        group.wait_any([late], **how)


def test_a_deadline_names_the_worker_and_what_it_owes(workers: Start) -> None:
    group = workers(Speaker, count=2)
    group.finish([group.start(index, "ready") for index in range(2)], what="a start")
    calls = [group.start(0, "say", "done"), group.start(1, "say_late", "late", 4.0)]
    with pytest.raises(
        DeadlineError, match=r"waited 1 s for three words from speaker-1: 1 of 2 results"
    ) as caught:
        group.finish(calls, what="three words", seconds=1.0)
    assert isinstance(caught.value, TimeoutError)


def test_a_wait_lasts_while_results_still_come(workers: Start) -> None:
    """The deadline is of one call, not of all that a worker was given at once."""
    group = workers(Speaker)
    group.finish([group.start(0, "ready")], what="a start")
    calls = [group.start(0, "say_late", index, 0.5) for index in range(5)]
    assert group.finish(calls, what="words", seconds=2.0) == [0, 1, 2, 3, 4]


def test_a_workers_own_error_keeps_its_type_and_gains_the_workers_name(workers: Start) -> None:
    group = workers(Speaker, count=2)
    calls = [group.start(0, "say", "fine"), group.start(1, "fail", NonFiniteError("loss is nan"))]
    with pytest.raises(NonFiniteError) as caught:
        group.finish(calls, what="a step")
    assert str(caught.value) == "speaker-1: loss is nan"
    assert type(caught.value) is NonFiniteError


def test_any_other_error_comes_with_its_traceback(workers: Start) -> None:
    group = workers(Speaker)
    with pytest.raises(WorkerError) as caught:
        group.finish([group.start(0, "fail", KeyError("lost key"))], what="a step")
    message = str(caught.value)
    assert message.startswith("speaker-0 failed at a step:\n")
    assert "in fail" in message
    assert message.endswith("KeyError: 'lost key'")
    assert "\x1b" not in message, "colours are for terminals"


def test_the_first_failure_ends_the_wait_for_the_others(workers: Start) -> None:
    group = workers(Speaker, count=2)
    group.finish([group.start(index, "ready") for index in range(2)], what="a start")
    begin = time.monotonic()
    calls = [group.start(0, "say_late", "late", 30.0), group.start(1, "fail", ModelError("no"))]
    with pytest.raises(ModelError):
        group.finish(calls, what="words")
    assert time.monotonic() - begin < 10.0


def test_an_error_is_the_workers_who_made_it_not_of_the_one_it_was_handed_to(
    workers: Start,
) -> None:
    group = workers(Speaker, count=2)
    broken = group.start(1, "fail", NonFiniteError("teacher says nan"))
    assert group.finish([broken], what="scores", fetch=False) == []
    with pytest.raises(NonFiniteError, match=r"^speaker-1: teacher says nan$"):
        group.finish([group.start(0, "say", broken)], what="a step")


def test_a_constructors_error_is_raised_with_its_type_by_ready(workers: Start) -> None:
    group = workers(Speaker, arguments=[{"start_error": ResourceError("too little memory")}])
    with pytest.raises(ResourceError, match=r"^speaker-0: too little memory$"):
        group.finish([group.start(0, "ready")], what="a start")


def test_a_constructor_that_breaks_otherwise_is_told_with_its_traceback(workers: Start) -> None:
    group = workers(Speaker, arguments=[{"start_error": IndexError("a bug of ours")}])
    with pytest.raises(WorkerError) as caught:
        group.finish([group.start(0, "ready")], what="a start")
    message = str(caught.value)
    assert message.startswith("speaker-0 failed at a start:")
    assert "in __init__" in message
    assert message.endswith("IndexError: a bug of ours")


def _kill(group: RayWorkers, worker: int) -> int:
    [pid] = group.finish([group.start(worker, "ready")], what="a process id")
    psutil.Process(pid).kill()
    return int(pid)


def test_a_dead_worker_is_named_with_its_process(workers: Start) -> None:
    group = workers(Speaker, count=2)
    waiting = group.start(1, "say_late", "never", 60.0)
    pid = _kill(group, 0)
    with pytest.raises(WorkerError, match=rf"^speaker-0 \(process {pid} on [\d.]+\) died while"):
        group.finish([group.start(0, "say", "anything"), waiting], what="words")


def test_a_worker_that_dies_ends_a_wait_for_another(workers: Start) -> None:
    """Nobody would notice otherwise before the other's deadline, half an hour by default."""
    group = workers(Speaker, count=2)
    busy = group.start(1, "say_late", "never", 60.0)
    _kill(group, 0)
    begin = time.monotonic()
    with pytest.raises(WorkerError, match=r"^speaker-0 .* died while the run waited for words"):
        group.finish([busy], what="words")
    assert time.monotonic() - begin < 20.0


def test_a_death_is_told_rather_than_the_failure_that_it_caused(workers: Start) -> None:
    group = workers(Speaker, count=2)
    lost_partner = group.start(1, "fail_late", ConnectionError("closed by peer"), 0.3)
    _kill(group, 0)
    with pytest.raises(WorkerError, match=r"^speaker-0 .* died"):
        group.finish([lost_partner], what="a sum over ranks")


def test_an_answer_from_before_a_death_does_not_hide_it(workers: Start) -> None:
    group = workers(Speaker, count=1)
    monitor = LivenessMonitor(group.named_handles())
    [process] = group.finish([group.start(0, "ready")], what="a start")
    monitor.require_alive(seconds=0.0, waiting_for="nothing")  # asks, and goes on without an answer
    group.finish([group.start(0, "say", "alive")], what="a word")
    psutil.Process(process).kill()
    with pytest.raises(WorkerError, match=r"^speaker-0 .* died while the run waited for a word"):
        monitor.require_alive(seconds=30.0, waiting_for="a word")


def test_every_worker_gets_its_own_arguments_and_the_first_failure_is_told(
    workers: Start,
) -> None:
    group = workers(Speaker, count=2)
    every_worker = EveryWorker(group.named_handles(), seconds=20.0)
    assert every_worker("say", [("one",), ("two",)]) is None
    with pytest.raises(DistillError, match=r"^speaker-1: two$"):
        every_worker("say_or_raise", [("one",), (ModelError("two"),)])
    with pytest.raises(DeadlineError, match="say_late from speaker-0"):
        EveryWorker(group.named_handles(), seconds=0.5)("say_late", [("one", 3.0), ("two", 0.0)])

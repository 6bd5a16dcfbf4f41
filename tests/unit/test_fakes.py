"""Fakes are as their interfaces say, and refuse what the real ones could not do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pickle import PicklingError
from typing import Any

import pytest
from fakes.direct_transfer import DirectTransfer
from fakes.forked_workers import Call as ForkedCall
from fakes.forked_workers import ForkedPeers, ForkedWorkers
from fakes.interfaces import find_misfits
from fakes.local_workers import Done, LocalWorkers
from fakes.starts import LateStart, LateStarts
from fakes.text_saver import TextSaver
from fakes.threaded_calls import ThreadedCalls
from simulated_pools import SimulatedWorkers

from distill_system.cluster import ClusterSession, EveryWorker, RayWorkers
from distill_system.cluster.peers import RankPeers
from distill_system.cluster.starting import StartingWorker
from distill_system.elastic.elastic_pools import Starting, Starts
from distill_system.learner import LearnerGroup
from distill_system.run.checkpoints import Saver
from distill_system.run.transfer_group import TransferGroup
from distill_system.weights import FanOutClient
from distill_system.weights.client import EveryRolloutWorker, WeightSyncClient
from distill_system.workers import ElasticWorkers, Peers, StartedWorker, Workers


@pytest.mark.parametrize(
    ("fake", "interface", "own"),
    [
        (LocalWorkers, ElasticWorkers, ()),
        (ForkedWorkers, Workers, ("ask", "stop")),
        (ForkedPeers, Peers, ("stop",)),
        (SimulatedWorkers, Workers, ()),
        (ThreadedCalls, EveryRolloutWorker, ()),
        (LateStart, Starting, ()),
        (LateStarts, Starts, ()),
        (TextSaver, Saver, ()),
        (DirectTransfer, TransferGroup, ()),
    ],
)
def test_a_fake_has_exactly_the_members_of_its_interface(
    fake: type, interface: type, own: tuple[str, ...]
) -> None:
    assert find_misfits(fake, interface, own=own) == []


@pytest.mark.parametrize(
    ("real", "interface"),
    [
        (RayWorkers, ElasticWorkers),
        (RankPeers, Peers),
        (EveryWorker, EveryRolloutWorker),
        (FanOutClient, WeightSyncClient),
        (StartingWorker, Starting),
        (ClusterSession, Starts),
        (LearnerGroup, Saver),
    ],
)
def test_the_real_ones_have_what_the_fakes_are_held_to(real: type, interface: type) -> None:
    assert find_misfits(real, interface, own=None) == []


def test_a_misfit_of_every_kind_is_found() -> None:
    class Interface:
        @property
        def size(self) -> int: ...
        def start(self, worker: int, *, what: str) -> None: ...
        def stop(self) -> None: ...

    class Fake:
        def size(self) -> int: ...
        def start(self, worker: int, what: str) -> None: ...
        def look(self) -> None: ...

    assert find_misfits(Fake, Interface) == [
        "Fake has no stop",
        "Interface has no look",
        "size: expected a property, got (self)",
        "start: expected (self, worker, *, what), got (self, worker, what)",
    ]
    assert find_misfits(Fake, Interface, own=["look"])[1].startswith("size")
    assert find_misfits(Fake, Interface, own=None)[1].startswith("size")
    assert find_misfits(Fake, Interface, own=["look", "stop"])[-1] == "Fake has no stop of its own"


class Adder:
    def add(self, one: int, two: int = 0) -> int:
        return one + two

    def fail(self) -> None:
        raise KeyError("no")

    def give_back(self, value: Any) -> Any:
        return value


@pytest.fixture(scope="module")
def forked() -> Iterator[ForkedWorkers]:
    """Two adders in processes of their own."""
    workers = ForkedWorkers([Adder, Adder])
    yield workers
    workers.stop()


@pytest.fixture(params=["local", "forked"])
def group(request: pytest.FixtureRequest, forked: ForkedWorkers) -> Any:
    """Two adders behind either kind of group."""
    return forked if request.param == "forked" else LocalWorkers([Adder(), Adder()])


def _add(group: Any, worker: int = 0) -> Any:
    return group.start(worker, "add", 2, 3)


@pytest.mark.parametrize(
    ("method", "arguments", "said"),
    [
        ("multiply", (1,), "Adder has no method 'multiply'"),
        ("__init__", (), "no method"),
        ("add", (), "missing a required argument"),
        ("add", (1, 2, 3), "too many positional arguments"),
    ],
)
def test_a_call_that_the_worker_could_not_take_is_refused(
    group: Any, method: str, arguments: tuple[Any, ...], said: str
) -> None:
    with pytest.raises(AssertionError, match=said):
        group.finish([group.start(0, method, *arguments)], what="an answer")


@pytest.mark.parametrize(
    "misuse",
    [
        lambda group: group.start(2, "add", 1),
        lambda group: group.finish([_add(group)], what=""),
        lambda group: group.finish([5], what="a sum"),
        lambda group: group.wait_any([5], what="a sum", seconds=1.0),
        lambda group: group.finish([_add(group)] * 2, what="a sum"),
        lambda group: [group.finish(it, what="a sum") for it in [[_add(group)]] * 2],
        lambda group: group.finish([ForkedCall(0, 99)], what="a sum"),
        lambda group: group.finish([_add(LocalWorkers([Adder()]))], what="a sum"),
    ],
    ids=["worker", "unnamed", "number", "wait", "twice", "again", "never begun", "another group's"],
)
def test_what_a_group_could_not_know_or_has_given_already_is_refused(
    group: Any, misuse: Callable[[Any], object]
) -> None:
    with pytest.raises(AssertionError):
        misuse(group)


def test_results_and_failures_come_out_where_they_are_fetched(group: Any) -> None:
    sums = [group.start(worker, "add", 2, worker) for worker in group.members]
    assert group.finish(sums, what="sums", fetch=False) == []
    assert group.wait_any(sums, what="sums", seconds=1.0) == sums
    assert group.finish(sums, what="sums") == [2, 3]
    failed = group.start(0, "fail")
    assert group.finish([failed], what="a failure", fetch=False) == []
    with pytest.raises(KeyError):
        group.finish([failed], what="a failure")


def test_a_reference_is_resolved_where_it_is_an_argument() -> None:
    group = LocalWorkers([Adder()])
    assert group.finish([group.start(0, "add", _add(group), Done(7))], what="sums") == [12]
    with pytest.raises(KeyError):
        group.finish([group.start(0, "add", group.start(0, "fail"))], what="a sum")


def test_what_could_not_travel_does_not_and_what_arrives_is_a_copy() -> None:
    group = LocalWorkers([Adder()])
    with pytest.raises((AttributeError, PicklingError), match=r"local object|lambda"):
        group.finish([group.start(0, "give_back", lambda: 1)], what="a function")
    sent = [1]
    [received] = group.finish([group.start(0, "give_back", sent)], what="a list")
    assert received == sent
    assert received is not sent


def test_a_group_takes_in_only_ids_that_it_gave() -> None:
    group = LocalWorkers([Adder()])
    with pytest.raises(AssertionError, match="was not given out"):
        group.add(StartedWorker(1, Adder(), None))
    assert group.take_id() == 1
    group.add(StartedWorker(1, Adder(), None))
    assert group.members == (0, 1)
    with pytest.raises(AssertionError, match="in the group already"):
        group.add(StartedWorker(1, Adder(), None))
    group.remove(0)
    assert group.members == (1,)
    with pytest.raises(AssertionError, match="no worker 0"):
        group.remove(0)


def test_forked_workers_live_in_processes_of_their_own(forked: ForkedWorkers) -> None:
    assert len({*forked.ask(_process_id), os.getpid()}) == 3


def _process_id(_: Adder) -> int:
    return os.getpid()


def test_threaded_calls_check_the_class_they_stand_for() -> None:
    calls = ThreadedCalls([Adder(), Adder()])
    assert [call.result() for call in calls.start("add", [(1,), (2, 3)])] == [1, 5]
    with pytest.raises(AssertionError, match="no method 'sum'"):
        calls("sum", [(), ()])
    with pytest.raises(ValueError, match="zip"):
        calls("add", [(1,)])

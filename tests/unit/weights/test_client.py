from typing import Any

import pytest

from distill_system.weights.client import FanOutClient


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[str, list[tuple[Any, ...]]]] = []

    def __call__(self, method: str, argument_tuples: list[tuple[Any, ...]]) -> None:
        self.calls.append((method, argument_tuples))


def test_every_worker_takes_ranks_that_no_other_takes() -> None:
    recorder = Recorder()
    sizes = (2, 1, 4)
    client = FanOutClient(recorder, sizes)
    client.init_weight_transfer_engine({"rank_offset": 1, "world_size": 8, "master_port": 5})
    [(method, arguments)] = recorder.calls
    assert method == "init_weight_transfer_engine"
    taken = [
        info["rank_offset"] + rank
        for (info,), size in zip(arguments, sizes, strict=True)
        for rank in range(size)
    ]
    assert taken == [1, 2, 3, 4, 5, 6, 7]  # the sender is 0
    assert client.num_receivers == 7
    assert {(info["world_size"], info["master_port"]) for (info,) in arguments} == {(8, 5)}


def test_an_update_reaches_every_worker_with_the_same_arguments() -> None:
    recorder = Recorder()
    client = FanOutClient(recorder, (1, 1))
    client.start_weight_update()
    client.update_weights({"names": ["w"]})
    client.finish_weight_update()
    client.commit(7)
    assert recorder.calls == [
        ("start_weight_update", [(), ()]),
        ("update_weights", [({"names": ["w"]},)] * 2),
        ("finish_weight_update", [(), ()]),
        ("commit_weight_version", [(7,), (7,)]),
    ]


def test_a_version_given_to_finish_is_committed_after_it() -> None:
    recorder = Recorder()
    FanOutClient(recorder, (1,)).finish_weight_update("12")
    assert recorder.calls == [("finish_weight_update", [()]), ("commit_weight_version", [(12,)])]


def test_a_workers_error_comes_out_as_it_is() -> None:
    def failing(method: str, argument_tuples: list[tuple[Any, ...]]) -> None:
        raise ConnectionError("worker 1")

    with pytest.raises(ConnectionError, match="worker 1"):
        FanOutClient(failing, (1, 1)).update_weights({})

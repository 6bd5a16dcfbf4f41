from typing import Any

import pytest

from distill_system.weights.client import FanOutClient


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[str, list[tuple[Any, ...]]]] = []

    def start(self, method: str, argument_tuples: list[tuple[Any, ...]]) -> list[str]:
        self.calls.append((method, argument_tuples))
        return [f"call {at}" for at in range(len(argument_tuples))]

    def __call__(self, method: str, argument_tuples: list[tuple[Any, ...]]) -> None:
        self.start(method, argument_tuples)


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


def test_a_version_reaches_each_worker_in_one_call() -> None:
    recorder = Recorder()
    references = FanOutClient(recorder, (1, 2)).start_receiving(7, {"names": ["w"]})
    assert references == ["call 0", "call 1"]
    assert recorder.calls == [("receive_weights", [(7, {"names": ["w"]})] * 2)]


def test_a_workers_error_comes_out_as_it_is() -> None:
    class Failing(Recorder):
        def __call__(self, method: str, argument_tuples: list[tuple[Any, ...]]) -> None:
            raise ConnectionError("worker 1")

    with pytest.raises(ConnectionError, match="worker 1"):
        FanOutClient(Failing(), (1, 1)).init_weight_transfer_engine({"rank_offset": 1})

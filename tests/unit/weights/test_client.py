from typing import Any

import pytest
from fakes.threaded_calls import ThreadedCalls

from distill_system.rollout import RolloutWorker
from distill_system.weights.client import FanOutClient


class Receiver:
    """Stands for RolloutWorker: remembers what it is told; `error` ends its join."""

    def __init__(self, *, error: Exception | None = None) -> None:
        self.error = error
        self.told: list[Any] = []

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        if self.error is not None:
            raise self.error
        self.told.append(init_info)

    def receive_weights(self, version: int, update_info: dict[str, Any]) -> int:
        self.told.append((version, update_info))
        return version


def _client(workers: list[Receiver], sizes: tuple[int, ...]) -> FanOutClient:
    return FanOutClient(ThreadedCalls(workers, stands_for=RolloutWorker), sizes)


def test_every_worker_takes_ranks_that_no_other_takes() -> None:
    sizes = (2, 1, 4)
    workers = [Receiver() for _ in sizes]
    client = _client(workers, sizes)
    client.init_weight_transfer_engine({"rank_offset": 1, "world_size": 8, "master_port": 5})
    told = [info for worker in workers for info in worker.told]
    taken = [
        info["rank_offset"] + rank
        for info, size in zip(told, sizes, strict=True)
        for rank in range(size)
    ]
    assert taken == [1, 2, 3, 4, 5, 6, 7]  # the sender is 0
    assert client.num_receivers == 7
    assert {(info["world_size"], info["master_port"]) for info in told} == {(8, 5)}


def test_a_version_reaches_each_worker_in_one_call() -> None:
    workers = [Receiver(), Receiver()]
    references = _client(workers, (1, 2)).start_receiving(7, {"names": ["w"]})
    assert [reference.result() for reference in references] == [7, 7]
    assert [worker.told for worker in workers] == [[(7, {"names": ["w"]})]] * 2


def test_a_workers_error_comes_out_as_it_is() -> None:
    workers = [Receiver(), Receiver(error=ConnectionError("worker 1"))]
    with pytest.raises(ConnectionError, match="worker 1"):
        _client(workers, (1, 1)).init_weight_transfer_engine({"rank_offset": 1})

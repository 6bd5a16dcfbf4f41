"""The receiving end of a torch model, fed by a publisher over the real wire; no vLLM."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from distill_system.errors import TransferError
from distill_system.weights import FanOutClient, WeightPublisher
from distill_system.weights.receiver import WeightReceiver


class Tied(nn.Module):
    """An output layer that shares the embedding's tensor."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(50, size), nn.LayerNorm(size)
        self.head = nn.Linear(size, 50, bias=False)
        self.head.weight = self.embed.weight


class Worker:
    """A rollout worker's receiving part."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.receiver = WeightReceiver(model)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.receiver.shutdown_weight_transfer_engine()
        self.receiver.init_weight_transfer_engine(init_info)

    def receive_weights(self, version: int, update_info: dict[str, Any]) -> tuple[int, int]:
        self.receiver.start_weight_update()
        self.receiver.update_weights(update_info)
        self.receiver.finish_weight_update()
        return self.receiver.received_seal()


class Calls:
    """Every worker, each call in a thread of its own."""

    def __init__(self, workers: list[Worker]) -> None:
        self.workers, self.executor = workers, ThreadPoolExecutor(len(workers))

    def start(self, method: str, argument_tuples: Any) -> list[Future[Any]]:
        return [
            self.executor.submit(getattr(worker, method), *arguments)
            for worker, arguments in zip(self.workers, argument_tuples, strict=True)
        ]

    def __call__(self, method: str, argument_tuples: Any) -> None:
        for call in self.start(method, argument_tuples):
            call.result(timeout=30)


class Setting:
    """A learner's model and two workers, one of which computes in bfloat16."""

    def __init__(self, workers: list[Worker]) -> None:
        self.model = Tied()
        self.workers = workers
        client = FanOutClient(Calls(workers), [1] * len(workers))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self.publisher = WeightPublisher(
            self.model,
            backend="gloo",
            client=client,
            master_address="127.0.0.1",
            master_port=port,
            num_receivers=client.num_receivers,
            rank=0,
            timeout_seconds=15.0,
            bucket_bytes=200,
        )

    def publish(self, version: int) -> list[Any]:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn_like(parameter))
        return [reference.result(timeout=30) for reference in self.publisher.start(version)]


@pytest.fixture
def setting() -> Iterator[Setting]:
    made = Setting([Worker(Tied()), Worker(Tied().bfloat16())])
    yield made
    made.publisher.close()


def test_every_version_reaches_every_worker_rounded_to_its_precision(setting: Setting) -> None:
    seals = set()
    for version in (1, 2):
        first, second = setting.publish(version)
        assert first == second, "both have had the same bytes"
        seals.add(first)
        for worker in setting.workers:
            for name, parameter in worker.model.named_parameters():
                sent = setting.model.get_parameter(name)
                assert torch.equal(parameter, sent.to(parameter.dtype))
            assert worker.model.head.weight is worker.model.embed.weight
    assert len(seals) == 2
    assert {num_bytes for num_bytes, _ in seals} == {4 * (50 * 3 + 2 * 3)}


def test_a_bit_that_flips_on_the_way_changes_nothing_and_the_next_version_heals(
    setting: Setting,
) -> None:
    setting.publish(1)
    before = [p.clone() for p in setting.workers[0].model.parameters()]
    group: Any = setting.publisher._engine.model_update_group
    honest, calls = group.broadcast, []

    def corrupting(tensor: torch.Tensor, src: int) -> Any:
        calls.append(tensor.clone())
        if len(calls) == 2:
            calls[-1][3] ^= 1
            group.broadcast = honest
        return honest(calls[-1], src)

    group.broadcast = corrupting
    with pytest.raises(TransferError, match="no text is written with them"):
        setting.publish(2)
    assert all(map(torch.equal, before, setting.workers[0].model.parameters()))
    setting.publish(3)
    assert torch.equal(setting.workers[0].model.embed.weight, setting.model.embed.weight)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Tied(4), r"3 parameters differ, such as 'embed.weight'.*\(50, 4\), got \(50, 3\)"),
        (nn.Linear(3, 50), r"'bias': expected the shape \(50,\), got none"),
    ],
)
def test_weights_of_another_model_are_refused_whole(model: nn.Module, said: str) -> None:
    setting = Setting([Worker(model)])
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(TransferError, match=said):
        setting.publish(1)
    assert all(map(torch.equal, before, model.parameters()))
    setting.publisher.close()


def test_weights_before_a_group_are_refused() -> None:
    update = {"names": ["w"], "dtype_names": ["float32"], "shapes": [[1]]}
    with pytest.raises(TransferError, match="before this worker joined a transfer group"):
        WeightReceiver(Tied()).update_weights(update)

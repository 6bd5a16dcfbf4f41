"""What can be checked of the gloo backend without an engine; these import vLLM (5 s)."""

import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill_system.errors import ResourceError, TransferError
from distill_system.weights import FanOutClient, WeightPublisher
from distill_system.weights.transport import broadcast_buckets, check_seal, send_seal

pytest.importorskip("vllm")
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from distill_system.weights import backends, gloo
from distill_system.weights.communicator import GlooCommunicator
from distill_system.weights.meeting import open_store
from distill_system.weights.sealed import SealedWeightTransferEngine

CPU = torch.device("cpu")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _exchange(corrupt: Any, *, receivers: int = 2) -> list[Any]:
    """Three buckets from rank 0 to the others; corrupt(at, bucket) is what travels instead."""
    port = _free_port()
    store = open_store(address="127.0.0.1", port=port, timeout_seconds=20.0)
    sent = [torch.arange(size, dtype=torch.uint8) for size in (70_000, 16_384, 9)]

    def run(rank: int) -> Any:
        group = GlooCommunicator(
            address="127.0.0.1",
            port=port,
            rank=rank,
            world_size=1 + receivers,
            timeout_seconds=20.0,
        )
        if rank == 0:
            honest, count = group.broadcast, iter(range(100))
            altered: Any = group  # mypy refuses to replace a method
            altered.broadcast = lambda tensor, src: honest(corrupt(next(count), tensor), src)
            send_seal(group, broadcast_buckets(group, sent), CPU)
            return None
        buffers = [torch.zeros_like(buffer) for buffer in sent]
        try:
            received = broadcast_buckets(group, buffers)
            check_seal(group, received, CPU)
        except TransferError as error:
            return error
        assert all(map(torch.equal, buffers, sent))
        return received

    with ThreadPoolExecutor(1 + receivers) as executor:
        received = list(executor.map(run, range(1 + receivers)))[1:]
    del store  # until here they found one another there
    return received


def test_buckets_reach_every_rank_and_every_rank_verifies_them() -> None:
    first, second = _exchange(lambda at, bucket: bucket)
    assert first == second
    assert first.num_bytes == 70_000 + 16_384 + 9


@pytest.mark.parametrize("bucket", [0, 1, 2])
def test_a_byte_that_flips_on_the_way_is_seen_by_every_receiver(bucket: int) -> None:
    def flip(at: int, tensor: torch.Tensor) -> torch.Tensor:
        if at != bucket:
            return tensor
        flipped = tensor.clone()
        flipped[7] ^= 4
        return flipped

    for seen in _exchange(flip):
        assert isinstance(seen, TransferError)
        assert "no text is written with them" in str(seen)


def test_a_receiver_that_never_joins_is_not_waited_for_longer_than_asked() -> None:
    begin, port = time.perf_counter(), _free_port()
    store = open_store(address="127.0.0.1", port=port, timeout_seconds=1.0)
    with pytest.raises(ResourceError, match="one did not come or left"):
        GlooCommunicator(address="127.0.0.1", port=port, rank=0, world_size=2, timeout_seconds=1.0)
    assert time.perf_counter() - begin < 10.0
    del store


def test_those_that_wait_for_one_that_never_joins_are_let_go_when_the_store_closes() -> None:
    """Or every engine would be held up, as long as it may, by the one that died."""
    port = _free_port()
    store = [open_store(address="127.0.0.1", port=port, timeout_seconds=60.0)]

    def join(rank: int) -> None:
        GlooCommunicator(
            address="127.0.0.1", port=port, rank=rank, world_size=3, timeout_seconds=60.0
        )

    with ThreadPoolExecutor(2) as threads:
        begin = time.perf_counter()
        joining = [threads.submit(join, rank) for rank in (0, 1)]
        time.sleep(0.5)
        store.clear()
        for each in joining:
            assert each.exception(timeout=30.0) is not None
    assert time.perf_counter() - begin < 30.0


def test_a_group_is_left_at_once_though_a_peer_that_takes_nothing_keeps_its_connection() -> None:
    """Such a peer is a worker that cannot be ended, on a node whose raylet is stopped."""
    port, timeout = _free_port(), 8.0
    store = open_store(address="127.0.0.1", port=port, timeout_seconds=timeout)

    def join(rank: int) -> GlooCommunicator:
        return GlooCommunicator(
            address="127.0.0.1", port=port, rank=rank, world_size=2, timeout_seconds=timeout
        )

    with ThreadPoolExecutor(2) as threads:
        sender, idle = threads.map(join, (0, 1))
        more_than_sockets_hold = torch.zeros(50_000_000, dtype=torch.uint8)
        began = time.perf_counter()
        sending = threads.submit(lambda: sender.broadcast(more_than_sockets_hold, src=0).wait())
        time.sleep(0.2)
        sender.destroy()
        assert time.perf_counter() - began < timeout - 3.0
        assert not sending.done(), "it is the peer that holds it"
        idle.destroy()
        assert isinstance(sending.exception(timeout=30.0), RuntimeError)
    del store


class Receiver:
    """One rollout worker: the receiving ends of its tensor-parallel ranks, and what they loaded."""

    def __init__(self, num_ranks: int) -> None:
        self.loaded: list[dict[str, torch.Tensor]] = [{} for _ in range(num_ranks)]
        self.engines = [self._engine(rank) for rank in range(num_ranks)]

    def _engine(self, rank: int) -> Any:
        engine = object.__new__(gloo.GlooWeightTransferEngine)  # the rest wants a whole vLLM
        engine.parallel_config = SimpleNamespace(
            data_parallel_index=0, world_size=len(self.loaded), rank=rank
        )
        engine.model = SimpleNamespace(
            load_weights=lambda named: self.loaded[rank].update((n, t.clone()) for n, t in named)
        )
        return engine

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._each(lambda engine: engine.init_transfer_engine(engine.parse_init_info(init_info)))

    def receive_weights(self, version: int, update_info: dict[str, Any]) -> int:
        self._each(lambda engine: engine.update_weights(update_info))
        return version

    def _each(self, call: Any) -> None:
        with ThreadPoolExecutor(len(self.engines)) as executor:
            list(executor.map(call, self.engines))


class Calls:
    """Every rollout worker, each call in a thread of its own."""

    def __init__(self, receivers: list[Receiver]) -> None:
        self.receivers, self.executor = receivers, ThreadPoolExecutor(len(receivers))

    def start(self, method: str, argument_tuples: Any) -> list[Future[Any]]:
        return [
            self.executor.submit(getattr(receiver, method), *arguments)
            for receiver, arguments in zip(self.receivers, argument_tuples, strict=True)
        ]

    def __call__(self, method: str, argument_tuples: Any) -> None:
        for call in self.start(method, argument_tuples):
            call.result(timeout=30)


def test_two_versions_reach_every_rank_of_every_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """The learner's end, the wire and the receiving ends as they are; no engine, no Ray."""
    base = SealedWeightTransferEngine.__mro__[1]
    monkeypatch.setattr(base, "start_weight_update", lambda self: None)
    receivers = [Receiver(2), Receiver(1)]
    model = torch.nn.Linear(100, 30)
    client = FanOutClient(Calls(receivers), [2, 1])
    publisher = WeightPublisher(
        model,
        backend="gloo",
        client=client,
        master_address="127.0.0.1",
        master_port=_free_port(),
        num_receivers=client.num_receivers,
        rank=0,
        timeout_seconds=15.0,
        bucket_bytes=1000,
    )
    for version in (1, 2):
        with torch.no_grad():
            model.weight.add_(1.0)
        references = publisher.start(version)
        assert [reference.result(timeout=30) for reference in references] == [version] * 2
        for loaded in (*receivers[0].loaded, *receivers[1].loaded):
            assert torch.equal(loaded["weight"], model.weight)
            assert torch.equal(loaded["bias"], model.bias)
    publisher.close()


@pytest.mark.parametrize("tied", [True, False])
def test_an_update_packs_a_tied_output_layer_anew_and_no_other(
    monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    packed: list[Any] = []

    class Head(torch.nn.Module):
        quant_method = SimpleNamespace(process_weights_after_loading=packed.append)

    base = SealedWeightTransferEngine.__mro__[1]
    monkeypatch.setattr(base, "finish_weight_update", lambda self: packed.append("vLLM's own"))
    monkeypatch.setattr(gloo, "ParallelLMHead", Head)
    engine = object.__new__(gloo.GlooWeightTransferEngine)
    engine.model = torch.nn.Sequential(torch.nn.Linear(2, 2), Head())
    config = SimpleNamespace(tie_word_embeddings=True) if tied else SimpleNamespace()
    engine.model_config = SimpleNamespace(hf_text_config=config)
    engine.finish_weight_update()
    assert packed == ["vLLM's own", engine.model[1]][: 1 + tied]


def test_registering_twice_changes_nothing() -> None:
    factory = WeightTransferEngineFactory
    before = factory._registry["gloo"]
    backends.register()
    assert factory._registry["gloo"] is before
    assert before() is gloo.GlooWeightTransferEngine

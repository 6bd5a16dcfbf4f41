"""What can be checked of the gloo backend without an engine; these import vLLM (5 s)."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from distill_system.errors import TransferError
from distill_system.weights.transport import broadcast_buckets, check_seal, send_seal

pytest.importorskip("vllm")
from distill_system.weights import backends, gloo

CPU = torch.device("cpu")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _exchange(corrupt: Any, *, receivers: int = 2) -> list[Any]:
    """Three buckets from rank 0 to the others; corrupt(at, bucket) is what travels instead."""
    port = _free_port()
    sent = [torch.arange(size, dtype=torch.uint8) for size in (70_000, 16_384, 9)]

    def run(rank: int) -> Any:
        group = gloo.GlooCommunicator(
            address="127.0.0.1",
            port=port,
            rank=rank,
            world_size=1 + receivers,
            timeout_seconds=20.0,
        )
        if rank == 0:
            honest, count = group.broadcast, iter(range(100))
            group.broadcast = lambda tensor, src: honest(corrupt(next(count), tensor), src)
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
        return list(executor.map(run, range(1 + receivers)))[1:]


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
        assert "nothing was loaded" in str(seen)


def test_a_receiver_that_never_joins_is_not_waited_for_longer_than_asked() -> None:
    begin = time.perf_counter()
    with pytest.raises(RuntimeError):
        gloo.GlooCommunicator(
            address="127.0.0.1", port=_free_port(), rank=0, world_size=2, timeout_seconds=1.0
        )
    assert time.perf_counter() - begin < 10.0


def test_registering_twice_changes_nothing() -> None:
    factory = backends.WeightTransferEngineFactory
    before = factory._registry["gloo"]
    backends.register()
    assert factory._registry["gloo"] is before
    assert before() is gloo.GlooWeightTransferEngine

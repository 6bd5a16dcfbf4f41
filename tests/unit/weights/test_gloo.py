"""What can be checked of the gloo backend without an engine; these import vLLM (5 s)."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

gloo = pytest.importorskip("distill_system.weights.gloo", exc_type=ImportError)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@settings(deadline=None, max_examples=50)
@pytest.mark.filterwarnings("ignore:Tensor .* exceeds buffer_size_bytes")
@given(sizes=st.lists(st.integers(1, 60), max_size=12), buffer_bytes=st.integers(1, 300))
def test_receivers_cut_the_stream_where_vllm_packs_it(sizes: list[int], buffer_bytes: int) -> None:
    tensors = [(f"w{at}", torch.zeros(size)) for at, size in enumerate(sizes)]
    update_info = gloo.NCCLWeightTransferUpdateInfo(
        names=[name for name, _ in tensors],
        dtype_names=["float32"] * len(tensors),
        shapes=[list(tensor.shape) for _, tensor in tensors],
    )
    packed, stream = [], iter(tensors)
    while chunk := gloo.pack_tensors(stream, lambda pair: pair[1], buffer_bytes):
        packed.append(chunk.names)
    planned = [
        [meta.name for meta in chunk] for chunk in gloo.plan_chunks(update_info, buffer_bytes)
    ]
    assert planned == packed


def test_a_broadcast_reaches_every_rank() -> None:
    port = _free_port()

    def run(rank: int) -> list[int]:
        communicator = gloo.GlooCommunicator(
            address="127.0.0.1", port=port, rank=rank, world_size=3, timeout_seconds=20.0
        )
        tensor = torch.arange(4) if rank == 0 else torch.zeros(4, dtype=torch.int64)
        communicator.broadcast(tensor, src=0)
        return tensor.tolist()

    with ThreadPoolExecutor(3) as executor:
        assert list(executor.map(run, range(3))) == [[0, 1, 2, 3]] * 3


def test_a_receiver_that_never_joins_is_not_waited_for_longer_than_asked() -> None:
    begin = time.perf_counter()
    with pytest.raises(RuntimeError):
        gloo.GlooCommunicator(
            address="127.0.0.1", port=_free_port(), rank=0, world_size=2, timeout_seconds=1.0
        )
    assert time.perf_counter() - begin < 10.0


def test_registering_twice_changes_nothing() -> None:
    factory = gloo.WeightTransferEngineFactory
    before = factory._registry["gloo"]
    gloo.register()
    assert factory._registry["gloo"] is before
    assert before() is gloo.GlooWeightTransferEngine

"""The receiving end inside a vLLM worker, without an engine; importing it takes vLLM's 5 s."""

import threading
import time
import weakref
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distill_system.errors import DeadlineError, TransferError

pytest.importorskip("vllm")
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)

from distill_system.weights.abort import aborted_after
from distill_system.weights.buckets import Buckets, ParameterMetadata, read_parameters
from distill_system.weights.digest import Digest
from distill_system.weights.sealed import ReceivesWeights, SealedWeightTransferEngine
from distill_system.weights.transport import Seal, broadcast_buckets

WEIGHTS = {"embed": torch.arange(12.0).view(3, 4), "bias": torch.tensor([-1.0, 2.0])}
UPDATE = NCCLWeightTransferUpdateInfo(
    names=list(WEIGHTS), dtype_names=["float32", "float32"], shapes=[[3, 4], [2]]
)
PARAMETERS = read_parameters(asdict(UPDATE))
CPU = torch.device("cpu")
BUCKET_BYTES = 48
"""Of a bucket: `embed` fills the first, `bias` travels in the second."""


class Sender:
    """Both ends' communicator: the sender's copies in, one broadcast after the other out."""

    def __init__(self, events: list[str], *, digest_is_off_by: int = 0) -> None:
        self.events = events
        parameters = [
            SimpleNamespace(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape))
            for name, tensor in WEIGHTS.items()
        ]
        buckets = Buckets(parameters, bucket_bytes=BUCKET_BYTES, device=torch.device("cpu"))
        buckets.fill(WEIGHTS.items())
        self.seal = broadcast_buckets(
            SimpleNamespace(broadcast=lambda tensor, src: None), buckets.buffers
        )
        told = torch.tensor([self.seal.num_bytes, self.seal.digest + digest_is_off_by])
        self.travelling = [*buckets.buffers, told]

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        assert src == 0
        self.events.append("broadcast")
        tensor.copy_(self.travelling.pop(0))


class Model:
    def __init__(self, events: list[str]) -> None:
        self.events = events
        self.loaded: dict[str, torch.Tensor] = {}

    def load_weights(self, named: list[tuple[str, torch.Tensor]]) -> None:
        self.events.append("load")
        self.loaded |= {name: tensor.clone() for name, tensor in named}


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happened to the engine, in order; vLLM's own part of it is only noted."""
    seen: list[str] = []
    base = NCCLWeightTransferEngine
    monkeypatch.setattr(base, "start_weight_update", lambda self: seen.append("give up old"))
    monkeypatch.setattr(base, "finish_weight_update", lambda self: seen.append("end"))
    monkeypatch.setattr(base, "shutdown", lambda self: seen.append("leave"))
    return seen


class Streamed(SealedWeightTransferEngine):
    """Loads as a GPU's does, on the CPU."""

    is_staged = False


def _receiver(
    group: Any, model: Any, kind: type[SealedWeightTransferEngine] = SealedWeightTransferEngine
) -> SealedWeightTransferEngine:
    engine = object.__new__(kind)  # vLLM's constructor wants a whole engine
    engine.device, engine.model, engine.model_update_group = "cpu", model, group
    engine.packed_buffer_size_bytes = BUCKET_BYTES
    engine.timeout_seconds = 30.0
    return engine


def test_the_old_weights_are_given_up_only_once_all_the_new_ones_are_verified(
    events: list[str],
) -> None:
    model, sender = Model(events), Sender(events)
    engine = _receiver(sender, model)
    engine.start_weight_update()
    engine.receive_weights(UPDATE)
    assert events == ["broadcast"] * 3 + ["give up old"] + ["load"] * 2
    assert list(model.loaded) == list(WEIGHTS)
    assert all(torch.equal(model.loaded[name], WEIGHTS[name]) for name in WEIGHTS)
    said: Any = SimpleNamespace(weight_transfer_engine=engine)
    assert ReceivesWeights.received_seal(said) == (56, sender.seal.digest)


def test_a_wrong_digest_is_refused_before_loading(events: list[str]) -> None:
    model = Model(events)
    engine = _receiver(Sender(events, digest_is_off_by=1), model)
    with pytest.raises(TransferError, match="did not arrive as they were sent"):
        engine.receive_weights(UPDATE)
    assert model.loaded == {}
    assert events == ["broadcast"] * 3, "the old weights stay, and so does the group"


def test_a_transfer_that_breaks_off_leaves_the_group_and_the_old_weights(
    events: list[str],
) -> None:
    class Gone:
        def broadcast(self, tensor: torch.Tensor, src: int) -> None:
            raise RuntimeError("connection closed by peer")

    with pytest.raises(RuntimeError, match="connection closed by peer"):
        _receiver(Gone(), Model(events)).receive_weights(UPDATE)
    assert events == ["leave"]


class Hangs(Sender):
    """NCCL's communicator, whose sender stops after a bucket: calls wait until it is aborted, and
    return as if all had come."""

    def __init__(self, events: list[str]) -> None:
        super().__init__(events)
        self.aborted = threading.Event()

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        if len(self.travelling) > 2:
            super().broadcast(tensor, src)
        else:
            assert self.aborted.wait(20.0), "nobody aborts what waits without end"

    def destroy(self) -> None:
        self.aborted.set()
        time.sleep(0.2)  # NCCL still frees memory when its waiters have returned
        self.events.append("abort")


@pytest.mark.parametrize("kind", [SealedWeightTransferEngine, Streamed])
def test_a_sender_that_hangs_is_given_up_at_the_deadline(
    events: list[str], kind: type[SealedWeightTransferEngine]
) -> None:
    engine = _receiver(Hangs(events), Model(events), kind)
    engine.timeout_seconds = 0.2
    with pytest.raises(DeadlineError, match=r"within 0.2 s, a peer did not take part"):
        engine.receive_weights(UPDATE)
    assert events.count("abort") == 1
    assert events[-1] == "leave"
    assert engine.is_whole == engine.is_staged, "what was loaded of it is no model"


def test_a_transfer_in_time_is_not_aborted(events: list[str]) -> None:
    sender = Hangs(events)
    with aborted_after(0.2, sender):
        pass
    assert not sender.aborted.wait(0.4)
    with pytest.raises(ZeroDivisionError), aborted_after(0.2, sender):
        raise ZeroDivisionError


def test_where_two_models_do_not_fit_a_bucket_is_loaded_while_the_next_one_comes(
    events: list[str],
) -> None:
    model, sender = Model(events), Sender(events)
    engine = _receiver(sender, model, Streamed)
    engine.start_weight_update()
    engine.receive_weights(UPDATE)
    assert events == ["give up old", "broadcast", "broadcast", "load", "load", "broadcast"]
    assert not engine.is_whole
    engine.finish_weight_update()
    assert engine.is_whole
    assert all(torch.equal(model.loaded[name], WEIGHTS[name]) for name in WEIGHTS)
    said: Any = SimpleNamespace(weight_transfer_engine=engine)
    assert ReceivesWeights.received_seal(said) == (56, sender.seal.digest)


@pytest.mark.parametrize("fails", ["a wrong digest", "the peer goes"])
def test_a_streamed_transfer_that_fails_leaves_no_whole_weights_until_another_has_come(
    events: list[str], fails: str
) -> None:
    model, sender = Model(events), Sender(events, digest_is_off_by=1)
    if fails == "the peer goes":
        del sender.travelling[2:]  # both buckets have come, their seal does not
    engine = _receiver(sender, model, Streamed)
    engine.start_weight_update()
    with pytest.raises((TransferError, IndexError)):
        engine.receive_weights(UPDATE)
    assert model.loaded
    assert not engine.is_whole
    events.clear()
    engine.model_update_group = Sender(events)
    engine.start_weight_update()
    engine.receive_weights(UPDATE)
    assert events[:2] == ["end", "give up old"], "vLLM would add to what the first has brought"
    assert not engine.is_whole
    engine.finish_weight_update()
    assert engine.is_whole
    assert all(torch.equal(model.loaded[name], WEIGHTS[name]) for name in WEIGHTS)


class Room(TorchDispatchMode):
    """Bytes that torch.empty has given out and nobody has given back, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.empty.memory_format:
            size = made.untyped_storage().nbytes()
            self.held += size
            self.most = max(self.most, self.held)
            weakref.finalize(made.untyped_storage(), self.give_back, size)
        return made

    def give_back(self, size: int) -> None:
        self.held -= size


@pytest.mark.parametrize(("kind", "buckets"), [(SealedWeightTransferEngine, 20), (Streamed, 2)])
def test_a_streaming_receiver_holds_two_buckets_and_a_staging_one_the_model(
    events: list[str], kind: type[SealedWeightTransferEngine], buckets: int
) -> None:
    bucket_bytes = 4096
    names = [f"w{index}" for index in range(40)]
    update = NCCLWeightTransferUpdateInfo(
        names=names, dtype_names=["float32"] * 40, shapes=[[512]] * 40
    )
    sums: list[float] = []

    class Silent:
        """Sends bucket after bucket, each of its own number, and the seal of what it sent."""

        def __init__(self) -> None:
            self.digest, self.sent = Digest(), 0

        def broadcast(self, tensor: torch.Tensor, src: int) -> None:
            if tensor.dtype is torch.int64:
                tensor.copy_(torch.tensor([self.digest.num_bytes, self.digest.value]))
                return
            tensor.view(torch.float32).fill_(self.sent)
            self.sent += 1
            self.digest.add(tensor)

    model = SimpleNamespace(
        load_weights=lambda named: sums.extend(float(tensor.sum()) for _, tensor in named)
    )
    engine = _receiver(Silent(), model, kind)
    engine.packed_buffer_size_bytes = bucket_bytes
    with Room() as room:
        engine.receive_weights(update)
    assert sums == [512.0 * (index // 2) for index in range(40)]
    assert buckets * bucket_bytes <= room.most < (buckets + 0.5) * bucket_bytes


def test_weights_before_a_group_are_refused(events: list[str]) -> None:
    with pytest.raises(TransferError, match="before this worker joined a transfer group"):
        _receiver(None, Model(events)).receive_weights(UPDATE)
    assert events == []


def test_the_memory_of_one_version_takes_the_next_and_no_other_shape(events: list[str]) -> None:
    def sizes(parameters: list[ParameterMetadata], bucket_bytes: int = BUCKET_BYTES) -> list[int]:
        buckets = engine.sealed.allocate(parameters, bucket_bytes=bucket_bytes, device=CPU)
        return [buffer.numel() for buffer in buckets.buffers]

    engine = _receiver(Sender(events), Model(events))
    engine.receive_weights(UPDATE)
    first = engine.sealed.allocate(PARAMETERS, bucket_bytes=BUCKET_BYTES, device=CPU).buffers
    engine.model_update_group = Sender(events)
    engine.receive_weights(UPDATE)
    again = engine.sealed.allocate(PARAMETERS, bucket_bytes=BUCKET_BYTES, device=CPU).buffers
    assert [buffer.data_ptr() for buffer in again] == [buffer.data_ptr() for buffer in first]
    assert sizes([ParameterMetadata("embed", torch.float16, (4, 3))]) == [24]
    assert sizes(PARAMETERS, 8) == [48, 8]
    assert sizes(PARAMETERS, 1 << 20) == [56]


def test_a_seal_reads_as_a_person_would_compare_two() -> None:
    assert str(Seal(56, 0xAB)) == "56 bytes with digest 000000000000ab"

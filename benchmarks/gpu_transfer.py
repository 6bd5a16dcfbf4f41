"""The publisher on a GPU, with stand-ins for vLLM's transfer classes and for NCCL.

The stand-in communicator copies on the current stream, which is where NCCL would read and write: a
bucket that is filled too late, or overwritten too early, arrives wrong here as it would there.
"""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from gpu_findings import GIB, MIB, Findings
from torch import Tensor, nn

from distill_system.weights.digest import Digest
from distill_system.weights.publisher import WeightPublisher
from distill_system.weights.rounding import AS_THEY_ARE, WireFormat
from distill_system.weights.sender import GlooSender

BUSY_MILLISECONDS = 400
CYCLES_PER_MILLISECOND = 1_800_000


@dataclass
class TrainerInitInfo:
    """As vLLM's NCCLTrainerInitInfo."""

    master_address: str
    master_port: int
    world_size: int
    rank: int
    packed_buffer_size_bytes: int


class Communicator:
    """Where NCCL would send, the tensor is copied to one receiver's memory, on this stream."""

    def __init__(self) -> None:
        self.received: list[Tensor] = []

    def broadcast(self, tensor: Tensor, src: int) -> None:
        assert src == 0, "rank 0 sends"
        self.received.append(tensor.clone())

    def destroy(self) -> None:
        self.received = []


class Engine:
    """As vLLM's trainer engine, and our sender over gloo: it has opened the group."""

    def __init__(self) -> None:
        self.model_update_group: Communicator | None = Communicator()

    def shutdown(self) -> None:
        self.model_update_group = None


class Client:
    """Rollout workers that say yes to everything."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        raise AssertionError("the stand-in engine opens no group")

    def start_receiving(self, version: int, update_info: dict[str, Any]) -> list[Any]:
        return [version]


@contextmanager
def stand_in_for_vllm() -> Iterator[None]:
    """The modules of vLLM that the publisher imports for NCCL; on a CPU our sender over gloo."""
    package = "vllm.distributed.weight_transfer"
    names = ["vllm", "vllm.distributed", package, f"{package}.factory", f"{package}.nccl_engine"]
    modules: dict[str, Any] = {name: types.ModuleType(name) for name in names}
    modules[f"{package}.nccl_engine"].NCCLTrainerInitInfo = TrainerInitInfo
    factory = types.SimpleNamespace(trainer_init=lambda info, *, client, source: Engine())
    modules[f"{package}.factory"].WeightTransferTrainerFactory = factory
    opening = patch.object(GlooSender, "open", lambda **addresses: Engine())
    with patch.dict(sys.modules, modules), opening:
        yield


def prove_publisher(findings: Findings) -> None:
    """Parameters that change right after start() arrive as they were, and the digests agree."""
    model = _build_model(findings)
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    findings.note("model_gib", num_bytes / GIB)
    with stand_in_for_vllm():
        publisher = _build_publisher(findings, model, AS_THEY_ARE)
        with findings.part("old bytes arrive"):
            prove_old_bytes(findings, publisher, model)
        with findings.part("speed"):
            _time_publish(findings, publisher, num_bytes)
        with findings.part("beside the learner"):
            _publish_beside_work(findings, publisher)
        publisher.close()
        with findings.part("rounded to bfloat16"):
            _time_rounding(findings, model)


def _build_publisher(findings: Findings, model: nn.Module, wire: WireFormat) -> WeightPublisher:
    return WeightPublisher(
        model,
        backend="nccl" if findings.on_gpu else "gloo",
        client=Client(),
        master_address="127.0.0.1",
        master_port=1,
        num_receivers=1,
        rank=0,
        timeout_seconds=60.0,
        wire=wire,
    )


def _build_model(findings: Findings) -> nn.Module:
    """4 GiB of matrices of odd sizes, so that no bucket ends where a parameter does."""
    rows, columns, count = (37, 13, 9) if findings.small else (4099, 8191, 32)
    with findings.device:
        matrices = [torch.randn(rows, columns) for _ in range(count)]
    return nn.ParameterList([nn.Parameter(matrix) for matrix in matrices])


def _keep_busy(findings: Findings) -> None:
    """A kernel that runs for a while on the current stream."""
    if findings.on_gpu:
        torch.cuda._sleep(BUSY_MILLISECONDS * CYCLES_PER_MILLISECOND)


def prove_old_bytes(findings: Findings, publisher: WeightPublisher, model: nn.Module) -> None:
    """Twice: the first publish makes the buckets, the second uses them again."""
    for version in (1, 2):
        communicator = publisher._engine.model_update_group
        communicator.received.clear()
        old = [torch.randn_like(p) for p in model.parameters()]
        findings.synchronise()
        _keep_busy(findings)
        with torch.no_grad():
            for parameter, values in zip(model.parameters(), old, strict=True):
                parameter.copy_(values)  # runs after the long kernel, as an optimizer's step
        started = time.perf_counter()
        publisher.start(version)
        seconds = time.perf_counter() - started
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float(version))  # the next step
        seal = publisher._sending.result(timeout=60)
        findings.synchronise()
        findings.note(f"start_{version}_seconds_behind_a_long_kernel", seconds)
        *buckets, numbers = communicator.received
        expected = (each.view(-1).view(torch.uint8) for each in old)
        sent = torch.cat([bucket.view(-1) for bucket in buckets])
        same = torch.equal(sent, torch.cat(list(expected)))
        findings.require(f"version {version}: the old bytes arrive", same)
        digest = Digest()
        for bucket in buckets:
            digest.add(bucket.clone())
        findings.require(
            f"version {version}: the receiver's digest is the sender's",
            [digest.num_bytes, digest.value] == numbers.tolist() == [seal.num_bytes, seal.digest],
        )
        communicator.received.clear()


def _time_publish(findings: Findings, publisher: WeightPublisher, num_bytes: int) -> None:
    """Seconds of packing and of sending, and what a plain pinned copy of as many bytes takes."""
    packing, sending = [], []
    group = publisher._engine.model_update_group
    with patch.object(group, "broadcast", lambda tensor, src: None):
        for version in (3, 4, 5):
            findings.synchronise()
            if findings.on_gpu:
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
            started = time.perf_counter()
            publisher.start(version)
            packed = time.perf_counter()
            publisher._sending.result(timeout=60)
            packing.append(packed - started)
            sending.append(time.perf_counter() - packed)
        if findings.on_gpu:
            peak = (torch.cuda.max_memory_allocated() - held) / MIB
            findings.note("peak_mib_above_the_model", peak)
            largest = max(map(len, publisher._buckets.buffers)) / MIB
            what = "memory of a publish on the GPU, over its largest bucket"
            findings.demand(what, peak / largest, at_most=4.5)
    gib = num_bytes / GIB
    row = {
        "pack_seconds": min(packing),
        "pack_gib_per_second": gib / min(packing),
        "send_and_digest_seconds": min(sending),
        "send_and_digest_gib_per_second": gib / min(sending),
    }
    findings.note("publish", row | _time_plain_copies(findings))


def _time_rounding(findings: Findings, model: nn.Module) -> None:
    """Seconds of packing where bfloat16 is sent: rounded to the nearest, and stochastically."""
    row = {}
    for name, seed in (("nearest", None), ("stochastic", 0)):
        wire = WireFormat(dtype=torch.bfloat16, seed=seed)
        publisher = _build_publisher(findings, model, wire)
        seconds = []
        for version in (1, 2, 3):
            findings.synchronise()
            started = time.perf_counter()
            publisher.start(version)
            seconds.append(time.perf_counter() - started)
            publisher._sending.result(timeout=60)
        row[f"pack_{name}_seconds"] = min(seconds)
        publisher.close()
    findings.note("rounded_to_bfloat16", row)


def _time_plain_copies(findings: Findings) -> dict[str, float]:
    """GiB per second of one large copy each way, pinned and pageable, and of the digest."""
    size = (1 << 20) if findings.small else (1 << 30)
    there = torch.zeros(size, dtype=torch.uint8, device=findings.device)
    row = {}
    for kind in ("pinned", "pageable"):
        pinned = kind == "pinned" and findings.on_gpu
        here = torch.zeros(size, dtype=torch.uint8, pin_memory=pinned)
        for way, target, source in (("to_host", here, there), ("to_device", there, here)):
            copy = lambda t=target, s=source: t.copy_(s, non_blocking=True)  # noqa: E731
            seconds = findings.time(copy, repeats=3) / 1e3
            row[f"{kind}_{way}_gib_per_second"] = size / GIB / seconds
    seconds = findings.time(lambda: Digest().add(there), repeats=3) / 1e3
    return row | {"digest_gib_per_second": size / GIB / seconds}


def _publish_beside_work(findings: Findings, publisher: WeightPublisher) -> None:
    """What a publish costs products on the learner's stream while it is sent."""
    size = 128 if findings.small else 8192
    left = torch.randn(size, size, device=findings.device, dtype=torch.bfloat16)

    def work() -> None:
        for _ in range(20):
            left @ left

    alone = findings.time(work, repeats=3)
    started = time.perf_counter()
    publisher.start(6)
    packed = time.perf_counter() - started
    beside = findings.time(work, repeats=1, warm_up=0)
    still_sending = not publisher._sending.done()
    publisher._sending.result(timeout=60)
    row = {
        "work_alone_ms": alone,
        "work_beside_sending_ms": beside,
        "sending_outlasted_work": still_sending,
        "start_seconds": packed,
    }
    findings.note("beside_the_learner", row)

"""The learner's side of weight transfer: a model's parameters in, a version in every worker out.

A publish has three parts:

    pack    all ranks gather the sharded parameters; rank 0 rounds them to the engines' precision,
            into buckets in CPU memory
    call    rank 0 asks every rollout worker to receive
    send    a thread of rank 0 broadcasts the buckets, then their seal

After the call the learner goes on: the next optimizer step changes the parameters, not the buckets.
Over NCCL vLLM's trainer engine opens the transfer group, and vLLM is imported when a publisher is
made; over gloo torch alone does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from distill_system.errors import TransferError
from distill_system.weights.abort import aborted_after
from distill_system.weights.buckets import (
    Buckets,
    ParameterMetadata,
    ParameterShape,
    describe_parameters,
)
from distill_system.weights.client import WeightSyncClient
from distill_system.weights.rounding import AS_THEY_ARE, WireFormat
from distill_system.weights.sender import GlooSender
from distill_system.weights.transport import (
    Seal,
    broadcast_buckets,
    run_in_background,
    send_seal,
)
from distill_system.workers import Reference

BUCKET_BYTES = 32 << 20
"""Bytes of one broadcast: small enough that digesting one bucket overlaps sending the next."""

CLOSE_SECONDS = 5.0
"""How long close() waits for a send that is under way; a peer may hang."""


class WeightTensors(Protocol):
    """Tensors to send that are computed from the parameters, such as merged adapters."""

    def metadata(self) -> Sequence[ParameterShape]:
        """Name, dtype and whole shape of each tensor, in order, without gathering any."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and whole tensor of each. Gathering is collective: every rank iterates over all."""


class _ModuleTensors:
    """A module's own parameters as WeightTensors; tied ones once, sharded ones gathered."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def metadata(self) -> list[ParameterMetadata]:
        return [
            ParameterMetadata(name, parameter.dtype, tuple(parameter.shape))
            for name, parameter in self._module.named_parameters()
        ]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._module.named_parameters():
            tensor: torch.Tensor = parameter
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class WeightPublisher:
    """Sends a model's parameters to every rollout worker.

    Every learner rank makes one, with the same arguments but `rank`. Rank 0 sends; the others take
    part in gathering sharded parameters. Rank 0 keeps a copy of the model in CPU memory (pinned if
    the parameters are on a GPU) until it is closed.

    weights: what to send, under the names and in the shapes of the model's Hugging Face checkpoint:
        the bare model without any wrapper, or a source of such tensors.
    client: calls every worker; used by rank 0 only.
    master_address, master_port: where rank 0 listens for the workers; the port must be free.
    num_receivers: rollout workers x their tensor-parallel size.
    timeout_seconds: how long the workers may take to join, and each transfer.
    wire: the precision in which weights are sent.

    Blocks until every worker has joined.  Raises: TransferError.
    """

    def __init__(
        self,
        weights: nn.Module | WeightTensors,
        *,
        backend: Literal["gloo", "nccl"],
        client: WeightSyncClient,
        master_address: str,
        master_port: int,
        num_receivers: int,
        rank: int,
        timeout_seconds: float,
        wire: WireFormat = AS_THEY_ARE,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self._client = client
        self._is_sender = rank == 0
        self._num_receivers = num_receivers
        self._wire = wire
        self._bucket_bytes = bucket_bytes
        self._timeout_seconds = timeout_seconds
        self._device = torch.device("cuda" if backend == "nccl" else "cpu")
        self._source = _ModuleTensors(weights) if isinstance(weights, nn.Module) else weights
        self._buckets: Buckets | None = None
        self._sending: Future[Seal] | None = None
        self._stream: Any = None
        with self._failing_as(f"connecting the learner to rollout workers over {backend}"):
            if backend == "nccl":
                self._engine: Any = self._open_nccl(master_address, master_port, rank)
            elif self._is_sender:
                self._engine = GlooSender.open(
                    client=client,
                    address=master_address,
                    port=master_port,
                    world_size=1 + num_receivers,
                    bucket_bytes=bucket_bytes,
                    # Shorter than the wait for the workers' answers: those that wait for one that
                    # hangs say so in time, and the one that says nothing is it.
                    timeout_seconds=timeout_seconds,
                )
            else:
                self._engine = GlooSender()

    def _open_nccl(self, address: str, port: int, rank: int) -> Any:  # vllm's trainer engine
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        return WeightTransferTrainerFactory.trainer_init(
            NCCLTrainerInitInfo(
                master_address=address,
                master_port=port,
                world_size=1 + self._num_receivers,
                rank=rank,
                packed_buffer_size_bytes=self._bucket_bytes,
            ),
            client=_TellsDeadline(self._client, self._timeout_seconds),
            source=self._source,
        )

    def start(self, version: int) -> list[Reference]:
        """Pack the parameters as they are now, and begin to send them as `version`.

        Collective: every rank calls it. Returns once the parameters may change again. On rank 0 it
        returns a reference per worker, done when that worker generates with the version; on other
        ranks an empty list. If an earlier version is still being sent, this waits for it first.

        Raises: TransferError, also for an earlier version whose sending failed.
        """
        with self._failing_as(f"publishing weight version {version}"), torch.no_grad():
            if self._sending is not None:
                self._sending.result()
            if not self._is_sender:
                for _ in self._source:  # gathering is collective: iterating takes part in it
                    pass
                # Rank 0 must have read everything it gathers from this rank.
                if torch.cuda.is_available():
                    torch.cuda.current_stream().synchronize()
                return []
            self._pack(version)
            described = describe_parameters(self._sent_metadata())
            references = self._client.start_receiving(version, described)
            self._sending = run_in_background(self._send)
            return references

    def close(self) -> None:
        """Leave the group; a send that is under way gets CLOSE_SECONDS to finish."""
        if self._sending is not None:
            wait([self._sending], timeout=CLOSE_SECONDS)
            self._sending = None
        self._engine.shutdown()

    def _pack(self, version: int) -> None:
        if self._buckets is None:
            self._buckets = Buckets(
                self._sent_metadata(),
                bucket_bytes=self._bucket_bytes,
                device=torch.device("cpu"),
                pinned=self._device.type == "cuda",
            )
        whole = _check_each(self._source, self._source.metadata())
        self._buckets.fill(self._wire.convert(whole, version=version))

    def _sent_metadata(self) -> list[ParameterMetadata]:
        """The source's metadata in the precision in which its tensors are sent."""
        return [
            ParameterMetadata(each.name, self._wire.sent_dtype(each.dtype), each.shape)
            for each in self._source.metadata()
        ]

    def _send(self) -> Seal:
        assert self._buckets is not None, "packed before it is sent"
        communicator = self._engine.model_update_group
        if communicator is None:
            raise TransferError("the transfer group is closed")
        try:
            with self._deadline(communicator), self._beside_the_learner():
                buffers = (b.to(self._device, non_blocking=True) for b in self._buckets.buffers)
                seal = broadcast_buckets(communicator, buffers)
                send_seal(communicator, seal, self._device)
        except Exception:
            self._engine.shutdown()  # closes the connections: receivers fail instead of waiting
            raise
        return seal

    def _deadline(self, communicator: Any) -> AbstractContextManager[None]:
        """Of a send; each call of gloo has its own."""
        if self._device.type != "cuda":
            return contextlib.nullcontext()
        return aborted_after(self._timeout_seconds, communicator)

    @contextlib.contextmanager
    def _beside_the_learner(self) -> Iterator[None]:
        """On a GPU, run the block on a stream of its own: the learner computes on the default."""
        if self._device.type != "cuda":
            yield
            return
        self._stream = self._stream or torch.cuda.Stream()
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    @contextlib.contextmanager
    def _failing_as(self, doing: str) -> Iterator[None]:
        """Turn whatever torch, vLLM or the transport raises into a TransferError."""
        try:
            yield
        except Exception as error:
            raise TransferError(
                f"{doing} failed ({self._num_receivers} receivers): {error!r}. Look for a rollout "
                "worker that died; after it is restarted, connect and publish again"
            ) from error


class _TellsDeadline:
    """What vLLM's trainer engine asks of the workers, with the deadline of ours beside it."""

    def __init__(self, client: WeightSyncClient, timeout_seconds: float) -> None:
        self._client = client
        self._timeout_seconds = timeout_seconds

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        timed = {**init_info, "timeout_seconds": self._timeout_seconds}
        self._client.init_weight_transfer_engine(timed)


def _check_each(
    tensors: WeightTensors, metadata: Sequence[ParameterShape]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors, each held against what receivers are told of it.

    Raises: ValueError at the first that differs: the two sides would cut one stream of bytes
    differently.
    """
    coming = iter(tensors)
    for expected in metadata:
        name, tensor = next(coming, ("nothing", torch.empty(0)))
        got = (name, tensor.dtype, tuple(tensor.shape))
        told = (expected.name, expected.dtype, tuple(expected.shape))
        if got != told:
            raise ValueError(f"the weights to send: receivers were told {told}, got {got}")
        yield name, tensor
    for name, _ in coming:
        raise ValueError(f"the weights to send: receivers were told of none behind, got {name!r}")

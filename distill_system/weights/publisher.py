"""The learner's side of weight transfer: parameters in, a version in every rollout worker out.

Gathered before sent: all ranks go through the parameters and rank 0 packs them into buckets, which
the next optimizer step cannot touch; then the workers are called, and a thread sends. The group is
opened by vLLM's own trainer engines; vLLM is imported when a publisher is made, not when this
module is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, wait
from typing import Any, Literal, Protocol

import torch
from torch import nn

from distill_system.errors import TransferError
from distill_system.weights.buckets import Buckets
from distill_system.weights.client import WeightSyncClient
from distill_system.weights.transport import (
    Seal,
    broadcast_buckets,
    run_in_background,
    send_seal,
)
from distill_system.workers import Reference

BUCKET_BYTES = 32 << 20
"""Bytes broadcast at once: small enough that summing one hides behind sending the next."""

CLOSE_SECONDS = 5.0
"""So long a group that is left may go on sending; a peer that hangs is then left to itself."""


class WeightTensors(Protocol):
    """Tensors to send that are not a module's parameters as they stand."""

    def metadata(self) -> list[Any]:
        """vLLM's ParamMeta of each, in order, without gathering any."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and whole tensor of each; every rank goes through all of them."""


class WeightPublisher:
    """Sends a model's parameters to every rollout worker.

    Made on every learner rank, with the same arguments but rank; rank 0 sends, the others join in
    gathering sharded parameters. Rank 0 keeps one copy of what it sends in CPU memory (pinned where
    the parameters are on a GPU) until it is closed.

    weights: what to send, under the names and in the shapes of the model's Hugging Face checkpoint:
        the bare model, not a wrapper of it, or a source of such tensors.
    client: reaches every worker; only rank 0 calls it.
    master_address, master_port: where rank 0 listens for the workers; the port must be free.
    num_receivers: rollout workers x their tensor-parallel size.
    timeout_seconds: for the workers to join. A broadcast is given up after twice as long (gloo;
        NCCL has its own): whoever waits for the workers is to say first which of them is late.

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
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        from vllm.distributed.weight_transfer import ModuleSource
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        self._client = client
        self._is_sender = rank == 0
        self._num_receivers = num_receivers
        self._bucket_bytes = bucket_bytes
        self._device = torch.device("cuda" if backend == "nccl" else "cpu")
        self._source = ModuleSource(weights) if isinstance(weights, nn.Module) else weights
        self._buckets: Buckets | None = None
        self._sending: Future[Seal] | None = None
        self._stream: Any = None
        fields: dict[str, Any] = {
            "master_address": master_address,
            "master_port": master_port,
            "world_size": 1 + num_receivers,
            "rank": rank,
            "packed_buffer_size_bytes": bucket_bytes,
        }
        if backend == "gloo":
            fields["timeout_seconds"] = 2 * timeout_seconds
        with self._failing_as(f"connecting the learner to rollout workers over {backend}"):
            self._engine: Any = WeightTransferTrainerFactory.trainer_init(
                _init_info_class(backend)(**fields), client=client, source=self._source
            )

    def start(self, version: int) -> list[Reference]:
        """Pack the parameters as they are now, and begin to send them as `version`.

        Collective: every rank calls it. Returns once the parameters may change again; on rank 0
        with a reference per worker, done when that worker writes with the version; else none. What
        was being sent before is waited for.

        Raises: TransferError.
        """
        with self._failing_as(f"publishing weight version {version}"), torch.no_grad():
            if self._sending is not None:
                self._sending.result()
            if not self._is_sender:
                for _ in self._source:
                    pass
                self._engine._post_send_sync()  # what rank 0 gathers of this rank has been read
                return []
            self._pack()
            references = self._client.start_receiving(version, self._update_info())
            self._sending = run_in_background(self._send)
            return references

    def close(self) -> None:
        """Leave the group; what is being sent has a moment to arrive."""
        if self._sending is not None:
            wait([self._sending], timeout=CLOSE_SECONDS)
            self._sending = None
        self._engine.shutdown()

    def _pack(self) -> None:
        metadata = self._source.metadata()
        if self._buckets is None:
            self._buckets = Buckets(
                metadata,
                bucket_bytes=self._bucket_bytes,
                device=torch.device("cpu"),
                pinned=self._device.type == "cuda",
            )
        self._buckets.fill(self._engine._checked_iter(self._source, metadata))

    def _update_info(self) -> dict[str, Any]:
        """What vLLM's receiving ends are told: names, dtypes and shapes."""
        metadata = self._source.metadata()
        return {
            "names": [parameter.name for parameter in metadata],
            "dtype_names": [str(parameter.dtype).removeprefix("torch.") for parameter in metadata],
            "shapes": [list(parameter.shape) for parameter in metadata],
        }

    def _send(self) -> Seal:
        assert self._buckets is not None, "packed before it is sent"
        communicator = self._engine.model_update_group
        if communicator is None:
            raise TransferError("the transfer group is closed")
        try:
            with self._beside_the_learner():
                buffers = (b.to(self._device, non_blocking=True) for b in self._buckets.buffers)
                seal = broadcast_buckets(communicator, buffers)
                send_seal(communicator, seal, self._device)
        except Exception:
            self._engine.shutdown()  # whoever still waits for these bytes waits in vain
            raise
        return seal

    @contextlib.contextmanager
    def _beside_the_learner(self) -> Iterator[None]:
        """On a GPU, a stream of its own: the learner's kernels are on the default one."""
        if self._device.type != "cuda":
            yield
            return
        self._stream = self._stream or torch.cuda.Stream()
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    @contextlib.contextmanager
    def _failing_as(self, doing: str) -> Iterator[None]:
        """Whatever torch, vLLM or the transport raises, in this house's words."""
        try:
            yield
        except Exception as error:
            raise TransferError(
                f"{doing} failed with {self._num_receivers} receivers: {error!r}; look for a "
                "rollout worker that died, restart it, and connect and publish again"
            ) from error


def _init_info_class(backend: Literal["gloo", "nccl"]) -> Any:
    if backend == "gloo":
        import distill_system.weights.backends  # noqa: F401  (makes gloo known to vLLM)
        from distill_system.weights.gloo import GlooTrainerInitInfo

        return GlooTrainerInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    return NCCLTrainerInitInfo

"""The learner's side of weight transfer: parameters in, a version in every rollout worker out.

Both backends run vLLM's own trainer engine; `gloo` is ours, `nccl` is vLLM's. vLLM is imported
when a publisher is made, not when this module is.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import torch
from torch import nn

from distill_system.errors import TransferError
from distill_system.records import WeightVersion
from distill_system.weights.client import WeightSyncClient

# Bytes broadcast at once. vLLM's default of 1 GiB, twice, is memory that a small GPU lacks.
_BUFFER_BYTES = 256 << 20


class WeightTensors(Protocol):
    """Tensors to send that are not a module's parameters as they stand."""

    def metadata(self) -> list[Any]:
        """vLLM's ParamMeta of each, in order, without gathering any."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and whole tensor of each; every rank goes through all of them."""


class WeightPublisher:
    """Sends a model's parameters to every rollout worker.

    Made on every learner rank, with the same arguments but rank; rank 0 sends, the others join in
    gathering sharded parameters.

    weights: what to send, under the names and in the shapes of the model's Hugging Face checkpoint:
        the bare model, not a wrapper of it, or a source of such tensors.
    client: reaches every worker; only rank 0 calls it.
    master_address, master_port: where rank 0 listens for the workers; the port must be free.
    num_receivers: rollout workers x their tensor-parallel size.
    timeout_seconds: for the workers to join and for each broadcast (gloo; NCCL has its own).

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
        buffer_bytes: int = _BUFFER_BYTES,
    ) -> None:
        from vllm.distributed.weight_transfer import ModuleSource
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        self._client = client
        self._is_sender = rank == 0
        self._num_receivers = num_receivers
        self._source = ModuleSource(weights) if isinstance(weights, nn.Module) else weights
        fields: dict[str, Any] = {
            "master_address": master_address,
            "master_port": master_port,
            "world_size": 1 + num_receivers,
            "rank": rank,
            "packed_buffer_size_bytes": buffer_bytes,
        }
        if backend == "gloo":
            fields["timeout_seconds"] = timeout_seconds
        with self._failing_as(f"connecting the learner to rollout workers over {backend}"):
            self._engine: Any = WeightTransferTrainerFactory.trainer_init(
                _init_info_class(backend)(**fields), client=client, source=self._source
            )

    def publish(self, version: int) -> WeightVersion:
        """Send the parameters as they are now, and have every worker write with them as `version`.

        Collective: every rank calls it.  Raises: TransferError; the workers then refuse to
        generate until a later publish succeeds.
        """
        begin = time.perf_counter()
        with self._failing_as(f"publishing weight version {version}"), torch.no_grad():
            self._engine.send_weights()
            if self._is_sender:
                self._client.commit(version)
        return WeightVersion(
            version=version, num_bytes=self._num_bytes(), seconds=time.perf_counter() - begin
        )

    def close(self) -> None:
        """Leave the group."""
        self._engine.shutdown()

    def _num_bytes(self) -> int:
        parameters = self._source.metadata()
        return sum(math.prod(meta.shape) * meta.dtype.itemsize for meta in parameters)

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
        from distill_system.weights.gloo import GlooTrainerInitInfo

        return GlooTrainerInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    return NCCLTrainerInitInfo

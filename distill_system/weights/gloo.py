"""A gloo weight-transfer backend for vLLM: the path of its NCCL backend, on machines without GPUs.

vLLM's own NCCL classes are subclassed, and only what touches a GPU is replaced: the communicator
and the two loops that send and receive packed bytes. One thing is added: the sender ends each
transfer with the number of bytes and their CRC-32, and a receiver loads nothing before both agree,
because loading cannot be undone.

The learner's parameters in -> broadcast -> the parameters of every vLLM worker out.
Importing this module imports vLLM and registers the backend under the name "gloo".
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed import BroadcastOptions
from vllm.distributed.utils import stateless_init_torch_distributed_process_group
from vllm.distributed.weight_transfer.base import ParamMeta, VLLMWeightSyncClient, WeightSource
from vllm.distributed.weight_transfer.factory import (
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.nccl_common import (
    NCCLWeightTransferInitInfo,
    worker_init_payload,
)
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLTrainerWeightTransferEngine,
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.packed_tensor import pack_tensors, unpack_tensor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from distill_system.errors import TransferError

_SENDER = 0


class GlooCommunicator:
    """The part of vLLM's PyNcclCommunicator that weight transfer uses, over torch's gloo.

    A process group of its own, outside torch.distributed's default one, so that it neither needs
    nor disturbs the learner's. Rank 0 listens at address:port; every call gives up after
    timeout_seconds.
    """

    def __init__(
        self, *, address: str, port: int, rank: int, world_size: int, timeout_seconds: float
    ) -> None:
        self._group = stateless_init_torch_distributed_process_group(
            address, port, rank, world_size, "gloo", timeout=timedelta(seconds=timeout_seconds)
        )

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        """Send tensor from rank src, or receive into it; returns when that is done.

        Raises: RuntimeError if a peer is gone or the time is over; the group is then of no use.
        """
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        self._group.broadcast([tensor], options).wait()

    def destroy(self) -> None:
        """Close the connections."""
        self._group = None


@dataclass(kw_only=True)
class GlooWeightTransferInitInfo(NCCLWeightTransferInitInfo):  # type: ignore[misc]  # untyped base
    """What a receiver needs to join: vLLM's own fields and a deadline."""

    timeout_seconds: float


@dataclass
class GlooTrainerInitInfo(NCCLTrainerInitInfo):  # type: ignore[misc]  # untyped base
    """What the learner needs to open the group: vLLM's own fields and a deadline."""

    backend: ClassVar[str] = "gloo"

    timeout_seconds: float = 300.0


class GlooWeightTransferEngine(NCCLWeightTransferEngine):  # type: ignore[misc]  # untyped base
    """The receiving end, inside each vLLM worker."""

    init_info_cls = GlooWeightTransferInitInfo

    def init_transfer_engine(self, init_info: GlooWeightTransferInitInfo) -> None:
        """Join the sender's group; blocks until every receiver has joined."""
        parallel = self.parallel_config
        worker_rank = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self.packed_buffer_size_bytes = init_info.packed_buffer_size_bytes
        self.model_update_group = GlooCommunicator(
            address=init_info.master_address,
            port=init_info.master_port,
            rank=init_info.rank_offset + worker_rank,
            world_size=init_info.world_size,
            timeout_seconds=init_info.timeout_seconds,
        )

    def start_weight_update(self) -> None:
        """Nothing yet: vLLM drops the old weights here, which must outlive a failed transfer."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive and load; unlike the base class, without synchronising an accelerator."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Receive every byte, compare with the sender's checksum, and only then load.

        Raises: TransferError if the bytes are not those that were sent; the old weights stay.
        """
        if self.model_update_group is None:
            raise TransferError("weights were sent before this worker joined a transfer group")
        chunks = list(plan_chunks(update_info, self.packed_buffer_size_bytes))
        buffers = [torch.empty(sum(map(_num_bytes, chunk)), dtype=torch.uint8) for chunk in chunks]
        for buffer in buffers:
            self.model_update_group.broadcast(buffer, src=_SENDER)
        seal = torch.empty(2, dtype=torch.int64)
        self.model_update_group.broadcast(seal, src=_SENDER)
        _check_seal(buffers, sent_bytes=int(seal[0]), sent_checksum=int(seal[1]))

        super().start_weight_update()
        for chunk, buffer in zip(chunks, buffers, strict=True):
            self.model.load_weights(_unpack(chunk, buffer))

    def finish_weight_update(self) -> None:
        """Put what was loaded to use, in the tied layers too."""
        super().finish_weight_update()
        _repack_tied_output_layers(self.model, self.model_config)


class GlooTrainerWeightTransferEngine(NCCLTrainerWeightTransferEngine):  # type: ignore[misc]  # untyped base
    """The sending end, in every learner rank; rank 0 sends, the others help to gather."""

    init_info_cls = GlooTrainerInitInfo

    @classmethod
    def trainer_init(
        cls,
        init_info: GlooTrainerInitInfo,
        *,
        client: VLLMWeightSyncClient,
        source: WeightSource,
    ) -> GlooTrainerWeightTransferEngine:
        """Open the group while every receiver joins; both sides must meet inside the call."""
        engine = cls(
            client=client,
            source=source,
            is_sender=init_info.is_sender,
            packed_buffer_size_bytes=init_info.packed_buffer_size_bytes,
        )
        if not engine.is_sender:
            return engine
        receivers = GlooWeightTransferInitInfo(
            master_address=init_info.master_address,
            master_port=init_info.master_port,
            rank_offset=1,
            world_size=init_info.world_size,
            packed=True,
            packed_buffer_size_bytes=init_info.packed_buffer_size_bytes,
            timeout_seconds=init_info.timeout_seconds,
        )
        with ThreadPoolExecutor(max_workers=1) as executor:
            joining = executor.submit(
                client.init_weight_transfer_engine, worker_init_payload(receivers)
            )
            try:
                engine.model_update_group = GlooCommunicator(
                    address=init_info.master_address,
                    port=init_info.master_port,
                    rank=_SENDER,
                    world_size=init_info.world_size,
                    timeout_seconds=init_info.timeout_seconds,
                )
            except Exception as error:
                # That we waited in vain says less than why a receiver did not come.
                if joining.done() and (reason := joining.exception()) is not None:
                    raise reason from error
                raise
            joining.result()
        return engine

    def _broadcast(self, source: WeightSource, meta: list[ParamMeta]) -> None:
        """Send the packed parameters, then their number of bytes and checksum."""
        if not self.is_sender:
            super()._broadcast(source, meta)
            return
        num_bytes, checksum = 0, 0
        pairs = self._checked_iter(source, meta)
        while chunk := pack_tensors(pairs, _tensor_of, self.packed_buffer_size_bytes):
            buffer = chunk.packed_tensor
            num_bytes += buffer.numel()
            checksum = zlib.crc32(buffer.numpy().data, checksum)
            self.model_update_group.broadcast(buffer, src=_SENDER)
        seal = torch.tensor([num_bytes, checksum], dtype=torch.int64)
        self.model_update_group.broadcast(seal, src=_SENDER)


class RegistersGloo:
    """Named to vLLM as worker_extension_cls, so that each of its workers imports this module."""


def plan_chunks(
    update_info: NCCLWeightTransferUpdateInfo, buffer_bytes: int
) -> Iterator[list[ParamMeta]]:
    """Cut the announced parameters where vLLM's pack_tensors does: after the first overflow."""
    chunk: list[ParamMeta] = []
    num_bytes = 0
    for name, dtype, shape in zip(
        update_info.names, update_info.dtype_names, update_info.shapes, strict=True
    ):
        chunk.append(ParamMeta(name, getattr(torch, dtype), tuple(shape)))
        num_bytes += _num_bytes(chunk[-1])
        if num_bytes > buffer_bytes:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


def register() -> None:
    """Make "gloo" known to both of vLLM's factories; doing it twice changes nothing."""
    if "gloo" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransferEngine)
    if "gloo" not in WeightTransferTrainerFactory._registry:
        WeightTransferTrainerFactory.register_engine("gloo", GlooTrainerWeightTransferEngine)


def _num_bytes(parameter: ParamMeta) -> int:
    return int(math.prod(parameter.shape) * parameter.dtype.itemsize)


def _tensor_of(pair: tuple[str, torch.Tensor]) -> torch.Tensor:
    return pair[1]


def _unpack(chunk: list[ParamMeta], buffer: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    tensors: list[tuple[str, torch.Tensor]] = unpack_tensor(
        buffer,
        [parameter.name for parameter in chunk],
        [list(parameter.shape) for parameter in chunk],
        [parameter.dtype for parameter in chunk],
        [_num_bytes(parameter) for parameter in chunk],
    )
    return tensors


def _repack_tied_output_layers(model: nn.Module, model_config: Any) -> None:
    """On a CPU vLLM multiplies with a packed copy of each weight, made when that weight is loaded.

    A tied output layer is never loaded, it shares the embedding's tensor: its tensor is new after
    an update, but its packed copy would stay that of the first weights (vLLM 0.32).
    """
    if not getattr(model_config.hf_text_config, "tie_word_embeddings", False):
        return
    for layer in model.modules():
        if isinstance(layer, ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)


def _check_seal(buffers: list[torch.Tensor], *, sent_bytes: int, sent_checksum: int) -> None:
    num_bytes, checksum = 0, 0
    for buffer in buffers:
        num_bytes += buffer.numel()
        checksum = zlib.crc32(buffer.numpy().data, checksum)
    if (num_bytes, checksum) != (sent_bytes, sent_checksum):
        raise TransferError(
            f"weights did not arrive as they were sent: sent {sent_bytes} bytes with CRC-32 "
            f"{sent_checksum:08x}, received {num_bytes} bytes with CRC-32 {checksum:08x}; nothing "
            "was loaded"
        )


register()

"""A gloo weight-transfer backend for vLLM: its NCCL backend, made to work without GPUs.

vLLM's classes are subclassed, and only what touches a GPU is replaced: the communicator, and a
synchronisation of the accelerator. Importing this module imports vLLM.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed import BroadcastOptions
from vllm.distributed.utils import stateless_init_torch_distributed_process_group
from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient, WeightSource
from vllm.distributed.weight_transfer.nccl_common import (
    NCCLWeightTransferInitInfo,
    worker_init_payload,
)
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLTrainerWeightTransferEngine,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from distill_system.weights.sealed import SealedWeightTransferEngine
from distill_system.weights.transport import SENDER, run_in_background


class GlooCommunicator:
    """The part of vLLM's PyNcclCommunicator that weight transfer uses, over torch's gloo.

    It makes a process group outside torch.distributed's default one, which belongs to the learner's
    ranks. Rank 0 listens at address:port; every call fails after timeout_seconds.
    """

    def __init__(
        self, *, address: str, port: int, rank: int, world_size: int, timeout_seconds: float
    ) -> None:
        self._group = stateless_init_torch_distributed_process_group(
            address, port, rank, world_size, "gloo", timeout=timedelta(seconds=timeout_seconds)
        )

    def broadcast(self, tensor: torch.Tensor, src: int) -> Any:
        """Begin to send `tensor` from rank src, or to receive into it; the result has a wait().

        Raises: RuntimeError, here or in wait(), if a peer is gone or the time is over; the group
        cannot be used afterwards.
        """
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        return self._group.broadcast([tensor], options)

    def destroy(self) -> None:
        """Close the connections; a broadcast under way keeps them open until it times out."""
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


class GlooWeightTransferEngine(SealedWeightTransferEngine):
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

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive and load; unlike the base class, without synchronising an accelerator."""
        self.receive_weights(self.parse_update_info(update_info))

    def finish_weight_update(self) -> None:
        """vLLM's end of an update, and a repair of the tied output layers that it leaves out."""
        super().finish_weight_update()
        _repack_tied_output_layers(self.model, self.model_config)

    def _receiving_device(self) -> torch.device:
        return torch.device("cpu")


class GlooTrainerWeightTransferEngine(NCCLTrainerWeightTransferEngine):  # type: ignore[misc]  # untyped base
    """The sending end's group, on rank 0; the other learner ranks hold none."""

    init_info_cls = GlooTrainerInitInfo

    @classmethod
    def trainer_init(
        cls,
        init_info: GlooTrainerInitInfo,
        *,
        client: VLLMWeightSyncClient,
        source: WeightSource,
    ) -> GlooTrainerWeightTransferEngine:
        """Open the group while every receiver joins it; returns when all have joined."""
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        if not engine.is_sender:
            return engine
        # Opening a group blocks until every rank is there, and the receivers join only when they
        # are called: so rank 0 opens it in the background and then calls them.
        opening: Future[GlooCommunicator] = run_in_background(
            lambda: GlooCommunicator(
                address=init_info.master_address,
                port=init_info.master_port,
                rank=SENDER,
                world_size=init_info.world_size,
                timeout_seconds=init_info.timeout_seconds,
            )
        )
        receivers = GlooWeightTransferInitInfo(
            master_address=init_info.master_address,
            master_port=init_info.master_port,
            rank_offset=1,
            world_size=init_info.world_size,
            packed=True,
            packed_buffer_size_bytes=init_info.packed_buffer_size_bytes,
            timeout_seconds=init_info.timeout_seconds,
        )
        # Waited for before `opening`: a receiver's own error says more than rank 0's timeout.
        client.init_weight_transfer_engine(worker_init_payload(receivers))
        engine.model_update_group = opening.result()
        return engine


def _repack_tied_output_layers(model: nn.Module, model_config: Any) -> None:
    """Renew the packed weights of output layers that share the embedding's tensor (vLLM 0.32).

    On a CPU, vLLM multiplies with a packed copy of each weight, made when that weight is loaded. A
    tied output layer is never loaded itself: after an update it sees the new tensor, but its packed
    copy would still hold the first weights.
    """
    if not getattr(model_config.hf_text_config, "tie_word_embeddings", False):
        return
    for layer in model.modules():
        if isinstance(layer, ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)

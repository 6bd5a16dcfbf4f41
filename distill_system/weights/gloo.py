"""The gloo receiving end inside vLLM: its NCCL backend, made to work without GPUs.

vLLM's classes are subclassed, and only what touches a GPU is replaced: the communicator, and a
synchronisation of the accelerator. Importing this module imports vLLM.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from distill_system.weights.communicator import GlooCommunicator
from distill_system.weights.sealed import SealedWeightTransferEngine, TimedInitInfo


class GlooWeightTransferEngine(SealedWeightTransferEngine):
    """The receiving end, inside each vLLM worker."""

    def init_transfer_engine(self, init_info: TimedInitInfo) -> None:
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

    def _deadline(self) -> AbstractContextManager[None]:
        return nullcontext()  # each call of gloo has its own

    def _receiving_device(self) -> torch.device:
        return torch.device("cpu")


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

"""The receiving end inside each vLLM worker: nothing is loaded before all of it is verified.

vLLM's NCCL engine is subclassed. It loads bytes as they come; loading cannot be undone, so here all
buckets are received first, their digest is compared with the sender's, and only then are the
model's old weights given up. Importing this module imports vLLM.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed.weight_transfer.base import ParamMeta
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check

from distill_system.errors import TransferError
from distill_system.weights.buckets import Buckets
from distill_system.weights.transport import Seal, broadcast_buckets, check_seal


class SealedWeightTransferEngine(NCCLWeightTransferEngine):  # type: ignore[misc]  # untyped base
    """Receives, verifies, loads; for NCCL as it is, for gloo see gloo.py.

    It holds the model's bytes a second time, on the model's device, until they are loaded. On a CPU
    it keeps that memory for the next version: to touch fresh pages takes longer than to receive.
    """

    received: Seal | None = None
    _room: tuple[NCCLWeightTransferUpdateInfo, int, Buckets] | None = None

    def start_weight_update(self) -> None:
        """Nothing yet: vLLM drops the old weights here, which must outlive a failed transfer."""

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Receive every byte, compare with the sender's seal, and only then load.

        Raises: TransferError if the bytes are not those that were sent; the old weights stay.
        """
        if self.model_update_group is None:
            raise TransferError("weights were sent before this worker joined a transfer group")
        buckets = self._receive(update_info)
        super().start_weight_update()
        with disable_mtp_completeness_check():
            for index in range(len(buckets.buffers)):
                self.model.load_weights(buckets.unpack(index))

    def _receive(self, update_info: NCCLWeightTransferUpdateInfo) -> Buckets:
        try:
            buckets = self._make_room(update_info)
            self.received = broadcast_buckets(self.model_update_group, buckets.buffers)
            check_seal(self.model_update_group, self.received, self._receiving_device())
        except TransferError:
            raise  # everything travelled: the group is as good as before
        except Exception:
            self.shutdown()  # whoever still sends to this worker must not wait for it
            raise
        return buckets

    def _make_room(self, update_info: NCCLWeightTransferUpdateInfo) -> Buckets:
        size, device = self.packed_buffer_size_bytes, self._receiving_device()
        if self._room is not None and self._room[:2] == (update_info, size):
            return self._room[2]
        self._room = None  # before there are two
        buckets = Buckets(_parameters(update_info), bucket_bytes=size, device=device)
        if device.type == "cpu":
            self._room = (update_info, size, buckets)
        return buckets

    def _receiving_device(self) -> torch.device:
        return torch.device(self.device)


class ReceivesWeights:
    """Mixed into each of vLLM's workers (worker_extension_cls), which imports the backends so."""

    weight_transfer_engine: Any

    def received_seal(self) -> tuple[int, int]:
        """Bytes and digest of what was received last."""
        seal = self.weight_transfer_engine.received
        return seal.num_bytes, seal.digest


def _parameters(update_info: NCCLWeightTransferUpdateInfo) -> list[ParamMeta]:
    fields = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
    return [ParamMeta(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in fields]

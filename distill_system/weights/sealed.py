"""The receiving end inside each vLLM worker: it loads nothing before all bytes are verified.

vLLM's NCCL engine, which is subclassed here, loads tensors as they arrive, and loading cannot be
undone. Here all buckets are received first, their digest is compared with the sender's, and only
then are the model's old weights replaced. Importing this module imports vLLM.
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
    """Receives, verifies, loads; used as it is for NCCL, subclassed for gloo.

    While it loads, the device holds the model's bytes twice. On a CPU that memory is kept for the
    next version, because touching fresh pages takes longer than receiving into them.

    received: seal of the last transfer.
    """

    received: Seal | None = None
    # The kept memory with what it was made for: parameters and bucket size.
    _kept: tuple[NCCLWeightTransferUpdateInfo, int, Buckets] | None = None

    def start_weight_update(self) -> None:
        """Does nothing: vLLM calls it before receiving, and its own version frees the old weights.

        They must survive a failed transfer, so receive_weights calls it after verifying.
        """

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
            buckets = self._allocate(update_info)
            self.received = broadcast_buckets(self.model_update_group, buckets.buffers)
            check_seal(self.model_update_group, self.received, self._receiving_device())
        except TransferError:
            raise  # a wrong digest: all bytes have arrived, so the group can be used again
        except Exception:
            self.shutdown()  # closes the connections, so that the sender fails and does not wait
            raise
        return buckets

    def _allocate(self, update_info: NCCLWeightTransferUpdateInfo) -> Buckets:
        size, device = self.packed_buffer_size_bytes, self._receiving_device()
        if self._kept is not None and self._kept[:2] == (update_info, size):
            return self._kept[2]
        self._kept = None  # free it first, or two copies would be held at once
        buckets = Buckets(_parameters(update_info), bucket_bytes=size, device=device)
        if device.type == "cpu":
            self._kept = (update_info, size, buckets)
        return buckets

    def _receiving_device(self) -> torch.device:
        return torch.device(self.device)


class ReceivesWeights:
    """Mixed into each of vLLM's workers as its worker_extension_cls; see backends.py."""

    weight_transfer_engine: Any

    def received_seal(self) -> tuple[int, int]:
        """Bytes and digest of the last transfer."""
        seal = self.weight_transfer_engine.received
        return seal.num_bytes, seal.digest


def _parameters(update_info: NCCLWeightTransferUpdateInfo) -> list[ParamMeta]:
    fields = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
    return [ParamMeta(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in fields]

"""The receiving end inside each vLLM worker: it loads nothing before all bytes are verified.

vLLM's NCCL engine, which is subclassed here, loads tensors as they arrive, and loading cannot be
undone. Here all buckets are received first, their digest is compared with the sender's, and only
then are the model's old weights replaced. Importing this module imports vLLM.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check

from distill_system.errors import TransferError
from distill_system.weights.buckets import Buckets, read_parameters
from distill_system.weights.sealed_buckets import SealedBuckets


class SealedWeightTransferEngine(NCCLWeightTransferEngine):  # type: ignore[misc]  # untyped base
    """Receives, verifies, loads; used as it is for NCCL, subclassed for gloo.

    While it loads, the device holds the model's bytes twice.

    is_whole: whether the model holds one version's weights, and not parts of two.
    """

    is_whole = True

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
        self.is_whole = False
        super().start_weight_update()
        with disable_mtp_completeness_check():
            for index in range(len(buckets.buffers)):
                self.model.load_weights(buckets.unpack(index))

    def finish_weight_update(self) -> None:
        """vLLM's end of an update; the model's weights are whole again."""
        super().finish_weight_update()
        self.is_whole = True

    @cached_property
    def sealed(self) -> SealedBuckets:
        """The memory that weights arrive in."""
        return SealedBuckets()  # not in the constructor, which is vLLM's

    def _receive(self, update_info: NCCLWeightTransferUpdateInfo) -> Buckets:
        try:
            return self.sealed.receive(
                self.model_update_group,
                read_parameters(asdict(update_info)),
                bucket_bytes=self.packed_buffer_size_bytes,
                device=self._receiving_device(),
            )
        except TransferError:
            raise  # a wrong digest: all bytes have arrived, so the group can be used again
        except Exception:
            self.shutdown()  # closes the connections, so that the sender fails and does not wait
            raise

    def _receiving_device(self) -> torch.device:
        return torch.device(self.device)


class ReceivesWeights:
    """Mixed into each of vLLM's workers as its worker_extension_cls; see backends.py."""

    weight_transfer_engine: Any

    def received_seal(self) -> tuple[int, int]:
        """Bytes and digest of the last transfer."""
        seal = self.weight_transfer_engine.sealed.received
        return seal.num_bytes, seal.digest

    def holds_whole_weights(self) -> bool:
        """Whether the model holds one version's weights, and not parts of two."""
        return bool(self.weight_transfer_engine.is_whole)

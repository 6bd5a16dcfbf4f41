"""The receiving end inside each vLLM worker: nothing is written with bytes that are not verified.

vLLM's NCCL engine, which is subclassed here, loads tensors as they arrive, and loading cannot be
undone. Where weights arrive in CPU memory all buckets are received first, their digest is compared
with the sender's, and only then are the model's old weights replaced. A GPU has no room for a
second model: there buckets are loaded as they come, and a transfer that fails leaves an engine that
writes nothing until another has come whole (decision 036). Importing this module imports vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
    NCCLWeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check

from distill_system.errors import TransferError
from distill_system.weights.abort import aborted_after
from distill_system.weights.buckets import read_parameters
from distill_system.weights.sealed_buckets import SealedBuckets

Received = TypeVar("Received")


@dataclass(kw_only=True)
class TimedInitInfo(NCCLWeightTransferInitInfo):  # type: ignore[misc]  # untyped base
    """What a receiver needs to join: vLLM's own fields and a deadline of each transfer."""

    timeout_seconds: float


class SealedWeightTransferEngine(NCCLWeightTransferEngine):  # type: ignore[misc]  # untyped base
    """Receives, verifies, loads; used as it is for NCCL, subclassed for gloo.

    is_whole: whether the model holds one version's weights, and not parts of two.
    """

    init_info_cls = TimedInitInfo
    is_whole = True

    def init_transfer_engine(self, init_info: TimedInitInfo) -> None:
        """Join the sender's group; blocks until every receiver has joined."""
        super().init_transfer_engine(init_info)
        self.timeout_seconds = init_info.timeout_seconds

    def start_weight_update(self) -> None:
        """Ends what an update that failed has begun: vLLM would add its parts to those that come.

        vLLM's own version, which frees the old weights, comes where the first are loaded.
        """
        if not self.is_whole:
            super().finish_weight_update()

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Receive every byte, compare with the sender's seal, and load: staged after, else before.

        Raises: TransferError if the bytes are not those that were sent; staged, the old weights
            stay.
        """
        if self.model_update_group is None:
            raise TransferError("weights were sent before this worker joined a transfer group")
        with disable_mtp_completeness_check():
            if self.is_staged:
                buckets = self._receive(self.sealed.receive, update_info)
                self._give_up_old_weights()
                for index in range(len(buckets.buffers)):
                    self.model.load_weights(buckets.unpack(index))
            else:
                self._give_up_old_weights()
                load = partial(self.sealed.stream, load=self.model.load_weights)
                self._receive(load, update_info)

    def finish_weight_update(self) -> None:
        """vLLM's end of an update; the model's weights are whole again."""
        super().finish_weight_update()
        self.is_whole = True

    @property
    def is_staged(self) -> bool:
        """Whether all bytes are held, and verified, before any is loaded."""
        return self._receiving_device().type == "cpu"

    @cached_property
    def sealed(self) -> SealedBuckets:
        """The memory that weights arrive in."""
        return SealedBuckets()  # not in the constructor, which is vLLM's

    def _give_up_old_weights(self) -> None:
        self.is_whole = False
        super().start_weight_update()

    def _receive(
        self, receive: Callable[..., Received], update_info: NCCLWeightTransferUpdateInfo
    ) -> Received:
        try:
            with self._deadline():
                return receive(
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

    def _deadline(self) -> AbstractContextManager[None]:
        return aborted_after(self.timeout_seconds, self.model_update_group)

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

"""The receiving end of a model that transformers computes: verified bytes into its parameters.

The methods are the steps of vLLM's weight-transfer lifecycle, by its names, so that a rollout
worker calls either engine alike. The sender cannot tell which of the two it feeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from distill_system.errors import TransferError
from distill_system.weights.buckets import Buckets, ParameterShape, read_parameters
from distill_system.weights.communicator import GlooCommunicator
from distill_system.weights.sealed_buckets import SealedBuckets

_CPU = torch.device("cpu")


class WeightReceiver:
    """Takes weights into a model, over gloo and CPU memory wherever the model is.

    It may therefore share its GPU with the learner. Nothing of the model changes before all bytes
    have come and are those that were sent.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters())  # tied ones once, as the learner has them
        self._group: GlooCommunicator | None = None
        self._bucket_bytes = 0
        self._sealed = SealedBuckets()
        self._arrived: Buckets | None = None
        self._is_whole = True

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        """Join the sender's group; blocks until every receiver has joined."""
        self._bucket_bytes = init_info["packed_buffer_size_bytes"]
        self._group = GlooCommunicator(
            address=init_info["master_address"],
            port=init_info["master_port"],
            rank=init_info["rank_offset"],
            world_size=init_info["world_size"],
            timeout_seconds=init_info["timeout_seconds"],
        )

    def shutdown_weight_transfer_engine(self) -> None:
        """Leave the group, if there is one."""
        if self._group is not None:
            self._group.destroy()
            self._group = None

    def start_weight_update(self) -> None:
        """Forget what an update that failed has left."""
        self._arrived = None

    def update_weights(self, update_info: Mapping[str, Any]) -> None:
        """Receive every byte and compare it with the sender's seal; the model stays as it is.

        Raises: TransferError if the bytes are not those that were sent, or are of another model.
        """
        if self._group is None:
            raise TransferError("weights were sent before this worker joined a transfer group")
        coming = read_parameters(update_info)
        try:
            self._arrived = self._sealed.receive(
                self._group, coming, bucket_bytes=self._bucket_bytes, device=_CPU
            )
        except TransferError:
            raise  # a wrong digest: all bytes have arrived, so the group can be used again
        except Exception:
            # Closes the connections, so that the sender fails and does not wait.
            self.shutdown_weight_transfer_engine()
            raise
        self._require_own(coming)

    @torch.no_grad()
    def finish_weight_update(self) -> None:
        """Put what has arrived into the model's parameters, rounded to their dtype."""
        assert self._arrived is not None, "update_weights comes before"
        self._is_whole = False
        for index in range(len(self._arrived.buffers)):
            for name, tensor in self._arrived.unpack(index):
                self._parameters[name].copy_(tensor)
        self._arrived, self._is_whole = None, True

    def received_seal(self) -> tuple[int, int]:
        """Bytes and digest of the last transfer."""
        seal = self._sealed.received
        assert seal is not None, "weights have come"
        return seal.num_bytes, seal.digest

    def holds_whole_weights(self) -> bool:
        """Whether the model holds one version's weights, and not parts of two."""
        return self._is_whole

    def _require_own(self, coming: Sequence[ParameterShape]) -> None:
        """Refuse weights that are not this model's, name by name and shape by shape."""
        theirs = {parameter.name: tuple(parameter.shape) for parameter in coming}
        ours = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        differing = sorted(
            name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)
        )
        if differing:
            self._arrived = None
            name = differing[0]
            raise TransferError(
                f"weights of another model came: {len(differing)} parameters differ, such as "
                f"{name!r}: expected the shape {ours.get(name, 'no such parameter')}, got "
                f"{theirs.get(name, 'none')}; nothing was loaded. Start the rollout workers from "
                "the folder that the learner starts from"
            )

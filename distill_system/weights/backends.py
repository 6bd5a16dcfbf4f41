"""Makes the receiving ends known to vLLM under names of ours; importing this registers them.

Named to vLLM as worker_extension_cls, so that each of its workers imports this module.
"""

from __future__ import annotations

from vllm.distributed.weight_transfer.factory import (
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)

from distill_system.weights.gloo import GlooTrainerWeightTransferEngine, GlooWeightTransferEngine
from distill_system.weights.sealed import ReceivesWeights, SealedWeightTransferEngine

__all__ = ["ReceivesWeights", "register"]


def register() -> None:
    """Add to both of vLLM's factories; doing it twice changes nothing.

    The sending end of "nccl" is vLLM's own: it opens the group, and we send.
    """
    receivers = {"gloo": GlooWeightTransferEngine, "sealed_nccl": SealedWeightTransferEngine}
    for name, engine in receivers.items():
        if name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(name, engine)
    if "gloo" not in WeightTransferTrainerFactory._registry:
        WeightTransferTrainerFactory.register_engine("gloo", GlooTrainerWeightTransferEngine)


register()

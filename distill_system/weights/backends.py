"""Registers our weight-transfer engines with vLLM; importing this module is enough.

Rollout engines name ReceivesWeights as vLLM's worker_extension_cls, so that each of vLLM's worker
processes imports this module and knows the engines before it is asked to make one.
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
    """Add our engines to both of vLLM's factories; a second call changes nothing.

    There is no sending engine for "nccl" here: vLLM's own opens the group, WeightPublisher sends.
    """
    receivers = {"gloo": GlooWeightTransferEngine, "sealed_nccl": SealedWeightTransferEngine}
    for name, engine in receivers.items():
        if name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(name, engine)
    if "gloo" not in WeightTransferTrainerFactory._registry:
        WeightTransferTrainerFactory.register_engine("gloo", GlooTrainerWeightTransferEngine)


register()

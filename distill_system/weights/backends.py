"""Registers our weight-transfer engines with vLLM; importing this module is enough.

Rollout engines name ReceivesWeights as vLLM's worker_extension_cls, so that each of vLLM's worker
processes imports this module and knows the engines before it is asked to make one.
"""

from __future__ import annotations

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from distill_system.weights.gloo import GlooWeightTransferEngine
from distill_system.weights.sealed import ReceivesWeights, SealedWeightTransferEngine

__all__ = ["ReceivesWeights", "register"]


def register() -> None:
    """Add our receiving ends to vLLM's factory; a second call changes nothing."""
    receivers = {"gloo": GlooWeightTransferEngine, "sealed_nccl": SealedWeightTransferEngine}
    for name, engine in receivers.items():
        if name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(name, engine)


register()

"""Optimizers and the learning-rate schedule: configuration in -> torch optimizers out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from distill_system.config.model import OptimizerConfig
from distill_system.errors import NonFiniteError
from distill_system.learner.sharding import gather


def learning_rate_at(step: int, *, config: OptimizerConfig, total_steps: int) -> float:
    """Linear warm-up to the peak, then what the schedule says down to its final fraction.

    step counts from 0; the first step already moves.
    """
    warm = min(1.0, (step + 1) / (config.num_warmup_steps(total_steps) + 1))
    progress = min(1.0, step / max(1, total_steps - 1))
    floor = config.final_learning_rate_fraction
    share = floor + (1.0 - floor) * _share_above_floor(progress, config)
    return config.learning_rate * warm * share


def _share_above_floor(progress: float, config: OptimizerConfig) -> float:
    """What is left of the way from the final rate to the peak, after this share of the steps."""
    match config.schedule:
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case "linear":
            return 1.0 - progress
        case "warmup_stable_decay":
            return min(1.0, (1.0 - progress) / config.decay_ratio)
        case "constant":
            return 1.0


def build_optimizers(
    model: nn.Module, embeddings: Sequence[Tensor], config: OptimizerConfig
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the hidden matrices and AdamW for the rest.

    embeddings: the input embedding and unembedding parameters, which are never Muon's.
    Weight decay applies to matrices that are not embeddings. On a GPU AdamW is fused: one pass over
    the memory and no workspace.
    """
    embedding_ids = {id(tensor) for tensor in embeddings}
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim == 2 and id(p) not in embedding_ids]
    # By identity: == of tensors compares their elements.
    matrix_ids = {id(p) for p in matrices}
    others = [p for p in parameters if id(p) not in matrix_ids]
    rate, decay, betas = config.learning_rate, config.weight_decay, config.adam_betas
    undecayed = {"params": others, "weight_decay": 0.0}
    build_adamw = partial(torch.optim.AdamW, lr=rate, betas=betas, fused=_may_fuse(parameters))
    if config.type == "adamw":
        return [build_adamw([{"params": matrices, "weight_decay": decay}, undecayed])]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        build_adamw([undecayed]),
    ]


def _may_fuse(parameters: Sequence[Tensor]) -> bool | None:
    """True on GPUs alone; None leaves the form to torch, whose bits a CPU's runs keep."""
    return all(parameter.is_cuda for parameter in parameters) or None


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], rate: float) -> None:
    """Give every parameter group the same learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def clip_gradients(model: nn.Module, max_norm: float, *, step: int) -> float:
    """Scale the gradient to max_norm if it is longer; returns its norm before.

    Raises: NonFiniteError, before any weight has changed.
    """
    norm = float(gather(nn.utils.clip_grad_norm_(model.parameters(), max_norm)))
    if not math.isfinite(norm):
        raise NonFiniteError(
            f"the gradient's norm must be finite, got {norm} at step {step}; no weight was "
            "changed. Start a run of another name with a lower learning rate or with "
            "learner.compute_dtype=float32"
        )
    return norm

"""The learner's state on disk, through torch.distributed.checkpoint.

Model, optimizers, critics and each rank's random state. Every rank writes into one folder that all
of them see; who calls this names the folder and makes the write atomic by renaming it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from distill_system.errors import RunStateError
from distill_system.objectives.rows import Objective


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    objective: Objective,
    *,
    rank: int,
) -> None:
    """Write this rank's part; returns when it is on disk."""
    state = _gather(model, optimizers, objective.state_dict(), rank)
    save(state, checkpoint_id=folder, no_dist=not dist.is_initialized())


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    objective: Objective,
    *,
    rank: int,
) -> None:
    """Bring everything back to where save_checkpoint left it.

    Raises: RunStateError if the folder is incomplete or of another model or optimizer.
    """
    try:
        stored = FileSystemReader(folder).read_metadata().state_dict_metadata
        critics = {
            key.removeprefix("objective."): torch.empty(entry.size)
            for key, entry in stored.items()
            if key.startswith("objective.") and isinstance(entry, TensorStorageMetadata)
        }
        state = _gather(model, optimizers, critics, rank)
        if f"random.rank{rank}" not in stored:
            del state["random"]  # written by fewer ranks: this one's own state is as good
        load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    except (OSError, RuntimeError, ValueError, KeyError, CheckpointException) as error:
        raise RunStateError(
            f"the checkpoint {folder} cannot be loaded into this learner: {error}. "
            "Remove it to resume from the one before, or start a run of another name"
        ) from error
    set_state_dict(
        model,
        optimizers,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    objective.load_state_dict(state["objective"])
    if "random" in state:
        torch.set_rng_state(state["random"][f"rank{rank}"])


def _gather(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    critics: dict[str, Tensor],
    rank: int,
) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizers)
    return {
        "model": model_state,
        "optimizer": optimizer_state,
        "objective": critics,
        "random": {f"rank{rank}": torch.get_rng_state()},
    }

"""The student spread over ranks: FSDP2 over a mesh of replicas x shards.

Each block of the model is gathered when it is read and given back after; what stands outside of the
blocks (embeddings, final norm, unembedding) is gathered once a step, since the objective multiplies
by the unembedding after the model has been read. A rank alone without offload wraps nothing.

Axes: V rows of a matrix, E its columns.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from distill_system.config.model import LearnerConfig
from distill_system.errors import ModelError
from distill_system.language_model import LanguageModel

Read = TypeVar("Read")

REPLICATE, SHARD = "replicate", "shard"
"""The mesh's axes: copies of the model, and ranks that share one."""


class Policy(nn.Module):
    """The student as the learner reads it: whatever reads its weights does so within a call.

    model: the bare Hugging Face model, whose names are those of its files.
    """

    def __init__(self, model: LanguageModel, *, device: torch.device, compute_dtype: str) -> None:
        super().__init__()
        self.model = model
        self.device = device
        self.lower_precision = compute_dtype == "bfloat16"

    def forward(self, read: Callable[[LanguageModel], Read]) -> Read:
        """Read the model, in the precision of the configuration."""
        with self.precision():
            return read(self.model)

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast; a sharded model computes in the precision in which FSDP2 gathers it."""
        enabled = self.lower_precision and not isinstance(self, FSDPModule)
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def expect_backward(self, *, last: bool) -> None:
        """Before each of a step's backward passes: whether it is the last.

        Replicas sum their blocks' gradients once a step, in the last; until then, what stands
        outside of the blocks stays gathered.
        """
        if isinstance(self, FSDPModule):
            self.set_reshard_after_backward(last, recurse=False)
            for block in find_blocks(self.model):
                block.set_requires_all_reduce(last, recurse=False)

    def release(self) -> None:
        """After reading without a backward pass: give back what stands outside of the blocks."""
        if isinstance(self, FSDPModule):
            self.reshard()


def find_blocks(model: LanguageModel) -> list[Any]:
    """The transformer blocks, in order.

    Raises: ModelError for a model that does not name them.
    """
    names = set(model._no_split_modules or ())
    blocks = [m for m in model.modules() if names & {kind.__name__ for kind in type(m).__mro__}]
    if not blocks:
        raise ModelError(
            f"{type(model).__name__}: expected a model that names its transformer blocks "
            f"(_no_split_modules), got {sorted(names) or 'none'}. Run with one learner rank, "
            "scoring.shard_ranks=1, learner.offload=false, learner.activation_checkpointing=false, "
            "learner.compile=false"
        )
    return blocks


def prepare_blocks(model: LanguageModel, config: LearnerConfig) -> None:
    """Activation checkpointing and compilation, without a change of the parameters' names."""
    if not (config.activation_checkpointing or config.compile):
        return
    for block in find_blocks(model):
        if config.activation_checkpointing:
            # The model is in evaluation mode: no random number is drawn twice.
            block.forward = partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )
        if config.compile:
            block.forward = torch.compile(block.forward)


def build_mesh(device: torch.device, *, num_ranks: int, shard_ranks: int) -> DeviceMesh:
    """Replicas x shards; the ranks of a shard are neighbours."""
    shape = (num_ranks // shard_ranks, shard_ranks)
    return init_device_mesh(device.type, shape, mesh_dim_names=(REPLICATE, SHARD))


def shard_policy(policy: Policy, mesh: DeviceMesh, config: LearnerConfig) -> None:
    """Shard every block by itself, then the rest; gradients are summed over ranks, not averaged."""
    lower = torch.bfloat16 if config.compute_dtype == "bfloat16" else None
    # Activations are in the parameters' precision from the embeddings on: no input needs a cast.
    precision = MixedPrecisionPolicy(
        param_dtype=lower, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    pinned = mesh.device_type == "cuda"
    offload = CPUOffloadPolicy(pin_memory=pinned) if config.offload else OffloadPolicy()
    shard = partial(fully_shard, mesh=mesh, mp_policy=precision, offload_policy=offload)
    for module in (*find_blocks(policy.model), policy):
        sharded = shard(module, reshard_after_forward=module is not policy)
        # A rank's loss is its share of the loss over all ranks.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def allocate(model: nn.Module, device: torch.device) -> None:
    """Memory for the parameters that are on the meta device; their values are undefined."""
    made: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta and parameter not in made:
                empty = torch.empty_like(parameter, device=device)
                made[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            # Tied parameters stay one.
            setattr(module, name, made.get(parameter, parameter))


def gather_weights(model: LanguageModel) -> dict[str, Tensor]:
    """The whole model's state in CPU memory, on rank 0 alone; empty on others. Every rank calls it.

    Tied parameters are one tensor, as in the model.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    first: dict[Tensor, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in state:
            state[name] = state[first.setdefault(parameter, name)]
    return state


def shard_rows(matrix_VE: Tensor, device: torch.device, mesh: DeviceMesh | None) -> Tensor:
    """A frozen matrix at rest: each rank of a shard keeps its rows, or all of them without one."""
    if mesh is None or mesh[SHARD].size() == 1:
        return matrix_VE.to(device)
    share = -(-matrix_VE.shape[0] // mesh[SHARD].size())
    start = mesh[SHARD].get_local_rank() * share
    return DTensor.from_local(
        matrix_VE[start : start + share].clone().to(device),
        mesh[SHARD],
        [Shard(0)],
        run_check=False,
        shape=matrix_VE.shape,
        stride=matrix_VE.stride(),
    )


def gather(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every rank of its mesh calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

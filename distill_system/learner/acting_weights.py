"""The student as its bfloat16 engines hold it: the learner's weights, rounded as they were sent.

A learner that computes in bfloat16 reads float32 weights. Rounded to the nearest in each product
they would stand still for dozens of small steps: the learner would not see what it has learned, and
go on in the same direction. So it reads the numbers that its engines have, and keeps its own aside.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from distill_system.learner.adapters import checkpoint_name
from distill_system.weights import WireFormat


@torch.no_grad()
def round_parameters(
    model: nn.Module, wire: WireFormat, *, version: int, device: torch.device
) -> None:
    """Give every parameter the numbers that are sent of it as this version; it stays float32.

    Ranks that share a model round their own parts, and agree with rank 0, which sends the whole.
    device: where the publisher rounds: each kind of device draws other random bits.
    """
    for name, parameter in model.named_parameters():
        part, sent_as = _own_part(parameter), checkpoint_name(name) or name
        before = _count_before(parameter)
        part.copy_(wire.round(sent_as, part.to(device), version=version, offset=before))


@contextmanager
def acting_weights(
    model: nn.Module, wire: WireFormat, *, version: int, device: torch.device
) -> Iterator[None]:
    """Within the block the model computes with the numbers that engines have of this version.

    What is gathered of a sharded model is given back before the block ends. The learner's own
    weights, 4 bytes a parameter, are kept beside them.
    """
    own = set_aside(model)
    try:
        round_parameters(model, wire, version=version, device=device)
        yield
    finally:
        with torch.no_grad():
            for parameter, weights in zip(model.parameters(), own, strict=True):
                _own_part(parameter).copy_(weights)


def set_aside(model: nn.Module) -> list[Tensor]:
    """A copy of this rank's part of every parameter."""
    return [_own_part(parameter).detach().clone() for parameter in model.parameters()]


def _own_part(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter, in the parameter's own memory."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _count_before(parameter: Tensor) -> int:
    """Numbers of the whole parameter that stand before this rank's part: whole rows."""
    if not isinstance(parameter, DTensor):
        return 0
    _, offsets = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    assert not any(offsets[1:]), "parameters are sharded by rows"
    return offsets[0] * math.prod(parameter.shape[1:]) if offsets else 0

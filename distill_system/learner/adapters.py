"""LoRA students: adapters into a model, and the weights of the plain model out of it again.

The adapters sit inside the Hugging Face model itself, which is then read, sharded and checkpointed
like any other. Who takes weights from the learner gets those of the model without adapters, under
the names of its checkpoint: W + alpha / r x B A, one tensor at a time.

Axes: O outputs of a linear layer, I its inputs, R the adapter's rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from distill_system.config.model import LoraUpdate
from distill_system.language_model import LanguageModel, choose_linear_modules, find_family
from distill_system.learner.sharding import gather
from distill_system.seeds import derive_seed
from distill_system.weights.buckets import ParameterMetadata

_NAME = "default"
"""What peft calls the one adapter of each layer."""
_BASE = ".base_layer."
_FACTORS = (".lora_A.", ".lora_B.")


def add_adapters(model: LanguageModel, update: LoraUpdate, *, seed: int) -> None:
    """Freeze the model and put an adapter beside each chosen linear layer; it computes as before.

    seed: of the adapters' first weights, which are the same on every rank. A model on the meta
    device is filled later: see initialise_adapters.
    Raises: ConfigError if the model has no such layer.
    """
    family = find_family(model.config, type(model).__name__)
    config = LoraConfig(
        r=update.rank,
        lora_alpha=update.alpha,  # type: ignore[arg-type]  # declared int, used as a number
        target_modules=list(choose_linear_modules(family, update.target_modules)),
        fan_in_fan_out=family.keeps_transposed,
        base_model_name_or_path=model.config.name_or_path,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):  # peft draws first weights of its own
        inject_adapter_in_model(config, model)
    initialise_adapters(model, seed=seed)
    model.eval()


@torch.no_grad()
def initialise_adapters(model: nn.Module, *, seed: int) -> None:
    """A uniform within 1 / sqrt(I), B zero; parameters on the meta device stay empty.

    A layer's draw follows from the seed and its name: not from the ranks, nor from other layers.
    """
    for name, layer in _adapted_layers(model):
        factor_RI, factor_OR = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
        if factor_RI.is_meta:
            continue
        generator = torch.Generator().manual_seed(derive_seed(seed, "adapter", name))
        drawn_RI = torch.empty(factor_RI.shape)
        nn.init.kaiming_uniform_(drawn_RI, a=math.sqrt(5), generator=generator)
        _fill(factor_RI, drawn_RI)
        factor_OR.zero_()


def checkpoint_name(name: str) -> str | None:
    """A parameter's name in the plain model's checkpoint; None for an adapter's own."""
    if any(factor in name for factor in _FACTORS):
        return None
    return name.replace(_BASE, ".")


@torch.no_grad()
def merged_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The plain model's parameters by their names in its checkpoint, merged, each in its dtype.

    Whole tensors of sharded parameters: every rank goes through all of them. A model without
    adapters gives its own parameters.
    """
    layers = dict(_adapted_layers(model))
    for name, parameter in model.named_parameters():
        plain = checkpoint_name(name)
        if plain is None:
            continue
        layer = layers.get(plain.removesuffix(".weight"))
        weight = gather(parameter.detach())
        yield plain, weight if layer is None else _merge(weight, layer)


class MergedSource:
    """The merged weights as a publisher takes them (its WeightTensors).

    device: where they are sent from; None: where they are.
    """

    def __init__(self, model: nn.Module, device: torch.device | None = None) -> None:
        self._model = model
        self._device = device

    def metadata(self) -> list[ParameterMetadata]:
        """Name, dtype and whole shape of each tensor, in the order in which they come."""
        named = ((checkpoint_name(n), p) for n, p in self._model.named_parameters())
        return [ParameterMetadata(n, p.dtype, tuple(p.shape)) for n, p in named if n is not None]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        named = merged_tensors(self._model)
        return ((name, tensor.to(self._device)) for name, tensor in named)


def save_adapters(model: LanguageModel, folder: Path, adapters: dict[str, Tensor]) -> None:
    """Write the adapters by themselves beside the merged model, in peft's format."""
    model.peft_config[_NAME].save_pretrained(str(folder / "adapter"))
    save_file(adapters, folder / "adapter" / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})


@torch.no_grad()
def fold_adapters(model: nn.Module) -> dict[str, Tensor]:
    """Add every adapter to its layer's weight and set it to zero; the model computes as before.

    Every rank calls it. Returns the adapters as they were; see gather_adapters.
    """
    adapters = {name: tensor.clone() for name, tensor in gather_adapters(model).items()}
    for _, layer in _adapted_layers(model):
        weight = layer.get_base_layer().weight
        _fill(weight, _merge(gather(weight.detach()), layer))
        layer.lora_B[_NAME].weight.zero_()
    return adapters


def gather_adapters(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' own weights in CPU memory, under the names of peft's files."""
    return {
        f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": gather(p.detach()).cpu().contiguous()
        for name, p in model.named_parameters()
        if checkpoint_name(name) is None
    }


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((n, layer) for n, layer in model.named_modules() if isinstance(layer, LoraLayer))


def _merge(weight: Tensor, layer: Any) -> Tensor:
    """weight: [O, I], or [I, O] where the family keeps it transposed."""
    factor_RI = gather(layer.lora_A[_NAME].weight).float()
    factor_OR = gather(layer.lora_B[_NAME].weight).float()
    delta_OI = factor_OR @ factor_RI * layer.scaling[_NAME]
    delta = delta_OI.T if layer.fan_in_fan_out else delta_OI
    return (weight.float() + delta).to(weight.dtype)


def _fill(parameter: Tensor, whole: Tensor) -> None:
    if not isinstance(parameter, DTensor):
        parameter.copy_(whole)
        return
    # Every rank has drawn the same: each keeps its part, nothing is sent.
    mesh, placements = parameter.device_mesh, parameter.placements
    whole = whole.to(parameter.device)
    parameter.copy_(distribute_tensor(whole, mesh, placements, src_data_rank=None))

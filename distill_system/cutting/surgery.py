"""A smaller model out of a larger one: its parameters are rows and columns of the larger one's.

Axes: L blocks, D hidden units, H query heads, K heads of keys and values, F neurons of an MLP.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distill_system.cutting.importance import Importance
from distill_system.cutting.layouts import (
    Axis,
    derives_head_size,
    find_layout,
    head_size,
    keeps_transposed,
    num_inputs,
)
from distill_system.errors import ModelError
from distill_system.language_model import LanguageModel, model_class, one_line
from distill_system.learner.sharding import find_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a decoder."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    intermediate_size: int

    def is_narrower_than(self, other: Shape) -> bool:
        """Whether it differs in more than its depth."""
        return replace(self, num_layers=other.num_layers) != other

    @classmethod
    def of(cls, model: LanguageModel) -> Shape:
        """The shape of a decoder; intermediate_size is 0 where its MLP has no known layout."""
        config, blocks = model.config, find_blocks(model)
        neurons = next(
            (
                num_inputs(module)
                for name, module in blocks[0].named_modules()
                if (layout := find_layout(name)) and layout.inputs == ("neurons",)
            ),
            0,
        )
        return cls(
            num_layers=len(blocks),
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_key_value_heads=getattr(config, "num_key_value_heads", None)
            or config.num_attention_heads,
            intermediate_size=neurons,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What is kept, by its place in the larger model, in rising order.

    blocks_L: int64. hidden_D: int64. For each kept block: heads_LH, keys_LK, neurons_LF: int64.
    """

    blocks_L: Tensor
    hidden_D: Tensor
    heads_LH: Tensor
    keys_LK: Tensor
    neurons_LF: Tensor

    @classmethod
    def best(
        cls, whole: Shape, wanted: Shape, importance: Importance, *, spread_blocks: bool
    ) -> Choice:
        """The most important parts.

        Of key heads those go first whose queries matter least together; of the queries that share
        a key head the best are kept.  spread_blocks: blocks are kept at even distances instead.
        """
        blocks_L = _top(importance.blocks_L, wanted.num_layers)
        if spread_blocks:
            blocks_L = _spread(whole.num_layers, wanted.num_layers)
        grouped_LKQ = importance.heads_LH[blocks_L].unflatten(1, (whole.num_key_value_heads, -1))
        num_queries = grouped_LKQ.shape[-1]
        keys_LK = _top(grouped_LKQ.sum(-1), wanted.num_key_value_heads)
        own_LKQ = grouped_LKQ.gather(1, keys_LK[..., None].expand(-1, -1, num_queries))
        queries_LKQ = _top(own_LKQ, wanted.num_heads // wanted.num_key_value_heads)
        return cls(
            blocks_L=blocks_L,
            hidden_D=_top(importance.hidden_D, wanted.hidden_size),
            heads_LH=(keys_LK[..., None] * num_queries + queries_LKQ).flatten(1),
            keys_LK=keys_LK,
            neurons_LF=_top(importance.neurons_LF[blocks_L], wanted.intermediate_size),
        )


def _spread(count: int, kept: int) -> Tensor:
    """So many of count blocks, evenly spread, the first and the last among them."""
    return torch.linspace(0, count - 1, kept).round().long() if kept > 1 else torch.tensor([0])


def _top(scores: Tensor, kept: int) -> Tensor:
    """Places of the largest along the last axis, in rising order; equal ones by their place."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[..., :kept].sort(dim=-1).values


def check_shape(model: LanguageModel, wanted: Shape, name: str) -> None:
    """Refuse sizes that the model cannot be cut to.  Raises: ModelError naming all of them."""
    whole, config, problems = Shape.of(model), model.config, []
    for size in ("num_layers", "hidden_size", "num_heads", "num_key_value_heads"):
        most, asked = getattr(whole, size), getattr(wanted, size)
        if not 1 <= asked <= most:
            problems.append(f"{size}: expected 1 to {most}, got {asked}")
    if not min(1, whole.intermediate_size) <= wanted.intermediate_size <= whole.intermediate_size:
        most, asked = whole.intermediate_size, wanted.intermediate_size
        problems.append(f"intermediate_size: expected 1 to {most}, got {asked}")
    queries = whole.num_heads // whole.num_key_value_heads
    heads, keys = wanted.num_heads, wanted.num_key_value_heads
    if keys < 1 or heads % keys or heads // keys > queries:
        problems.append(
            f"num_heads and num_key_value_heads: expected 1 to {queries} query heads for each key "
            f"head, as many for each, got {heads} and {keys}"
        )
    head = head_size(config)
    if derives_head_size(config) and wanted.hidden_size != wanted.num_heads * head:
        problems.append(
            f"hidden_size and num_heads: expected {head} units for each head in a model of type "
            f"{config.model_type}, got {wanted.hidden_size} and {wanted.num_heads}"
        )
    if not problems:
        try:
            smaller = _cut_config(model, wanted, _spread(whole.num_layers, wanted.num_layers))
            type(config).from_dict(smaller.to_dict())
        except Exception as error:  # each family's own checks have kinds of their own
            problems.append(one_line(error))
    if problems:
        raise ModelError(f"{name} cannot be cut to this shape: {'; '.join(problems)}")


def cut_model(model: LanguageModel, wanted: Shape, choice: Choice) -> LanguageModel:
    """A new model of the kept parts, of the same dtype and device, in evaluation mode."""
    config = _cut_config(model, wanted, choice.blocks_L)
    smaller = model_class(config).from_config(config, dtype=model.dtype).to(model.device)
    cutter, sources = _Cutter(model, choice), dict(model.named_parameters(remove_duplicate=False))
    is_narrower = wanted.is_narrower_than(cutter.whole)
    originals, places = _block_names(model), enumerate(_block_names(smaller))
    kept = {f"{name}.": (at, f"{originals[choice.blocks_L[at]]}.") for at, name in places}
    with torch.no_grad():
        for name, parameter in smaller.named_parameters():
            block = next((block for block in kept if name.startswith(block)), "")
            at, original = kept.get(block, (None, ""))
            source = original + name.removeprefix(block)
            whole = sources[source]
            parameter.copy_(cutter.cut(source, whole, at) if is_narrower else whole)
    smaller.generation_config = deepcopy(model.generation_config)
    return smaller.eval()


def _block_names(model: LanguageModel) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    return [names[block] for block in find_blocks(model)]


class _Cutter:
    """Takes the kept rows and columns of the parameters of a model."""

    def __init__(self, model: LanguageModel, choice: Choice) -> None:
        self.modules = dict(model.named_modules())
        self.whole, self.choice, self.head = Shape.of(model), choice, head_size(model.config)

    def cut(self, name: str, tensor: Tensor, at: int | None) -> Tensor:
        """at: the place of its block among the kept ones; None outside of the blocks."""
        for axis, groups in enumerate(self._axes(name, tensor)):
            if groups:
                tensor = tensor.index_select(axis, self._index(groups, at).to(tensor.device))
        return tensor

    def _axes(self, name: str, tensor: Tensor) -> tuple[Axis, ...]:
        """The groups along each axis of a parameter."""
        module, _, kind = name.rpartition(".")
        last, layout = module.rpartition(".")[2], find_layout(module)
        if layout is not None and kind == "bias":
            return (layout.outputs,)
        if layout is not None:
            sides = layout.outputs, layout.inputs
            return sides[::-1] if keeps_transposed(self.modules[module]) else sides
        if last in ("q_norm", "k_norm"):  # over the width of a head, or over all heads together
            group = "heads" if last == "q_norm" else "keys"
            return ((group,) if tensor.shape[0] > self.head else (),)
        return (("hidden",),) if tensor.shape == (self.whole.hidden_size,) else ((),) * tensor.ndim

    def _index(self, groups: Axis, at: int | None) -> Tensor:
        """The kept places of an axis on which the groups stand one behind another."""
        kept, offset = [], 0
        for group in groups:
            part, size = self._part(group, at)
            kept.append(part + offset)
            offset += size
        return torch.cat(kept)

    def _part(self, group: str, at: int | None) -> tuple[Tensor, int]:
        """The kept places of a group, and how many it has in all."""
        if group == "hidden":
            return self.choice.hidden_D, self.whole.hidden_size
        assert at is not None, f"{group} are parts of a block"
        if group == "neurons":
            return self.choice.neurons_LF[at], self.whole.intermediate_size
        heads, count, width = {
            "heads": (self.choice.heads_LH, self.whole.num_heads, self.head),
            "keys": (self.choice.keys_LK, self.whole.num_key_value_heads, self.head),
            "triples": (self.choice.heads_LH, self.whole.num_heads, 3 * self.head),
        }[group]
        return (heads[at][:, None] * width + torch.arange(width)).flatten(), count * width


_NEURONS = ("intermediate_size", "n_inner", "ffn_dim")


def _cut_config(model: LanguageModel, wanted: Shape, blocks_L: Tensor) -> Any:
    """The configuration with the new sizes, and of each list of a value a block what is kept."""
    config, whole = deepcopy(model.config), Shape.of(model)
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == whole.num_layers:
            setattr(config, key, [value[int(at)] for at in blocks_L])
    if "head_dim" in vars(config):
        config.head_dim = head_size(config)
    if getattr(config, "word_embed_proj_dim", None) == whole.hidden_size:
        config.word_embed_proj_dim = wanted.hidden_size
    config.num_hidden_layers, config.hidden_size = wanted.num_layers, wanted.hidden_size
    config.num_attention_heads = wanted.num_heads
    if getattr(config, "num_key_value_heads", None) is not None:
        config.num_key_value_heads = wanted.num_key_value_heads
    if wanted.intermediate_size != whole.intermediate_size:
        setattr(config, next(k for k in _NEURONS if hasattr(config, k)), wanted.intermediate_size)
    return config

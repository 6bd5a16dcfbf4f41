"""How much each part of a model matters to what it says of given text.

Every part gets a mask of 1 that its output is multiplied by. The importance of a part is the mean
over texts of |dL/d mask|, L being the mean cross-entropy of the text's response tokens: what the
loss would change by, to first order, if the part were taken out (Michel et al., arXiv 1905.10650;
MiniMA, arXiv 2311.07052, cuts its students by it).

Axes: L blocks, D hidden units, H query heads, F neurons of an MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from distill_system.cutting.layouts import find_layout, num_inputs
from distill_system.language_model import LanguageModel
from distill_system.learner.sharding import find_blocks
from distill_system.records import Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """Mean |dL/d mask| over texts, nats, float64 on the CPU.

    blocks_L; hidden_D; heads_LH; neurons_LF.
    """

    blocks_L: Tensor
    hidden_D: Tensor
    heads_LH: Tensor
    neurons_LF: Tensor


def all_alike(num_layers: int, hidden_size: int, num_heads: int, num_neurons: int) -> Importance:
    """Of a model in which no part is known to matter more than another."""
    sizes = ((num_layers,), (hidden_size,), (num_layers, num_heads), (num_layers, num_neurons))
    return _named([torch.zeros(size, dtype=torch.float64) for size in sizes])


def measure_importance(model: LanguageModel, texts: Sequence[Trajectory]) -> Importance:
    """Read each text by itself, forward and backward.

    model: in evaluation mode, a decoder of which every layout is known. Its parameters get no
    gradient.
    """
    masks = _Masks(model)
    required = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    handles = masks.attach()
    total = [torch.zeros_like(mask, dtype=torch.float64) for mask in masks.all]
    try:
        for text in texts:
            gradients = torch.autograd.grad(read_loss(model, text), masks.all)
            for so_far, gradient in zip(total, gradients, strict=True):
                so_far += gradient.abs().double()
    finally:
        for handle in handles:
            handle.remove()
        for parameter in required:
            parameter.requires_grad_(True)
    return _named([(each / len(texts)).cpu() for each in total])


def _named(tensors: Sequence[Tensor]) -> Importance:
    return Importance(**dict(zip((f.name for f in fields(Importance)), tensors, strict=True)))


def read_loss(model: LanguageModel, text: Trajectory) -> Tensor:
    """Mean cross-entropy of a text's response tokens, nats, [].  See measure_importance."""
    device = model.get_output_embeddings().weight.device
    ids_L = torch.from_numpy(text.token_ids.astype("int64")).to(device)
    logits_LV = model(input_ids=ids_L[None], use_cache=False).logits[0]
    logits_TV = logits_LV[text.num_prompt_tokens - 1 : -1]
    exact = torch.promote_types(logits_TV.dtype, torch.float32)
    return torch.nn.functional.cross_entropy(logits_TV.to(exact), ids_L[text.num_prompt_tokens :])


class _Masks:
    """The masks of a model, and the hooks that multiply by them."""

    def __init__(self, model: LanguageModel) -> None:
        config, device = model.config, model.get_output_embeddings().weight.device
        self.blocks = find_blocks(model)
        self.writers = [_writers(block) for block in self.blocks]
        self.num_heads = config.num_attention_heads
        num_neurons, count = num_inputs(self.writers[0]["neurons"]), len(self.blocks)
        shapes = ((count,), (config.hidden_size,), (count, self.num_heads), (count, num_neurons))
        self.all = [torch.ones(shape, device=device, requires_grad=True) for shape in shapes]

    def attach(self) -> list[Any]:
        """Hooks that multiply; the caller removes them."""
        blocks_L, hidden_D, heads_LH, neurons_LF = self.all
        handles = []
        for at, (block, writers) in enumerate(zip(self.blocks, self.writers, strict=True)):
            entering = _enter(hidden_D if at == 0 else None)
            handles += [
                block.register_forward_pre_hook(entering, with_kwargs=True),
                block.register_forward_hook(_leave(blocks_L, at, hidden_D), with_kwargs=True),
                writers["heads"].register_forward_pre_hook(_by_head(heads_LH, at)),
                writers["neurons"].register_forward_pre_hook(_by_neuron(neurons_LF, at)),
            ]
        return handles


def _writers(block: Any) -> dict[str, Any]:
    """The two modules of a block that write into the residual stream, by the group they read."""
    found = {}
    for name, module in block.named_modules():
        layout = find_layout(name)
        if layout is not None and layout.outputs == ("hidden",):
            found[layout.inputs[0]] = module
    return found


def _enter(hidden_D: Tensor | None) -> Callable[..., Any]:
    def multiply(module: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if hidden_D is None:
            return None
        stream = _stream(arguments, options)
        masked = stream * hidden_D.to(stream.dtype)
        if arguments:
            return (masked, *arguments[1:]), options
        return arguments, {**options, "hidden_states": masked}

    return multiply


def _leave(blocks_L: Tensor, at: int, hidden_D: Tensor) -> Callable[..., Any]:
    def multiply(module: Any, arguments: Any, options: dict[str, Any], output: Any) -> Any:
        before, after = _stream(arguments, options), output
        if isinstance(output, tuple):
            after = output[0]
        mask, units = blocks_L[at].to(after.dtype), hidden_D.to(after.dtype)
        masked = (before + mask * (after - before)) * units
        return (masked, *output[1:]) if isinstance(output, tuple) else masked

    return multiply


def _stream(arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """The hidden states that a block was given."""
    stream: Tensor = arguments[0] if arguments else options["hidden_states"]
    return stream


def _by_head(heads_LH: Tensor, at: int) -> Callable[..., Any]:
    def multiply(module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        read = arguments[0]
        mask_H = heads_LH[at].to(read.dtype)
        return (read * mask_H.repeat_interleave(read.shape[-1] // len(mask_H)), *arguments[1:])

    return multiply


def _by_neuron(neurons_LF: Tensor, at: int) -> Callable[..., Any]:
    def multiply(module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arguments[0] * neurons_LF[at].to(arguments[0].dtype), *arguments[1:])

    return multiply

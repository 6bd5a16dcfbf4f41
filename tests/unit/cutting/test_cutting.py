"""Students cut from teachers, against masks, finite differences and models built by hand."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_families import TEACHERS_ALONE, TRAINABLE, make_configuration
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from distill_system.cutting import Choice, Shape, cut_model, measure_importance
from distill_system.cutting.importance import all_alike
from distill_system.cutting.layouts import require_layouts
from distill_system.cutting.surgery import check_shape
from distill_system.errors import ModelError
from distill_system.records import Author, Finish, Trajectory

NO_WIDTH = ("falcon", "falcon_40b", "cohere", "cohere2", "smollm3", "opt_350m")
WIDE = tuple(name for name in TRAINABLE if name not in NO_WIDTH)


def _model(family: str, **changes: int):
    torch.manual_seed(3)
    config = make_configuration(family, num_rows=64)
    for key, value in changes.items():
        setattr(config, key, value)
    return AutoModelForCausalLM.from_config(config).eval()


def _texts(count: int = 3) -> list[Trajectory]:
    rng = np.random.default_rng(2)
    return [
        Trajectory(
            trajectory_id=str(at),
            prompt_id=str(at),
            author=Author.DATASET,
            token_ids=rng.integers(3, 64, 7 + at, dtype=np.int32),
            num_prompt_tokens=3,
            behaviour_logprobs=np.zeros(0, np.float32),
            temperature=1.0,
            finish=Finish.STOP,
        )
        for at in range(count)
    ]


def _alike(whole: Shape):
    return all_alike(whole.num_layers, whole.hidden_size, whole.num_heads, whole.intermediate_size)


def _logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 14)[None], use_cache=False).logits[0]


@pytest.mark.parametrize("family", TRAINABLE)
def test_what_keeps_everything_is_the_model(family: str) -> None:
    model = _model(family)
    whole = Shape.of(model)
    same = cut_model(model, whole, Choice.best(whole, whole, _alike(whole), spread_blocks=True))
    assert torch.equal(_logits(same), _logits(model))


@pytest.mark.parametrize("family", [*TRAINABLE, *TEACHERS_ALONE])
def test_a_model_without_a_block_is_the_model_that_skips_it(family: str) -> None:
    model = _model(family)
    whole = Shape.of(model)
    choice = Choice.best(whole, replace(whole, num_layers=1), _alike(whole), spread_blocks=True)
    shallow = cut_model(model, replace(whole, num_layers=1), choice)
    assert choice.blocks_L.tolist() == [0]
    second = [m for m in model.modules() if type(m) in _block_types(model)][1]
    second.register_forward_hook(_pass_by, with_kwargs=True)
    torch.testing.assert_close(_logits(shallow), _logits(model))
    assert shallow.config.num_hidden_layers == 1


def _pass_by(block, arguments, options, output):
    stream = arguments[0] if arguments else options["hidden_states"]
    return (stream, *output[1:]) if isinstance(output, tuple) else stream


def _block_types(model):
    return {type(m) for m in model.modules() if type(m).__name__ in model._no_split_modules}


@pytest.mark.parametrize("family", WIDE)
def test_what_is_cut_in_width_is_the_model_whose_other_parts_are_not_heard(family: str) -> None:
    """In the whole model norms see the kept units alone, and nothing reads what was cut: hooks that
    know nothing of how matrices lie."""
    model = _model(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if "norm" in name or "ln_" in name else 0.0)
    whole = Shape.of(model)
    wanted = replace(
        whole,
        hidden_size=32,
        num_heads=1,
        num_key_value_heads=1,
        intermediate_size=whole.intermediate_size - 5,
    )
    check_shape(model, wanted, "teacher.path")
    choice = Choice.best(whole, wanted, measure_importance(model, _texts()), spread_blocks=True)
    cut = cut_model(model, wanted, choice)
    _deafen(model, whole, choice)
    torch.testing.assert_close(_logits(cut), _logits(model), atol=1e-5, rtol=1e-4)
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in model.parameters()) / 2


def _deafen(model, whole: Shape, choice: Choice) -> None:
    """Make the whole model compute with the kept parts alone."""
    head = getattr(model.config, "head_dim", None) or whole.hidden_size // whole.num_heads
    for name, module in model.named_modules():
        at = next((int(part) for part in name.split(".") if part.isdigit()), None)
        rows = [] if at is None else [choice.heads_LH[at], choice.keys_LK[at]]
        heads, keys = [(r[:, None] * head + torch.arange(head)).flatten() for r in rows] or (
            None,
            None,
        )
        last = name.rpartition(".")[2]
        if "norm" in last or last.startswith("ln_"):
            kept = {"q_norm": heads, "k_norm": keys}.get(last, choice.hidden_D)
            if module.weight.shape[0] > len(kept):
                _norm_of(module, kept)
        elif name.endswith(("o_proj", "out_proj", "attention.dense", "attn.c_proj")):
            _gate(module, heads, whole.num_heads * head)
        elif name.endswith(("down_proj", "mlp.c_proj", "fc2", "dense_4h_to_h")):
            _gate(module, choice.neurons_LF[at], whole.intermediate_size)
        elif module is model.get_input_embeddings():
            gate = torch.zeros(whole.hidden_size).index_fill(0, choice.hidden_D, 1.0)
            if model.config.model_type.startswith("gemma"):  # which multiply by the width's root
                gate *= (len(choice.hidden_D) / whole.hidden_size) ** 0.5
            module.register_forward_hook(lambda _, __, written, gate=gate: written * gate)


def _gate(module, kept: torch.Tensor, count: int) -> None:
    gate = torch.zeros(count).index_fill(0, kept, 1.0)
    module.register_forward_pre_hook(lambda _, read: (read[0] * gate,))


def _norm_of(module, kept: torch.Tensor) -> None:
    """The norm of the kept units; the others become zero."""
    inner = deepcopy(module)
    for name in ("weight", "bias"):
        if getattr(module, name, None) is not None:
            setattr(inner, name, torch.nn.Parameter(getattr(module, name)[kept]))
    if isinstance(inner, torch.nn.LayerNorm):
        inner.normalized_shape = (len(kept),)

    def forward(read: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(read).index_copy(-1, kept, inner(read[..., kept]))

    module.forward = forward


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_of_key_heads_that_are_shared_the_best_queries_are_kept(family: str) -> None:
    model = _model(family, num_attention_heads=6, num_key_value_heads=3)
    whole = Shape.of(model)
    wanted = replace(whole, num_heads=2, num_key_value_heads=2)
    importance = measure_importance(model, _texts())
    choice = Choice.best(whole, wanted, importance, spread_blocks=True)
    for at in range(whole.num_layers):
        pairs = importance.heads_LH[at].view(3, 2)
        keys = sorted(pairs.sum(1).argsort()[1:].tolist())
        assert choice.keys_LK[at].tolist() == keys
        assert choice.heads_LH[at].tolist() == [2 * k + int(pairs[k].argmax()) for k in keys]
    cut = cut_model(model, wanted, choice)
    _deafen(model, whole, choice)
    torch.testing.assert_close(_logits(cut), _logits(model), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])
def test_importance_is_what_the_loss_changes_by(family: str) -> None:
    """Finite differences of a model in double precision, whose matrices are scaled by hand."""
    model, texts = _model(family).double(), _texts()
    importance = measure_importance(model, texts)
    whole, step = Shape.of(model), 1e-3

    def losses() -> torch.Tensor:
        return torch.stack([_loss(model, text).detach() for text in texts])

    for kind, size in (("heads", whole.num_heads), ("neurons", whole.intermediate_size)):
        measured = importance.heads_LH if kind == "heads" else importance.neurons_LF
        ends = {"heads": ("o_proj", "out_proj", "attention.dense", "attn.c_proj")}.get(
            kind, ("down_proj", "mlp.c_proj", "fc2", "dense_4h_to_h")
        )
        writer = [m for n, m in model.named_modules() if n.endswith(ends)][1]
        inputs = writer.weight if type(writer).__name__ == "Conv1D" else writer.weight.T
        width = inputs.shape[0] // size
        for part in (0, size - 1):
            rows = slice(part * width, (part + 1) * width)
            plain, found = inputs.detach()[rows].clone(), []
            for factor in (1 + step, 1 - step):
                inputs.data[rows] = plain * factor
                found.append(losses())
            inputs.data[rows] = plain
            change = ((found[0] - found[1]).abs() / (2 * step)).mean()
            torch.testing.assert_close(measured[1, part], change, rtol=1e-2, atol=1e-5)


def test_importance_of_blocks_and_units_is_what_the_loss_changes_by() -> None:
    """A block's by its two writers together; a unit's by what every writer writes into it."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_embd=8, n_layer=1, n_head=2, n_positions=16, initializer_range=0.5
    )
    model, texts, step = GPT2LMHeadModel(config).eval().double(), _texts(1), 1e-4
    importance = measure_importance(model, texts)
    block = model.transformer.h[0]
    plain = block.forward

    def slope(mask, read_D, written_D) -> float:
        found = []
        for size in (step, -step):
            gate_D, entry_D = 1 + size * written_D, 1 + size * read_D

            def forward(hidden_states, *rest, size=size, gate_D=gate_D, entry_D=entry_D, **options):
                read = hidden_states * entry_D
                return gate_D * (read + (1 + size * mask) * (plain(read, *rest, **options) - read))

            block.forward = forward
            found.append(float(_loss(model, texts[0]).detach()))
        return abs(found[0] - found[1]) / (2 * step)

    none_D = torch.zeros(8, dtype=torch.float64)
    assert importance.blocks_L[0] == pytest.approx(slope(1.0, none_D, none_D), rel=1e-4)
    for unit in (0, 5):
        unit_D = none_D.index_fill(0, torch.tensor(unit), 1.0)
        assert importance.hidden_D[unit] == pytest.approx(slope(0.0, unit_D, unit_D), rel=1e-4)


def _loss(model, text: Trajectory) -> torch.Tensor:
    ids = torch.from_numpy(text.token_ids.astype(np.int64))
    logprobs = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
    said = logprobs[torch.arange(len(ids) - 1), ids[1:]]
    return -said[text.num_prompt_tokens - 1 :].mean()


def test_blocks_are_spread_or_the_most_important_ones() -> None:
    whole = Shape(
        num_layers=6, hidden_size=8, num_heads=2, num_key_value_heads=2, intermediate_size=4
    )
    importance = _alike(whole)
    importance.blocks_L[:] = torch.tensor([0.5, 3.0, 0.1, 2.0, 4.0, 0.2])
    wanted = replace(whole, num_layers=3)
    even = Choice.best(whole, wanted, importance, spread_blocks=True)
    best = Choice.best(whole, wanted, importance, spread_blocks=False)
    assert even.blocks_L.tolist() == [0, 2, 5]
    assert best.blocks_L.tolist() == [1, 3, 4]


@pytest.mark.parametrize("family", NO_WIDTH)
def test_a_family_of_unknown_layout_is_cut_in_depth_alone(family: str) -> None:
    with pytest.raises(
        ModelError, match=r"teacher\.path: a model of type .* cannot be cut in width"
    ):
        require_layouts(_model(family), "teacher.path")


def test_every_size_that_does_not_go_is_told() -> None:
    model = _model("gpt2")
    whole = Shape.of(model)
    wanted = replace(whole, num_layers=0, num_heads=1, num_key_value_heads=1, hidden_size=48)
    with pytest.raises(ModelError) as refused:
        check_shape(model, wanted, "teacher.path")
    assert "num_layers: expected 1 to 2, got 0" in str(refused.value)
    assert "expected 32 units for each head in a model of type gpt2, got 48 and 1" in str(
        refused.value
    )
    llama = _model("llama")
    ours = Shape.of(llama)
    with pytest.raises(ModelError, match="expected 1 to 2 query heads for each key head"):
        check_shape(llama, replace(ours, num_key_value_heads=0), "teacher.path")
    with pytest.raises(ModelError, match=r"hidden size .33. is not a multiple"):
        check_shape(llama, replace(ours, hidden_size=33), "teacher.path")

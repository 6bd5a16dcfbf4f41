from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch._C._distributed_c10d import HashStore
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

from distill_system.errors import ModelError
from distill_system.language_model import PACKED_ATTENTION, check_packed_read
from distill_system.language_model.packed_attention import PackedLayout, group_by_length, read_line

CPU = torch.device("cpu")
RAGGED = [1, 1, 2, 3, 5, 5, 8, 13, 21, 34]
FAMILIES = [
    "gemma",
    "gpt2",
    "llama",
    "llama_tied",
    "mistral",
    "mistral_windowed",
    "opt",
    "opt_norm_last_narrow_embeddings",
    "qwen2",
    "qwen2_half_its_blocks_windowed",
    "qwen3",
]


def _line(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 64, (1, sum(lengths)), generator=generator)


def _read_alone(model, line_1T, lengths):
    """Each sequence by itself, through the library's own forward."""
    read = [
        model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        for ids in line_1T.split(lengths, dim=1)
    ]
    return torch.cat(read)


def _gradients(model, hidden_TH):
    """Of a fixed random linear function of the hidden states, by parameter."""
    model.zero_grad()
    weights_TH = torch.randn(hidden_TH.shape, generator=torch.Generator().manual_seed(1))
    (hidden_TH * weights_TH).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _relative(came, reference):
    return float((came - reference).detach().abs().max() / reference.detach().abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [RAGGED, [34], [7, 7, 7]], ids=str)
def test_a_packed_line_is_read_as_each_sequence_alone(make_family_model, family, lengths):
    packed = make_family_model(family)
    reference = make_family_model(family, attention="sdpa")
    line_1T = _line(lengths)
    hidden_TH = read_line(packed, line_1T, PackedLayout.build(lengths, CPU))
    alone_TH = _read_alone(reference, line_1T, lengths)
    # Norms of the mean square compute in float32 whatever the model's precision.
    tolerance = 1e-10 if family.startswith(("gpt2", "opt")) else 1e-5
    assert _relative(hidden_TH, alone_TH) < tolerance

    came, expected = _gradients(packed, hidden_TH), _gradients(reference, alone_TH)
    assert came.keys() == expected.keys()
    # A key's bias adds the same to all scores of a query: its gradient is 0 but for rounding.
    for name in expected:
        if not name.endswith("k_proj.bias"):
            assert _relative(came[name], expected[name]) < tolerance, name


def test_every_family_is_tested(families):
    assert families == FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plainly_written_attention_agrees_in_float32(make_family_model, family):
    packed = make_family_model(family, dtype=torch.float32)
    eager = make_family_model(family, dtype=torch.float32, attention="eager")
    line_1T = _line(RAGGED)
    with torch.inference_mode():
        hidden_TH = read_line(packed, line_1T, PackedLayout.build(RAGGED, CPU))
        assert _relative(hidden_TH, _read_alone(eager, line_1T, RAGGED)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_changing_one_sequence_changes_no_other(make_family_model, family):
    model = make_family_model(family)
    layout, line_1T = PackedLayout.build(RAGGED, CPU), _line(RAGGED)
    ends = np.cumsum(RAGGED)
    with torch.no_grad():
        before = read_line(model, line_1T, layout).split(RAGGED)
        for changed in (0, 4, len(RAGGED) - 1):
            other_1T = line_1T.clone()
            other_1T[0, ends[changed] - RAGGED[changed] : ends[changed]] += 1
            after = read_line(model, other_1T % 64, layout).split(RAGGED)
            same = [torch.equal(*pair) for pair in zip(before, after, strict=True)]
            assert same == [index != changed for index in range(len(RAGGED))]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2_half_its_blocks_windowed"])
def test_blocks_that_run_again_in_backward_give_the_same_gradients(make_family_model, family):
    layout, line_1T = PackedLayout.build(RAGGED, CPU), _line(RAGGED)
    model = make_family_model(family)
    expected = _gradients(model, read_line(model, line_1T, layout))
    for blocks in [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]:
        for index, block in enumerate(blocks):
            blocks[index] = checkpoint_wrapper(block)
    came = _gradients(model, read_line(model, line_1T, layout))
    assert len(came) == len(expected)
    for one, other in zip(came.values(), expected.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_librarys_own_checkpointing_works_too(make_family_model):
    layout, line_1T = PackedLayout.build(RAGGED, CPU), _line(RAGGED)
    model = make_family_model("llama")
    expected = _gradients(model, read_line(model, line_1T, layout))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    came = _gradients(model.train(), read_line(model, line_1T, layout))
    for name in expected:
        torch.testing.assert_close(came[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_computes_in_bfloat16(make_family_model, family):
    model = make_family_model(family, dtype=torch.float32)
    layout, line_1T = PackedLayout.build(RAGGED, CPU), _line(RAGGED)
    with torch.no_grad():
        exact_TH = _read_alone(model, line_1T, RAGGED)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden_TH = read_line(model, line_1T, layout)
        alone_TH = _read_alone(model, line_1T, RAGGED)
    rounding, error = ((x.detach() - exact_TH).norm() for x in (alone_TH, hidden_TH))
    assert 0 < error < 1.5 * rounding < 0.3 * exact_TH.norm()
    assert all(g.isfinite().all() for g in _gradients(model, hidden_TH.float()).values())


@pytest.fixture
def one_rank_mesh():
    store = HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


# GPT-2's model and OPT's blocks end in a view; nobody writes into it.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_sharded_blocks_pass_the_layout_on(make_family_model, one_rank_mesh, family):
    layout, line_1T = PackedLayout.build(RAGGED, CPU), _line(RAGGED)
    model = make_family_model(family, dtype=torch.float32)
    expected = _gradients(model, read_line(model, line_1T, layout))
    policy = MixedPrecisionPolicy(param_dtype=torch.float64, reduce_dtype=torch.float64)
    for blocks in [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]:
        for block in blocks:
            fully_shard(block, mesh=one_rank_mesh, mp_policy=policy)
    fully_shard(model.base_model, mesh=one_rank_mesh, mp_policy=policy)
    came = _gradients(model, read_line(model, line_1T, layout))
    assert came.keys() == expected.keys()
    for name in expected:
        if not name.endswith("k_proj.bias"):
            assert _relative(came[name].full_tensor(), expected[name]) < 1e-4, name


class _LargestTensor(TorchDispatchMode):
    """Entries of the largest tensor that any operation makes."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        self.entries = max(self.entries, *sizes, 0)
        return made


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mistral_windowed"])
def test_nothing_of_the_size_of_the_line_squared_is_made(make_family_model, family):
    model = make_family_model(family, dtype=torch.float32)
    lengths = sorted(16 + index % 3 for index in range(128))
    layout, line_1T = PackedLayout.build(lengths, CPU), _line(lengths)
    with _LargestTensor() as largest:
        _gradients(model, read_line(model, line_1T, layout))
    # The widest rows are those of the feed-forward layer: 4 x 32 in GPT-2.
    assert sum(lengths) * 32 <= largest.entries <= sum(lengths) * 128 < sum(lengths) ** 2 // 8


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_layout_the_model_is_the_librarys_own(make_family_model, family):
    packed = make_family_model(family, dtype=torch.float32)
    reference = make_family_model(family, dtype=torch.float32, attention="sdpa")
    ids_BL = _line([24]).view(2, 12)
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[1, :5] = 0  # left padding, as generate has it
    with torch.no_grad():
        for mask in (None, mask_BL):
            came = packed(input_ids=ids_BL, attention_mask=mask).logits
            expected = reference(input_ids=ids_BL, attention_mask=mask).logits
            torch.testing.assert_close(came[mask_BL == 1], expected[mask_BL == 1])
        other_BL = ids_BL.clone()
        other_BL[:, -1] = (other_BL[:, -1] + 1) % 64
        before, after = (packed(input_ids=ids).logits for ids in (ids_BL, other_BL))
        assert torch.equal(before[:, :-1], after[:, :-1])
        assert not torch.equal(before[:, -1], after[:, -1])
        written = [
            model.generate(
                ids_BL, attention_mask=mask_BL, max_new_tokens=6, do_sample=False, pad_token_id=0
            )
            for model in (packed, reference)
        ]
    assert torch.equal(*written)


def test_a_saved_model_does_not_ask_for_packed_attention(make_family_model, tmp_path):
    make_family_model("llama").save_pretrained(tmp_path)
    assert PACKED_ATTENTION not in json.loads((tmp_path / "config.json").read_text()).values()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"


def test_dropout_is_refused(make_family_model):
    with pytest.raises(ModelError, match=r"GPT2Attention: .*dropout=0.1"):
        read_line(make_family_model("gpt2").train(), _line([4]), PackedLayout.build([4], CPU))


def test_soft_capped_scores_are_refused(make_family_model):
    model = make_family_model("llama")
    for block in model.base_model.layers:
        block.self_attn.register_forward_pre_hook(
            lambda module, args, keywords: (args, {**keywords, "softcap": 30.0}), with_kwargs=True
        )
    with pytest.raises(ModelError, match="softcap"):
        check_packed_read(model, "capped")


def test_a_family_that_drops_keywords_is_refused(make_family_model):
    model = make_family_model("llama")

    def drop(module, args, keywords):
        return args, {name: x for name, x in keywords.items() if name != "packed_layout"}

    model.base_model.layers[1].register_forward_pre_hook(drop, with_kwargs=True)
    with pytest.raises(ModelError, match="does not pass its keywords on"):
        check_packed_read(model, "dropping")


def test_a_family_that_carries_something_from_token_to_token_is_refused(make_family_model):
    model = make_family_model("llama")
    check_packed_read(model, "plain")
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.cumsum(1))
    with pytest.raises(ModelError, match=r"'recurrent' .*same in a packed line as alone"):
        check_packed_read(model, "recurrent")


def test_a_family_with_attention_of_its_own_is_refused():
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2)
    config._attn_implementation = PACKED_ATTENTION
    with pytest.raises(ModelError, match=r"'bloom' \(BloomForCausalLM\): .*cannot be read packed"):
        check_packed_read(BloomForCausalLM(config), "bloom")


def test_groups_are_neighbours_and_waste_little():
    generator = np.random.default_rng(0)
    lengths = np.sort(generator.lognormal(4.0, 1.2, size=600).astype(np.int64) + 1)
    groups = group_by_length(lengths)
    assert np.concatenate(groups).tolist() == lengths.tolist()
    padded = [group.max() * len(group) for group in groups]
    assert all(size <= 2 * group.sum() for size, group in zip(padded, groups, strict=True))
    assert sum(padded) < 1.25 * lengths.sum()
    assert len(groups) < 40

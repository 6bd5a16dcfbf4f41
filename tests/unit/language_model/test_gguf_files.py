"""A .gguf file becomes a folder of the same model, or is refused with what stands in the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils.import_utils import is_gguf_available

from distill_system.errors import ModelError
from distill_system.language_model import convert_gguf, is_gguf

needs_gguf = pytest.mark.skipif(not is_gguf_available(), reason="the package gguf is no must")

TEMPLATE = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
TENSOR_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(
            **shape,
            **heads,
            vocab_size=261,
            rope_parameters={"rope_type": "default", "rope_theta": 5e4},
            rms_norm_eps=1e-5,
            max_position_embeddings=64,
            initializer_range=0.2,
            tie_word_embeddings=True,
        )
    ).eval()


def _interleave(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The rows of each head in llama.cpp's order: the two halves of a rotation side by side."""
    halves = weight.unflatten(0, (num_heads, 2, -1))
    return halves.transpose(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    *,
    leave_out: str = "",
    settings: dict[str, object] | None = None,
    extra: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Write the model as llama.cpp's own converter does, with a tokenizer of one token a byte."""
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    shape = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_rope_freq_base(shape.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_vocab_size(shape.vocab_size)
    for name, value in (settings or {}).items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"llama.{name}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["<unk>", "<s>", "</s>", "<pad>", *sorted(ByteLevel.alphabet()), "ab"])
    writer.add_token_types([3] * 4 + [1] * 257)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(3)
    writer.add_chat_template(TEMPLATE)
    tensors = dict(_llama_cpp_tensors(model))
    for name, tensor in {**tensors, **(extra or {})}.items():
        if name != leave_out:
            writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _llama_cpp_tensors(model: LlamaForCausalLM):
    heads = {
        "attn_q": model.config.num_attention_heads,
        "attn_k": model.config.num_key_value_heads,
    }
    yield "token_embd.weight", model.model.embed_tokens.weight.detach()
    yield "output_norm.weight", model.model.norm.weight.detach()
    for index, block in enumerate(model.model.layers):
        for ours, theirs in TENSOR_NAMES.items():
            weight = block.get_submodule(ours).weight.detach()
            if theirs in heads:
                weight = _interleave(weight, heads[theirs])
            yield f"blk.{index}.{theirs}.weight", weight


@needs_gguf
def test_the_folder_holds_the_same_model_tokenizer_and_template(model, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", model)
    folder = convert_gguf(file, tmp_path / "folder")
    converted = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[7, 100, 31, 2, 9, 255]])
    with torch.no_grad():
        assert torch.allclose(converted(ids).logits, model(ids).logits, atol=1e-5)
    assert converted.dtype == torch.float32
    assert converted.config.tie_word_embeddings
    assert converted.generation_config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size, "no token without a row"
    assert tokenizer.decode(tokenizer("so ist es, ä")["input_ids"]) == "so ist es, ä"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<s>",
        "</s>",
        "<pad>",
    )
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert chat == "<s>ab</s>"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "tiny.gguf"]


@needs_gguf
def test_the_weights_may_be_written_in_bfloat16(model, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", model)
    folder = convert_gguf(file, tmp_path / "folder", dtype=torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


@needs_gguf
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"leave_out": "blk.1.ffn_up.weight"}, r"without the tensors .*layers\.1\.mlp\.up_proj"),
        (
            {"extra": {"rope_freqs.weight": torch.ones(8)}},
            r"transformers does not read, rope_freqs\.weight",
        ),
        (
            {"settings": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}},
            r"rope\.scaling\.type=yarn, rope\.scaling\.factor=4\.0",
        ),
        ({"settings": {"logit_scale": 0.5}}, r"logit_scale=0\.5"),
    ],
)
def test_what_transformers_would_leave_out_is_refused(
    model, tmp_path: Path, change: dict, told: str
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", model, **change)
    with pytest.raises(ModelError, match=told):
        convert_gguf(file, tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


@needs_gguf
def test_settings_without_effect_are_no_hindrance(model, tmp_path: Path) -> None:
    none = {"rope.scaling.type": "none", "rope.scaling.factor": 1.0}
    file = write_gguf(tmp_path / "tiny.gguf", model, settings=none)
    assert convert_gguf(file, tmp_path / "folder").is_dir()


@needs_gguf
def test_a_truncated_file_is_told(model, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", model)
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ModelError, match=r"tiny\.gguf': transformers cannot read it"):
        convert_gguf(file, tmp_path / "folder")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "found none"),
        (b"", "begins with the letters GGUF, got b''"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_a_file_that_is_no_gguf_file_is_told(tmp_path: Path, content, told: str) -> None:
    file = tmp_path / "tiny.gguf"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ModelError, match=told):
        convert_gguf(file, tmp_path / "folder")


def test_without_the_package_the_way_to_install_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill_system.language_model.gguf_files.is_gguf_available", lambda: False)
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF\x03")
    with pytest.raises(ModelError, match=r"pip install 'distill-system\[gguf\]'"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "folder")


def test_a_gguf_file_is_told_by_its_name() -> None:
    assert is_gguf("models/SmolLM2.Q4_1.GGUF")
    assert not is_gguf("models/gguf")

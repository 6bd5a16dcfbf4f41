"""torch's attention for packed lines on CUDA, against each sequence read alone."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from distill_system.language_model.packed_attention import (
    PACKED_ATTENTION,
    PackedLayout,
    read_line,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
LENGTHS = [1, 2, 7, 40, 41, 130]
SHAPE = {
    "vocab_size": 100,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


@pytest.mark.parametrize(
    "config",
    [LlamaConfig(**SHAPE), MistralConfig(**SHAPE, sliding_window=16)],
    ids=["causal", "sliding_window"],
)
def test_a_packed_line_in_bfloat16_reads_each_sequence_as_alone(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, attn_implementation=PACKED_ATTENTION
    )
    model = model.to("cuda").eval()
    ids_1T = torch.randint(100, (1, sum(LENGTHS)), device="cuda")
    with torch.inference_mode():
        packed_TH = read_line(model, ids_1T, PackedLayout.build(LENGTHS, torch.device("cuda")))
        alone = [model.base_model(input_ids=part_1L) for part_1L in ids_1T.split(LENGTHS, dim=1)]
    alone_TH = torch.cat([output.last_hidden_state[0] for output in alone])
    torch.testing.assert_close(packed_TH, alone_TH, atol=5e-2, rtol=5e-2)


def test_gradients_of_a_packed_line_in_bfloat16_are_those_of_float32():
    gradients = []
    # Weighed at random: the last norm gives every row one length, whatever the weights are.
    weights_TH = torch.randn(sum(LENGTHS), SHAPE["hidden_size"]).cuda()
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**SHAPE), dtype=torch.float32, attn_implementation=PACKED_ATTENTION
        )
        model = model.to("cuda", dtype).eval()
        ids_1T = torch.randint(100, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
        layout = PackedLayout.build(LENGTHS, torch.device("cuda"))
        (read_line(model, ids_1T.cuda(), layout).float() * weights_TH).mean().backward()
        gradients.append(model.base_model.layers[0].self_attn.q_proj.weight.grad.float())
    low, full = gradients
    assert float((low - full).norm() / full.norm()) < 5e-2

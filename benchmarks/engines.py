"""Both generation engines on one model, side by side: tokens a second, in turn, in one process.

    python benchmarks/engines.py [--prompts 64] [--response 24] [--rounds 8] [--hidden 64]

The model has the quickstart student's shape unless another size is given, random weights and no end
of sequence that is likely, so that both write equally much. Each round gives the same prompts, new
seeds, first to vLLM and then to transformers. Printed: median tokens a second of each and their
ratio, and how far their log-probabilities are from one another's on equal tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

VOCABULARY = 256
QUICKSTART = Path(__file__).parents[1] / "configs/quickstart.yaml"


def save_model(folder: str, *, hidden: int, layers: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from distill_system.config import load_config
    from distill_system.data import build_tokenizer

    build_tokenizer(load_config([QUICKSTART]), []).save_pretrained(folder)  # vLLM asks for one
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 21 // 8,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 32),
        num_key_value_heads=max(1, hidden // 32),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=2,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)


def build(folder: str, library: Any, *, longest: int) -> Any:
    from distill_system.config.rollout import EngineConfig
    from distill_system.rollout.engine import EngineSpecification, build_engine

    return build_engine(
        EngineSpecification(
            model_path=folder,
            config=EngineConfig(kv_cache_mebibytes=256),
            config_key="rollout.student_engine",
            max_model_length=longest,
            uses_gpu=False,
            tensor_parallel_size=1,
            weight_transfer_backend=None,
            trust_remote_code=False,
            engine=library,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--response", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    asked = parser.parse_args()
    from distill_system.rollout import Sampling, engine_environment

    os.environ.update(engine_environment(uses_gpu=False))
    import numpy as np

    rng = np.random.default_rng(0)
    prompts = [
        rng.integers(4, VOCABULARY, n).astype(np.int32) for n in rng.integers(8, 40, asked.prompts)
    ]
    sampling = Sampling(temperature=1.0, max_response_tokens=asked.response)
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, hidden=asked.hidden, layers=asked.layers)
        libraries = ("vllm", "transformers")
        engines = {name: build(folder, name, longest=48 + asked.response) for name in libraries}
    rates: dict[str, list[float]] = {name: [] for name in libraries}
    for turn in range(asked.rounds + 1):
        for name, engine in engines.items():
            seeds = [1000 * turn + at for at in range(len(prompts))]
            began = time.perf_counter()
            written = engine.complete(prompts, sampling, seeds)
            seconds = time.perf_counter() - began
            if turn:  # the first round warms up
                rates[name].append(sum(c.token_ids.size for c in written) / seconds)
    medians = {name: statistics.median(rate) for name, rate in rates.items()}
    medians["ratio"] = medians["transformers"] / medians["vllm"]
    print(json.dumps({name: round(value, 3) for name, value in medians.items()}))


if __name__ == "__main__":
    main()

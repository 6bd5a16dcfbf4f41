"""Models small enough to be made afresh by the tests that need one."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# No example has a deadline: a busy machine is no failure.
settings.register_profile("busy_machine", deadline=None)
settings.load_profile("busy_machine")

# A test's cluster lives on this machine for seconds: no token file in the home directory, no
# report of its use.  Both must stand before Ray is imported.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Nor processes in advance, for tasks: our workers have environments, and processes, of their own.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
# Models here are so small that a second thread costs more than it does, and files run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a Hugging Face folder: a Llama of random weights and a word-level tokenizer.

    Call it with any of: tie_word_embeddings, hidden_size, num_layers, num_heads, vocab_size,
    max_position_embeddings, initializer_range, seed.  The same call gives the same folder, so do
    not write into it.  Token ids: 0 pad, 1 bos, 2 eos, 3 unk.
    """
    made: dict[tuple[object, ...], Path] = {}

    def make(
        *,
        tie_word_embeddings: bool = True,
        hidden_size: int = 64,
        num_layers: int = 2,
        num_heads: int = 2,  # vLLM on a CPU wants heads of 32, 64, 80, ... components
        vocab_size: int = 64,
        max_position_embeddings: int = 128,
        initializer_range: float = 0.2,  # large, so that no two tokens are nearly as likely
        seed: int = 0,
    ) -> Path:
        key = (
            tie_word_embeddings,
            hidden_size,
            num_layers,
            num_heads,
            vocab_size,
            max_position_embeddings,
            initializer_range,
            seed,
        )
        if key in made:
            return made[key]
        import torch
        from tiny_families import save_tokenizer
        from transformers import LlamaConfig, LlamaForCausalLM

        folder = tmp_path_factory.mktemp("tiny_model")
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_heads,
            max_position_embeddings=max_position_embeddings,
            tie_word_embeddings=tie_word_embeddings,
            initializer_range=initializer_range,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            LlamaForCausalLM(config).save_pretrained(folder)
        save_tokenizer(folder, vocab_size)
        made[key] = folder
        return folder

    return make

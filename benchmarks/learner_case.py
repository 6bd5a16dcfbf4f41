"""What benchmarks/learner.py measures: a student, ragged sequences, and how to measure a process.

Each form of the student's step (ours packed, ours padded, TRL's trainer) runs in a process of its
own. The process first makes a small step on a tiny model, so that libraries and their first-time
work are behind it; then its peak of memory begins anew, the model is made, and at each STEP it
makes one step and answers with the seconds and the tokens; at STOP it answers with its peak.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from dataclasses import dataclass, replace

import numpy as np
import torch
from objective_forms import CLOCKS, PeakMemory

from distill_system.config.model import ArchitectureConfig
from distill_system.language_model import LanguageModel, build_language_model

SEED = 0
SHORTEST_PROMPT, SHORTEST_RESPONSE = 4, 4
SPREAD = 0.8
"""Standard deviation of the logarithm of a length: the longest of 32 is about 5 times the median,
as among instructions and their answers."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One process.

    form: ours, padded or trl. longest: tokens of the longest sequence that may come.
    sequences: of one step. microbatch_tokens: of ours; rows_per_microbatch: of TRL.
    sampler: transformers' train_sampling_strategy, of TRL alone.
    """

    form: str
    longest: int
    sequences: int
    steps: int
    hidden_size: int
    num_layers: int
    vocabulary: int
    dtype: str
    device: str
    threads: int
    clock: str
    ranks: int = 1
    checkpointing: bool = False
    microbatch_tokens: int | None = None
    rows_per_microbatch: int = 8
    sampler: str = "random"

    @property
    def architecture(self) -> ArchitectureConfig:
        """The student: Llama-shaped, tied."""
        return ArchitectureConfig(
            hidden_size=self.hidden_size,
            intermediate_size=8 * self.hidden_size // 3 // 8 * 8,
            num_layers=self.num_layers,
            num_heads=max(1, self.hidden_size // 64),
            max_position_embeddings=self.longest,
            tie_word_embeddings=True,
        )

    @property
    def alone_and_tiny(self) -> Case:
        """The same of a size that only warms up, on one rank."""
        size = {"hidden_size": 64, "num_layers": 1, "vocabulary": 64, "longest": 32}
        return replace(self, **size, sequences=self.rows_per_microbatch, steps=2, ranks=1)


@dataclass(frozen=True)
class Sequence:
    """token_ids int32 [P+T]."""

    token_ids: np.ndarray
    num_prompt_tokens: int

    @property
    def num_response_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


def draw_sequences(case: Case) -> list[Sequence]:
    """Enough for all steps: log-normal prompts and responses, the same in every form."""
    generator = np.random.default_rng(SEED)
    number = case.sequences * case.steps
    median = case.longest / 10

    def lengths(shortest: int) -> np.ndarray:
        drawn = np.exp(generator.normal(np.log(median), SPREAD, number)).round().astype(int)
        return drawn.clip(shortest, case.longest // 2)

    pairs = zip(lengths(SHORTEST_PROMPT), lengths(SHORTEST_RESPONSE), strict=True)
    return [
        Sequence(generator.integers(4, case.vocabulary, p + t).astype(np.int32), int(p))
        for p, t in pairs
    ]


def deal_steps(case: Case) -> list[list[Sequence]]:
    """The sequences of each step, in the order drawn."""
    every = draw_sequences(case)
    return [every[i : i + case.sequences] for i in range(0, len(every), case.sequences)]


def count_flops(case: Case, sequences: list[Sequence]) -> float:
    """What forward and backward of the model need; what checkpointing makes again is not counted.

    6 per weight and token; the unembedding on response tokens alone; causal attention.
    """
    shape = case.architecture
    hidden, inner = shape.hidden_size, shape.intermediate_size
    block = 4 * hidden * hidden + 3 * hidden * inner
    tokens = sum(len(sequence.token_ids) for sequence in sequences)
    responses = sum(sequence.num_response_tokens for sequence in sequences)
    squares = sum(len(sequence.token_ids) ** 2 for sequence in sequences)
    weights = 6.0 * (shape.num_layers * block * tokens + case.vocabulary * hidden * responses)
    return weights + 6.0 * shape.num_layers * hidden * squares


def measure_peak_flops(case: Case) -> float:
    """Floating-point operations per second of a square matrix product, the best of ten.

    In the case's precision and on its clock, so that it is what a step could reach at most.
    """
    size, read_clock = 8192 if case.device == "cuda" else 1024, CLOCKS[case.clock]
    dtype = getattr(torch, case.dtype)
    left, right = (torch.randn(size, size, device=case.device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(11):
        synchronise(case.device)
        started = read_clock()
        left @ right
        synchronise(case.device)
        best = min(best, read_clock() - started)
    return 2.0 * size**3 / best


def synchronise(device: str) -> None:
    """Wait for a GPU to finish what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def begin_memory(case: Case) -> PeakMemory:
    """Start to count memory from here; what the warm-up left unused goes back to the system."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return PeakMemory(torch.device(case.device))


def build_plain_model(case: Case) -> LanguageModel:
    """The student with transformers' own attention, as its own loading would give it."""
    model = build_language_model(
        case.architecture,
        vocab_size=case.vocabulary,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        seed=SEED,
    )
    model.set_attn_implementation("sdpa")
    return model.to(case.device)

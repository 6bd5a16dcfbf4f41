"""What fits where by the plan's account: Llama-shaped models of 1 to 70 billion parameters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from transformers import LlamaConfig

from distill_system.config import RunConfig, load_config
from distill_system.planning import Memory, ModelShape, learner_memory, measure_shape, scorer_memory
from distill_system.planning.loads import distillation_load
from distill_system.planning.memory import GIB, PROCESS_BYTES

DEVICES = (80, 141)
QUICKSTART = Path(__file__).parents[1] / "configs/quickstart.yaml"


@cache
def _shapes() -> dict[str, ModelShape]:
    """Llama-shaped models with the sizes of well-known ones."""
    sizes = {
        "1B": (2048, 8192, 16, 32, 8, True),
        "3B": (3072, 8192, 28, 24, 8, True),
        "8B": (4096, 14336, 32, 32, 8, False),
        "14B": (5120, 13824, 48, 40, 8, False),
        "32B": (5120, 27648, 64, 40, 8, False),
        "70B": (8192, 28672, 80, 64, 8, False),
    }
    return {
        name: measure_shape(
            LlamaConfig(
                vocab_size=128_256,
                hidden_size=hidden,
                intermediate_size=inner,
                num_hidden_layers=blocks,
                num_attention_heads=heads,
                num_key_value_heads=key_heads,
                tie_word_embeddings=tied,
            ),
            name=name,
        )
        for name, (hidden, inner, blocks, heads, key_heads, tied) in sizes.items()
    }


def _config(settings: Sequence[str]) -> RunConfig:
    """A step of 64 sequences of 512 + 512 tokens, half of them in each stream."""
    text = [
        "teacher.architecture.max_position_embeddings=1024",
        "student.architecture.max_position_embeddings=1024",
        "data.max_prompt_tokens=512",
        "rollout.sampling.max_response_tokens=512",
        "distill.student_prompts_per_step=32",
        "distill.teacher_prompts_per_step=32",
        "distill.action_dimension=256",
    ]
    return load_config([QUICKSTART], [*text, *settings])


def student_rows() -> list[dict[str, str]]:
    """GiB of a learner rank: bfloat16, activation checkpointing, 8,192 tokens at once, AMMD.

    64 sequences of 512 + 512 tokens a step; the teacher's hidden size is 8,192.
    """
    rows = []
    for name in _shapes():
        row = {"student": name}
        for ranks in (1, 8):
            row[f"full, {ranks} GPU"] = _gib(_learner(name, ranks, 0))
        row["LoRA, 1 GPU"] = _gib(_learner(name, 1, 16))
        for device in DEVICES:
            row[f"fewest GPUs of {device} GiB, full"] = _fewest(name, device, 0)
            row[f"and LoRA ({device})"] = _fewest(name, device, 16)
        rows.append(row)
    return rows


@cache
def _learner(name: str, ranks: int, lora_rank: int) -> Memory:
    config = _config(
        [
            f"pools.learner={{count: {ranks}, gpus: 1}}",
            "pools.student_rollout={count: 1, gpus: 1}",
            "learner={compute_dtype: bfloat16, activation_checkpointing: true, "
            "shard_ranks: all, max_tokens_per_microbatch: 8192}",
            *([f"distill.update={{type: lora, rank: {lora_rank}}}"] if lora_rank else []),
        ]
    )
    return learner_memory(distillation_load(config, _shapes()[name], _shapes()["70B"]))


def _fewest(name: str, device: int, lora_rank: int) -> str:
    for ranks in (1, 2, 4, 8, 16, 32, 64):
        if _learner(name, ranks, lora_rank).num_bytes + PROCESS_BYTES["cuda"] <= device * GIB:
            return str(ranks)
    return "more than 64"


def teacher_rows() -> list[dict[str, str]]:
    """GiB of a scorer of one rank, the fewest ranks that fit; GPUs of one rollout engine with 8
    GiB of cache each."""
    rows = []
    for name, shape in _shapes().items():
        row = {"teacher": name, "scorer": _gib(_scorer(name, 1))}
        for device in DEVICES:
            row[f"ranks of {device} GiB for a scorer"] = _fewest_ranks(name, device)
        for device in DEVICES:
            row[f"GPUs of {device} GiB for an engine"] = _engine_gpus(shape, device)
        rows.append(row)
    return rows


@cache
def _scorer(name: str, ranks: int) -> Memory:
    settings = ["pools.teacher_scoring={count: 1, gpus: 1}", "scoring.dtype=bfloat16"]
    config = _config([*settings, f"scoring.shard_ranks={ranks}"])
    return scorer_memory(config, _shapes()[name])


def _fewest_ranks(name: str, device: int) -> str:
    for ranks in (1, 2, 4, 8):
        memory = _scorer(name, ranks)
        if memory.num_bytes + PROCESS_BYTES["cuda"] <= device * GIB:
            return f"{ranks} ({_gib(memory)} GiB)" if ranks > 1 else "1"
    return "more than 8"


def _engine_gpus(shape: ModelShape, device: int) -> str:
    room = 0.9 * device * GIB - PROCESS_BYTES["cuda"] - 8 * GIB
    return next(str(g) for g in (1, 2, 4, 8) if 2 * shape.num_parameters / g <= room)


def _gib(memory: Memory) -> str:
    return f"{(memory.num_bytes + PROCESS_BYTES['cuda']) / GIB:.0f}"


def format_markdown(rows: Sequence[dict[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

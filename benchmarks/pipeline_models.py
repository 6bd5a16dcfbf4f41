"""The models and prompts that both systems of benchmarks/pipeline.py read: made once, no download.

Teacher and student have the quickstart's sizes and random weights. How long a response gets is the
model's own doing: one component of the residual stream is the same at every token, and the row of
the end token reads it alone, so that the response ends at each token with one chance. "ragged":
lengths are geometric with a mean of a quarter of the longest, and are cut there. "fixed": the end
token has no chance, and every response is as long as the longest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from distill_system.config import RunConfig, load_config
from distill_system.config.model import ArchitectureConfig
from distill_system.data import PromptFrontier, build_tokenizer, load_run_data, source_shares
from distill_system.data.run_data import SetName
from distill_system.language_model import build_language_model

SEED = 0
QUICKSTART = Path(__file__).parents[1] / "configs/quickstart.yaml"
MEAN_SHARE = 0.25
"""Mean length of ragged responses, of the longest, but for what is cut."""
NUM_PROMPTS = 4000
LEARNING_RATE = 1e-4
NEVER = -60.0
"""Logit of a token that is not to be sampled."""
LOGIT_SPREAD = 1.5
"""Standard deviation of the other tokens' logits."""

Lengths = Literal["ragged", "fixed"]

SIZES = {
    "teacher": {"hidden_size": 128, "intermediate_size": 344, "num_layers": 4, "num_heads": 4},
    "student": {"hidden_size": 64, "intermediate_size": 168, "num_layers": 2, "num_heads": 2},
}
MAX_PROMPT_TOKENS = 48


@dataclass(frozen=True)
class Workload:
    """What both systems do: `sequences` responses of at most `longest` tokens in each step."""

    lengths: Lengths
    longest: int = 128
    sequences: int = 128
    steps: int = 20
    warm_up: int = 4

    @property
    def max_model_length(self) -> int:
        return MAX_PROMPT_TOKENS + self.longest


def make_models(folder: Path, workload: Workload) -> Path:
    """Write teacher, student and the prompts in the order of the steps; once for each folder."""
    made = folder / f"{workload.lengths}_{workload.longest}_{workload.sequences}x{workload.steps}"
    if (made / "prompts.json").exists():
        return made
    made.mkdir(parents=True, exist_ok=True)
    write_configuration(made / "run.yaml", made, workload, {})
    config = load_config([made / "run.yaml"])
    tokenizer = build_tokenizer(load_config([QUICKSTART]), None)
    for role in SIZES:
        model = _build_model(role, tokenizer, workload)
        model.save_pretrained(made / role)
        tokenizer.save_pretrained(made / role)
    prompts = _prompts_in_order(config, tokenizer, workload)
    (made / "prompts.json").write_text(json.dumps(prompts))
    return made


def write_configuration(
    path: Path, models: Path, workload: Workload, settings: dict[str, Any]
) -> None:
    """Our system's configuration of the workload; nothing is measured or kept that need not be."""
    few = {"type": "embedded", "split": "in_distribution", "num_examples": 2, "seed": 99}
    engine = {"kv_cache_mebibytes": 128, "max_num_sequences": 256}
    half = workload.sequences // 2  # a stream that is not read leaves its sequences to the other
    tree = {
        "name": path.stem,
        "runs_directory": str(path.parent),
        "seed": SEED,
        "data": {
            "prompt_template": "{prompt}<sep>",
            "max_prompt_tokens": MAX_PROMPT_TOKENS,
            "prompts": {
                "type": "embedded",
                "split": "train",
                "num_examples": NUM_PROMPTS,
                "seed": 3,
            },
            "held_out": few,
            "evaluation": {"in_distribution": {**few, "seed": 7}},
        },
        "teacher": {"path": str(models / "teacher")},
        "student": {"path": str(models / "student")},
        "rollout": {
            "sampling": {"temperature": 1.0, "max_response_tokens": workload.longest},
            "student_engine": dict(engine),
            "teacher_engine": dict(engine),
        },
        "scoring": {},
        "learner": {},
        "distill": {
            "steps": workload.steps,
            "student_prompts_per_step": workload.sequences - half,
            "teacher_prompts_per_step": half,
            "objective": {"type": "token_matching", "on_policy": {"type": "reverse_kl"}},
            "optimizer": {
                "type": "adamw",
                "learning_rate": LEARNING_RATE,
                "warmup_steps": 0,
            },
            "measure_every": workload.steps,
            "evaluate_every": None,
            "checkpoint_every": workload.steps,
        },
        "cluster": {"dashboard": False},
        "pools": {
            pool: {"count": 1, "cpus": 0.2}
            for pool in ("student_rollout", "teacher_rollout", "teacher_scoring", "learner")
        },
    }
    path.write_text(yaml.safe_dump(_merge(tree, settings)))


def _merge(tree: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by dotted key over a tree."""
    for key, value in settings.items():
        *sections, last = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return tree


@torch.no_grad()
def _build_model(role: str, tokenizer: Any, workload: Workload) -> Any:
    """Random weights, but for the component 0 of every hidden state and the rows that read it."""
    model = build_language_model(
        ArchitectureConfig(
            **SIZES[role],
            max_position_embeddings=workload.max_model_length,
            tie_word_embeddings=False,
        ),
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        seed=SEED,
    )
    width = SIZES[role]["hidden_size"]
    embedding_VH, unembedding_VH = model.model.embed_tokens.weight, model.lm_head.weight
    embedding_VH.normal_()
    embedding_VH[:, 0] = width**0.5
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0
    unembedding_VH.normal_(std=LOGIT_SPREAD * (2 / width) ** 0.5)
    unembedding_VH[:, 0] = 0
    _set_end_chance(model, tokenizer, workload)
    return model


def _set_end_chance(model: Any, tokenizer: Any, workload: Workload) -> None:
    """Let each token end the response with one chance; padding is never sampled."""
    special = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    unembedding_VH = model.lm_head.weight
    unembedding_VH[special] = 0
    ids_BL = torch.randint(4, len(tokenizer), (32, 64), generator=torch.manual_seed(SEED))
    hidden_NH = model.model(input_ids=ids_BL).last_hidden_state.flatten(0, 1)
    constant = float(hidden_NH[:, 0].mean())
    unembedding_VH[special, 0] = NEVER / constant
    if workload.lengths == "ragged":
        wanted = 1 / (MEAN_SHARE * workload.longest)
        logit = _find_logit(hidden_NH @ unembedding_VH.T, wanted)
        unembedding_VH[tokenizer.eos_token_id, 0] = logit / constant


def _find_logit(logits_NV: Tensor, wanted: float) -> float:
    """The logit at which one more token has the wanted mean probability, by halving."""
    rest_N = logits_NV.logsumexp(-1)
    low, high = -20.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        is_low = float((middle - rest_N).sigmoid().mean()) < wanted
        low, high = (middle, high) if is_low else (low, middle)
    return low


def _prompts_in_order(config: RunConfig, tokenizer: Any, workload: Workload) -> Sequence[str]:
    """The prompts as our system walks over them, for the other system to read them likewise."""
    wanted: tuple[SetName, ...] = ("prompts",)
    prompts = load_run_data(config, tokenizer, sets=wanted).prompts
    shares = source_shares(prompts, config.data.prompt_weights)
    walk = PromptFrontier(shares, config.seed, "student_prompts")
    taken = walk.take(workload.sequences * workload.steps)
    return [tokenizer.decode(prompts[at].token_ids) for at in taken]

"""`distill-system init`: two models and a file of rows in, a commented configuration out.

Everything in it is fitted to what it was given: the sets to the number of rows, the lengths to the
rows as the models will read them, the workers to this machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill_system.cluster import machine_supply
from distill_system.config import RunConfig, load_config
from distill_system.data import build_tokenizer, load_run_data
from distill_system.data.layouts import PROMPT_COLUMNS, TEXT_COLUMN
from distill_system.errors import ConfigError, DataError
from distill_system.planning import ModelShape, read_shape
from distill_system.records import Prompt, Trajectory
from distill_system.run.model_checks import check_folders

MOST_TESTED, TESTED_SHARE = 200, 0.1
"""Rows of the test set, and of the held-out set, are a tenth of the file each, at most so many."""
MOST_PER_STEP, MOST_STEPS, FEWEST_STEPS, EPOCHS = 32, 500, 50, 3
ROUND_TO = 8
USUAL_RESPONSE_TOKENS = 256
"""Where the file has no answers to measure."""
COVERED = 0.95
"""Share of the answers that the longest response leaves whole."""
ANY_LENGTH = 1_000_000
MIB = 2**20
ENGINE_ON_A_SHARED_GPU = ", gpu_memory_utilization: 0.2, enforce_eager: true"
"""vLLM wants this share of the GPU free when it starts, whatever the size of the cache."""
CACHE_MEBIBYTES = (64, 4096)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What was found in the file of rows.

    source: its keys of data.* without the range of rows.  lengths: [N], tokens of each prompt.
    answers: [N], tokens of each answer; empty where the file has none.
    """

    source: Mapping[str, Any]
    lengths: Sequence[int]
    answers: Sequence[int]
    uses_chat_template: bool


def new_configuration(teacher: str, student: str, data: Path, *, name: str) -> str:
    """The text of a configuration that distils these two models on this file.

    Raises: DistillError if a model or the file cannot be read.
    """
    shapes = [
        read_shape(path, key=key) for key, path in (("TEACHER", teacher), ("STUDENT", student))
    ]
    rows = _read_rows(teacher, student, data)
    return _render(name, teacher, student, data, rows, shapes)


def _read_rows(teacher: str, student: str, data: Path) -> Rows:
    source = {"type": "files", "path": data.name}  # columns of the usual names are found
    config = _provisional(teacher, student, data, source, chat=False)
    check_folders(config)
    tokenizer = build_tokenizer(config, None)
    uses_chat_template = bool(tokenizer.chat_template)
    config = _provisional(teacher, student, data, source, chat=uses_chat_template)
    prompts: Sequence[Prompt] = load_run_data(config, tokenizer, ["prompts"]).prompts
    answers: Sequence[Trajectory] = ()
    try:
        answers = load_run_data(config, tokenizer, ["student_sft"]).student_sft
    except DataError:  # prompts alone, which the test set must be told
        source = _without_answers(teacher, student, data, source, tokenizer)
    return Rows(
        source=source,
        lengths=[int(prompt.token_ids.size) for prompt in prompts],
        answers=[answer.num_response_tokens for answer in answers],
        uses_chat_template=uses_chat_template,
    )


def _without_answers(
    teacher: str, student: str, data: Path, source: Mapping[str, Any], tokenizer: Any
) -> dict[str, Any]:
    """The source with the column of its prompts named, and none of answers.

    Raises: DataError if no column of a usual name can be read.
    """
    problem = None
    for column in (*PROMPT_COLUMNS, "instruction", TEXT_COLUMN):
        fields = {"format": "prompt_response", "prompt": column, "response": None}
        named = {**source, "fields": fields}
        try:
            config = _provisional(teacher, student, data, named, chat=False)
            load_run_data(config, tokenizer, ["prompts"])
        except DataError as error:
            problem = problem or error
        else:
            return named
    assert problem is not None, "there are usual names"
    raise problem


def _provisional(
    teacher: str, student: str, data: Path, source: Mapping[str, Any], *, chat: bool
) -> RunConfig:
    """A configuration that reads all rows, whatever their length."""
    apart = {"type": "embedded", "split": "distractor", "num_examples": 1}
    settings = {
        "name": "provisional",
        "data": {
            "directory": str(data.parent.absolute()),
            "max_prompt_tokens": ANY_LENGTH,
            "use_chat_template": chat,
            "prompts": source,
            "student_sft": source,
            "held_out": apart,
            "evaluation": {"test": apart},
        },
        "teacher": {"path": teacher},
        "student": {"path": student},
        "rollout": {"sampling": {"max_response_tokens": 1}},
        "distill": {"steps": 1, "optimizer": {"learning_rate": 1.0}},
    }
    return load_config([settings])


def _render(
    name: str,
    teacher: str,
    student: str,
    data: Path,
    rows: Rows,
    shapes: Sequence[ModelShape],
) -> str:
    num_rows = len(rows.lengths)
    num_tested = min(MOST_TESTED, int(TESTED_SHARE * num_rows))
    if num_tested < 1:
        raise ConfigError(
            f"DATA={str(data)!r}: expected at least 10 rows, of which a tenth each is held out and "
            f"tested, got {num_rows}"
        )
    prompt_tokens, response_tokens = _choose_lengths(rows, shapes)
    num_prompts = num_rows - 2 * num_tested
    per_step = max(1, min(MOST_PER_STEP, num_prompts))
    steps = min(MOST_STEPS, max(FEWEST_STEPS, EPOCHS * num_prompts // per_step))
    longest = prompt_tokens + response_tokens
    caches = {
        role: _cache_mebibytes(shape, per_step, longest)
        for role, shape in zip(("teacher", "student"), shapes, strict=True)
    }
    pools, dtype, remark = _choose_pools()
    shares_gpu = any(0.0 < pool.get("gpus", 0.0) < 1.0 for pool in pools.values())
    sharing = ENGINE_ON_A_SHARED_GPU if shares_gpu else ""
    left_out = sum(length > prompt_tokens for length in rows.lengths)
    said = "; {} rows are left out, which the models' context has no room for" if left_out else ""

    def part(skip: int, count: int | None) -> str:
        of_rows = {**rows.source, "skip": skip}
        if count is not None:
            of_rows["num_examples"] = count
        if left_out:
            of_rows["max_prompt_tokens"] = prompt_tokens
        return json.dumps(of_rows, ensure_ascii=False)

    scored = "by ROUGE-L" if rows.answers else "no answers in the file: lengths alone are measured"
    return f"""\
# Distils {student} from {teacher} on {data.name}, a file of {num_rows} rows.
# Look at it first:  distill-system plan {name}.yaml
# Then:              distill-system train {name}.yaml
# All keys: docs/configuration.md
name: {json.dumps(name)}                # the run's folder is runs/{name}
teacher: {{path: {json.dumps(teacher)}}}
student: {{path: {json.dumps(student)}}}
data:
  directory: {json.dumps(str(data.parent.absolute()))}
  # The longest prompt has {max(rows.lengths)} tokens{said.format(left_out)}.
  max_prompt_tokens: {prompt_tokens}
  # Whether plain prompts go through the tokenizer's chat template, as one message of the user.
  use_chat_template: {json.dumps(rows.uses_chat_template)}
  # The first rows are the test set, the next are held out, the rest is learned from. If the file
  # is sorted, shuffle it before.
  evaluation:
    test: {part(0, num_tested)}
  held_out: {part(num_tested, num_tested)}
  prompts: {part(2 * num_tested, None)}
rollout:
  # {_say_answers(rows, response_tokens)}
  sampling: {{max_response_tokens: {response_tokens}, temperature: 1.0}}
  student_engine: {{dtype: {dtype}, kv_cache_mebibytes: {caches["student"]}{sharing}}}
  teacher_engine: {{dtype: {dtype}, kv_cache_mebibytes: {caches["teacher"]}{sharing}}}
scoring: {{dtype: {dtype}}}
distill:
  steps: {steps}
  student_prompts_per_step: {per_step}        # answered by the student, read by the teacher
  teacher_prompts_per_step: {per_step}        # answered by the teacher
  objective: {{type: ammd, on_policy_weight: 0.5}}   # or a method by name: --objective gkd
  # A starting point: a small student of another family may want ten times as much or as little.
  optimizer: {{learning_rate: 1e-5, schedule: cosine, warmup_ratio: 0.05}}
  measure_every: {max(1, steps // 20)}          # held-out losses
  checkpoint_every: {max(1, steps // 5)}       # train --resume goes on from the newest
  keep_best: {{metric: held_out/cross_entropy, mode: min}}
evaluation: {{metrics: [rouge_l]}}          # {scored}
# {remark}
pools:
{_render_pools(pools)}"""


def _choose_lengths(rows: Rows, shapes: Sequence[ModelShape]) -> tuple[int, int]:
    """Longest prompt and longest response in tokens, within the context of both models."""
    limits = [getattr(shape.config, "max_position_embeddings", None) for shape in shapes]
    room = min([limit for limit in limits if limit is not None], default=ANY_LENGTH)
    response = USUAL_RESPONSE_TOKENS
    if rows.answers:
        response = _round_up(int(np.quantile(rows.answers, COVERED, method="higher")))
    response = min(response, max(1, room // 2))
    prompt = min(_round_up(max(rows.lengths)), room - response)
    if not any(length <= prompt for length in rows.lengths):
        raise ConfigError(
            f"every prompt of DATA is longer than {prompt} tokens, what the models' context of "
            f"{room} leaves beside responses of {response}: choose models of longer context"
        )
    return prompt, response


def _round_up(number: int) -> int:
    return -(-number // ROUND_TO) * ROUND_TO


def _cache_mebibytes(shape: ModelShape, sequences: int, longest: int) -> int:
    """Room for keys and values of a step's sequences in float32, within bounds."""
    wanted = 2 * 4 * shape.num_blocks * shape.key_size * longest * sequences / MIB
    fewest, most = CACHE_MEBIBYTES
    return int(min(most, max(fewest, wanted)))


def _choose_pools() -> tuple[dict[str, dict[str, float]], str, str]:
    """What each worker asks of this machine, the precision of engines, and a remark on both."""
    names = ("student_rollout", "teacher_rollout", "teacher_scoring", "learner")
    supply = machine_supply()
    cpus, gpus = supply["CPU"], int(supply["GPU"])
    each = float(max(0.05, min(1.0, int(100 * cpus / len(names)) / 100)))
    if gpus >= len(names):
        pools = {name: {"cpus": each, "gpus": 1.0} for name in names}
        return pools, "bfloat16", f"Four workers on four of this machine's {gpus} GPUs."
    if gpus:
        share = 0.25 if gpus == 1 else 0.5
        pools = {name: {"cpus": each, "gpus": share} for name in names}
        return pools, "bfloat16", f"Four workers share GPUs of this machine's {gpus} (docs/gpu.md)."
    pools = {name: {"cpus": each} for name in names}
    return pools, "float32", f"Four workers share this machine's {cpus:g} CPUs."


def _render_pools(pools: Mapping[str, Mapping[str, float]]) -> str:
    lines = []
    for name, pool in pools.items():
        keys = ", ".join(f"{key}: {amount:g}" for key, amount in pool.items())
        lines.append(f"  {name}: {{{keys}}}\n")
    return "".join(lines)


def _say_answers(rows: Rows, response_tokens: int) -> str:
    if not rows.answers:
        return "The file has no answers to measure: a usual length."
    whole = sum(length <= response_tokens for length in rows.answers) / len(rows.answers)
    return f"{whole:.0%} of the file's answers are as short; the longest has {max(rows.answers)}."


def name_of(output: Path) -> str:
    """A run's name from the file of its configuration."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", output.stem).strip("-._") or "mine"

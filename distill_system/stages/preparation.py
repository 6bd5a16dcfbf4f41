"""Before any worker is asked for: the run's folder, the models' fit, the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from distill_system.config import RunConfig, dump_config
from distill_system.config.model import ModelConfig
from distill_system.data import build_tokenizer, tokenizer_texts
from distill_system.errors import ModelError, RunStateError
from distill_system.observe import RunDirectory, write_environment
from distill_system.observe.run_directory import write_text

MAY_CHANGE = (
    "deadlines",
    "pools",
    "cluster",
    "evaluation",
    "runs_directory",
    "distill.measure_every",
    "distill.evaluate_every",
    "distill.checkpoint_every",
    "distill.keep_checkpoints",
)
"""Keys that a run's second start may set otherwise: none of them changes what is learned."""


def open_run(config: RunConfig) -> RunDirectory:
    """Make or reopen the run's folder; the resolved configuration stands there before step 0.

    Raises: RunStateError if the folder holds work of another configuration.
    """
    run = RunDirectory(Path(config.runs_directory) / config.name)
    if run.config_path.exists():
        _require_same(run, config)
    write_text(run.config_path, dump_config(config) + "\n")
    write_environment(run, seeds={"seed": config.seed})
    return run


def _require_same(run: RunDirectory, config: RunConfig) -> None:
    old = _flatten(json.loads(run.config_path.read_text()))
    new = _flatten(json.loads(dump_config(config)))
    changed = [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _may_change(key)
    ]
    if changed and _has_work(run):
        raise RunStateError(
            f"{run.path} holds work of another configuration: {'; '.join(changed)}. Give the run "
            f"another name (name=...), or remove {run.path}"
        )


def _has_work(run: RunDirectory) -> bool:
    made = (run.tokenizer_directory, run.teacher_directory, run.student_sft_directory)
    return any(path.exists() for path in (*made, run.checkpoints_directory, run.student_directory))


def _may_change(key: str) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in MAY_CHANGE)


def _flatten(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _flatten(value, f"{path}.{key}" if path else key)
    return leaves


def prepare_tokenizer(config: RunConfig, run: RunDirectory) -> Any:
    """The run's tokenizer, made at most once.

    Raises: ModelError if the tokenizer, teacher and student do not belong together.
    """
    if run.tokenizer_directory.exists():
        tokenizer = AutoTokenizer.from_pretrained(run.tokenizer_directory)
    else:
        tokenizer = build_tokenizer(config, tokenizer_texts(config))
        check_models(config, tokenizer)
        beside = run.tokenizer_directory.with_suffix(".partial")
        tokenizer.save_pretrained(beside)
        beside.rename(run.tokenizer_directory)
    return tokenizer


def check_models(config: RunConfig, tokenizer: Any) -> None:
    """Refuse pretrained models that do not fit the tokenizer, one another or the lengths asked for.

    Reads configurations and tokenizers alone; no weights.
    Raises: ModelError, naming the model and the key to change.
    """
    for role, model in (("teacher", config.teacher), ("student", config.student)):
        if model.path is not None:
            _check_model(role, model, tokenizer, config)


def _check_model(role: str, model: ModelConfig, tokenizer: Any, config: RunConfig) -> None:
    shape = _read(AutoConfig, role, model)
    own = _read(AutoTokenizer, role, model)
    if shape.vocab_size < len(tokenizer):
        raise ModelError(
            f"{role}.path={model.path!r}: its vocabulary of {shape.vocab_size} is smaller than the "
            f"run's tokenizer of {len(tokenizer)} tokens. Give tokenizer.path of this model, and "
            "a teacher and a student that share it"
        )
    if own.get_vocab() != tokenizer.get_vocab():
        theirs, ours = own.get_vocab(), tokenizer.get_vocab()
        differing = sorted(t for t in theirs.keys() | ours.keys() if theirs.get(t) != ours.get(t))
        raise ModelError(
            f"{role}.path={model.path!r}: its tokenizer of {len(theirs)} tokens differs from the "
            f"run's tokenizer of {len(ours)} in {len(differing)} tokens, such as "
            f"{differing[:3]}. Teacher and student must share one vocabulary"
        )
    longest = config.data.max_prompt_tokens + config.rollout.sampling.max_response_tokens
    limit = getattr(shape, "max_position_embeddings", None)
    if limit is not None and limit < longest:
        raise ModelError(
            f"{role}.path={model.path!r} reads at most {limit} tokens, the run asks for "
            f"data.max_prompt_tokens + rollout.sampling.max_response_tokens = {longest}"
        )


def _read(loader: Any, role: str, model: ModelConfig) -> Any:
    try:
        return loader.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{role}.path={model.path!r} cannot be read: {str(error).splitlines()[0]}. Give a "
            "folder with config.json, tokenizer files and *.safetensors, or a hub name"
        ) from error

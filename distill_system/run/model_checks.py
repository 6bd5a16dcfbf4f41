"""Checks, before any worker starts, that models, tokenizer, lengths and data fit one another.

Reads the models' configurations and tokenizers, but no weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlamaConfig

from distill_system.config import RunConfig
from distill_system.config.data import PretrainedTokenizer
from distill_system.config.model import LoraUpdate, ModelConfig
from distill_system.data import RunData, longest_row
from distill_system.errors import ConfigError, DataError, ModelError
from distill_system.hub import require_hub_model
from distill_system.language_model import (
    check_longest,
    check_quantised,
    check_settings,
    check_streamed,
    check_weight_files,
    choose_linear_modules,
    find_family,
    is_gguf,
    is_quantised,
    is_read_packed,
    one_line,
    read_configuration,
    read_headers,
    require_trainable,
)
from distill_system.learner.sharding import find_blocks
from distill_system.run.vocabulary import check_exportable, stop_token_ids, vocabulary_size

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Sizes of an attention head that vLLM supports on a CPU. With another size the engine starts and
fails at the first request. Source: CPUAttentionBackend.get_supported_head_sizes, vLLM 0.32."""


def check_folders(config: RunConfig) -> None:
    """Check that every path that means a local folder is the folder of a whole model.

    Reads its configuration and the headers of its weights. Without this check a mistyped path would
    be looked up on the Hugging Face hub, and a damaged folder would end a worker.
    Raises: ModelError.
    """
    for role, model in _models(config):
        if model.path is not None and is_local_path(model.path):
            _require_files(f"{role}.path", model.path, "config.json", "*.safetensors")
            _check_folder(config, role, Path(model.path))
        elif model.path is not None:
            _check_hub_model(config, role, model)
    path = config.tokenizer.path if isinstance(config.tokenizer, PretrainedTokenizer) else None
    if path is not None and is_local_path(path):
        _require_files("tokenizer.path", path)
    elif path is not None:
        _require_hub_tokenizer(path)


def is_local_path(path: str) -> bool:
    """Whether a path means a folder of this machine; a hub name is "model" or "owner/model"."""
    return Path(path).exists() or path.startswith(("/", "./", "../", "~")) or path.count("/") > 1


def check_engine(config: RunConfig) -> None:
    """Refuse a run whose engine is not installed.

    Raises: ConfigError, with the ways out.
    """
    if config.rollout.engine == "vllm" and find_spec("vllm") is None:
        raise ConfigError(
            "rollout.engine=vllm: vLLM is not installed here. Install it (`make environment` on a "
            'CPU, pip install -e ".[cuda]" with GPUs), or set rollout.engine=transformers, which '
            "needs nothing more"
        )


def has_encoder(config: RunConfig) -> bool:
    """Whether teacher and student are encoder-decoders; check_models has refused one of each."""
    return bool(_shape("student", config.student).is_encoder_decoder)


def check_models(config: RunConfig, tokenizer: Any) -> None:
    """Refuse models that do not fit the tokenizer, one another, the lengths or the engine.

    Refuses also what transformers and vLLM would read differently in one config.json.
    Raises: ModelError or ConfigError, naming the model and the key to change.
    """
    _check_kinds(config)
    for role, model in _models(config):
        _check_model(role, model, tokenizer, config)
    _check_update(config)
    _check_shared_teacher(config)
    stop_token_ids(config, tokenizer)
    size = vocabulary_size(tokenizer)
    for stream in ("off_policy", "on_policy"):
        k = config.distill.objective.teacher_needs(stream).top_k
        if k > size:
            raise ConfigError(
                f"distill.objective.{stream}.k must be at most the vocabulary of {size}, got {k}"
            )


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the start check must know of a model.

    untested: its model_type, if that is in no table of families. is_quantised: whether its weights
    are, which each reader unpacks in its own way.
    """

    untested: str | None
    is_quantised: bool


def read_facts(path: str, *, trust_remote_code: bool) -> ModelFacts:
    """Of a folder or hub name, from its configuration."""
    config = read_configuration(path, trust_remote_code=trust_remote_code)
    is_listed = find_family(config, repr(path)).is_listed
    return ModelFacts(None if is_listed else str(config.model_type), is_quantised(config))


def check_data(config: RunConfig, data: RunData) -> None:
    """Check that no supervised row is longer than the context of the model that learns from it, and
    no pair of preferences than that of either, since both read it.

    Raises: DataError, naming the longest row.
    """
    for role, model in _models(config):
        # Of a pair the teacher reads its own prompt; its fine-tuning rows have it already.
        more = config.context_tokens if role == "teacher" else 0
        sets = ((getattr(data, f"{role}_sft"), 0), (data.preferences, more))
        found = [
            (row.token_ids.size + beyond, row)
            for rows, beyond in sets
            if (row := longest_row(rows)) is not None
        ]
        limit = _context_limit(_shape(role, model)) if found else None
        size, longest = max(found, key=lambda each: each[0], default=(0, None))
        if limit is not None and longest is not None and size > limit:
            key = f"{role}.path" if model.path else f"{role}.architecture.max_position_embeddings"
            raise DataError(
                f"{longest.trajectory_id!r} has {size} tokens, prompt and answer "
                f"together{config.say_context(role)}; the {role} ({key}) reads at most {limit}. "
                "Remove or shorten the row"
            )


def _models(config: RunConfig) -> Iterator[tuple[str, ModelConfig]]:
    yield from (("teacher", config.teacher), ("student", config.student))


def _require_files(key: str, path: str, *patterns: str) -> None:
    folder = Path(path)
    if is_gguf(path) and folder.is_file():
        raise ModelError(
            f"{key}={path!r} is a .gguf file, which runs and `generate` make a folder of, as "
            "teacher.path or student.path. Two lines make one for everything else: `from "
            "distill_system.language_model.gguf_files import convert_gguf` and "
            f"`convert_gguf(Path({path!r}), Path(FOLDER))`"
        )
    missing = [pattern for pattern in patterns if not any(folder.glob(pattern))]
    if missing or not folder.is_dir():
        actual = f"no {missing[0]} in it" if folder.is_dir() else "no such folder"
        if (folder / "pytorch_model.bin").exists() or any(folder.glob("pytorch_model-*.bin")):
            # vLLM would read it and our own readers of single tensors would not
            raise ModelError(
                f"{key}={path!r}: expected weights in *.safetensors, found pytorch_model.bin. Two "
                f"lines convert it: AutoModelForCausalLM.from_pretrained({path!r})."
                f"save_pretrained(NEW) and AutoTokenizer.from_pretrained({path!r})."
                "save_pretrained(NEW)"
            )
        raise ModelError(
            f"{key}={path!r}: expected a folder that save_pretrained wrote, found {actual} (looked "
            f"at {folder.absolute()}). Give such a folder, or a name of the Hugging Face hub"
        )


def _require_hub_tokenizer(path: str) -> None:
    try:
        require_hub_model(path)
    except ModelError as error:
        raise ModelError(f"tokenizer.path={path!r}: {error}") from error


def _check_hub_model(config: RunConfig, role: str, model: ModelConfig) -> None:
    """Check that the model can be fetched, or lies whole in the cache if there is no network."""
    assert model.path is not None, "a model of the hub has a name"
    try:
        folder = require_hub_model(model.path)
    except ModelError as error:
        raise ModelError(f"{role}.path={model.path!r}: {error}") from error
    if folder is not None:
        _check_folder(config, role, folder)


def _check_folder(config: RunConfig, role: str, folder: Path) -> None:
    model: ModelConfig = getattr(config, role)
    shape = _shape(role, model)
    if is_quantised(shape):
        check_quantised(
            shape,
            f"{role}.path={model.path!r}",
            is_trained=role == "student" or model.sft is not None,
            on_gpu=config.pools.teacher_scoring.gpus > 0,
        )
        read_headers(folder)  # names and shapes are the method's own
        return
    try:
        check_weight_files(folder, shape, trust_remote_code=model.trust_remote_code)
    except ModelError as error:
        raise ModelError(f"{role}.path: {error}") from error


def _check_model(role: str, model: ModelConfig, tokenizer: Any, config: RunConfig) -> None:
    shape = _shape(role, model)
    _check_head_size(role, model, shape, config)
    if model.path is None:
        return  # a model of random weights takes vocabulary and length from the run
    is_teacher = role == "teacher"
    longest = config.teacher_model_length if is_teacher else config.max_model_length
    if config.rollout.engine == "vllm":  # the other engine reads a model as the learner does
        check_settings(shape, f"{role}.path={model.path!r}", longest=longest)
    _check_vocabulary(role, model, shape.vocab_size, tokenizer)
    limit = _context_limit(shape)
    if limit is not None and limit < longest:
        raise ModelError(
            f"{role}.path={model.path!r} reads at most {limit} tokens, the run asks for "
            "data.max_prompt_tokens + rollout.sampling.max_response_tokens"
            f"{config.say_context(role)} = {longest}; lower one of them, or choose a model of "
            "longer context"
        )
    check_longest(shape, longest, f"{role}.path={model.path!r}")
    if config.rollout.engine == "transformers" and _has_attention_of_its_own(shape):
        raise ModelError(
            f"{role}.path={model.path!r}: rollout.engine=transformers writes with plain attention, "
            f"models of type {shape.model_type!r} have another (soft caps, sinks, or code of their "
            "own). Set rollout.engine=vllm, or choose another model"
        )
    if role == "student" or model.sft is not None:  # models that the run will export
        require_trainable(shape, f"{role}.path={model.path!r}")
        check_exportable(role, model)


def _check_shared_teacher(config: RunConfig) -> None:
    """Check that a scorer's ranks can share the teacher, and read its weights part by part."""
    ranks, teacher = config.scoring.shard_ranks, config.teacher
    if ranks == 1 or teacher.path is None:
        return
    if is_quantised(_shape("teacher", teacher)):
        raise ModelError(
            f"teacher.path={teacher.path!r}: its weights are quantised, and scoring.shard_ranks="
            f"{ranks} shares plain ones alone. Set scoring.shard_ranks=1, or give the model that "
            "it was quantised from"
        )
    if Path(teacher.path).is_dir():  # of a model of the hub the files may not be here yet
        find_blocks(check_streamed(teacher.path, trust_remote_code=teacher.trust_remote_code))


def _check_kinds(config: RunConfig) -> None:
    """Check that both models are of one kind, and that everything the run uses knows it."""
    kinds = {role: _shape(role, model).is_encoder_decoder for role, model in _models(config)}
    if kinds["teacher"] != kinds["student"]:
        role = "teacher" if kinds["teacher"] else "student"
        raise ModelError(
            f"the {role} is an encoder-decoder and the other model is not: they would read a "
            "prompt in two ways. Choose two encoder-decoders (t5, bart) or two decoders"
        )
    if not kinds["student"]:
        return
    if config.rollout.engine == "vllm":
        raise ConfigError(
            "rollout.engine=vllm: vLLM does not generate with encoder-decoders, which teacher and "
            "student are; set rollout.engine=transformers"
        )
    if "store" in config.distill.off_policy_mixture:
        raise ConfigError(
            "distill.off_policy_source=store: the trajectory store does not know the prompts of "
            "encoder-decoders yet; use teacher or dataset"
        )
    if config.distill.plain_text_sequences:
        raise ConfigError(
            "distill.language_model reads plain text, of which an encoder-decoder's encoder would "
            "read nothing: expected null for teacher and student of this kind"
        )


def _has_attention_of_its_own(shape: Any) -> bool:
    """Of the families that were tested: of others the start check tells."""
    return find_family(shape, "").is_listed and not is_read_packed(shape)


def _check_update(config: RunConfig) -> None:
    """Check that the student has the layers for which adapters are configured."""
    if isinstance(config.distill.update, LoraUpdate):
        family = find_family(_shape("student", config.student), "student")
        choose_linear_modules(family, config.distill.update.target_modules)


def _check_vocabulary(role: str, model: ModelConfig, num_rows: int, tokenizer: Any) -> None:
    own, ours = _read(AutoTokenizer, role, model).get_vocab(), tokenizer.get_vocab()
    if own != ours:
        differing = sorted(t for t in own.keys() | ours.keys() if own.get(t) != ours.get(t))
        raise ModelError(
            f"{role}.path={model.path!r}: its tokenizer of {len(own)} tokens differs from the "
            f"run's tokenizer of {len(ours)} in {len(differing)} tokens, such as "
            f"{differing[:3]}. Teacher and student must share one vocabulary"
        )
    if num_rows < vocabulary_size(tokenizer):
        raise ModelError(
            f"{role}.path={model.path!r}: its vocabulary of {num_rows} rows is smaller than its "
            f"tokenizer of {vocabulary_size(tokenizer)} tokens: the two do not belong together. "
            "Give the folder that model and tokenizer were saved to together"
        )


def _check_head_size(role: str, model: ModelConfig, shape: Any, config: RunConfig) -> None:
    size = _head_size(shape)
    on_cpu = getattr(config.pools, f"{role}_rollout").gpus == 0
    in_vllm = config.rollout.engine == "vllm"
    if not (on_cpu and in_vllm) or size is None or size in CPU_HEAD_SIZES:
        return
    problem = f"vLLM on a CPU supports attention heads of sizes {CPU_HEAD_SIZES}, got {size}"
    if model.architecture is not None:
        raise ConfigError(
            f"{role}.architecture: {problem} (hidden_size={shape.hidden_size} / "
            f"num_heads={shape.num_attention_heads}). Change hidden_size or num_heads, or set "
            "rollout.engine=transformers"
        )
    raise ModelError(
        f"{role}.path={model.path!r}: {problem}. Choose another model, give "
        f"pools.{role}_rollout.gpus, or set rollout.engine=transformers"
    )


def _head_size(shape: Any) -> int | None:
    """Size of an attention head; None for latent attention and models without heads."""
    if getattr(shape, "kv_lora_rank", None) or not getattr(shape, "num_attention_heads", None):
        return None
    return getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads


def _context_limit(shape: Any) -> int | None:
    return getattr(shape, "max_position_embeddings", None)


def _shape(role: str, model: ModelConfig) -> Any:
    """The model's transformers configuration.

    Raises: ModelError for a setting that is not read alike by all.
    """
    if model.architecture is None:
        assert model.path is not None, "the configuration gives a path or an architecture"
        try:
            config = read_configuration(model.path, trust_remote_code=model.trust_remote_code)
        except ModelError as error:
            raise ModelError(f"{role}.path: {error}") from error
        find_family(config, f"{role}.path={model.path!r}")
        return config
    return LlamaConfig(
        hidden_size=model.architecture.hidden_size,
        num_attention_heads=model.architecture.num_heads,
        max_position_embeddings=model.architecture.max_position_embeddings,
    )


def _read(loader: Any, role: str, model: ModelConfig) -> Any:
    try:
        return loader.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # the tokenizers library raises plain Exception for a broken file
        raise ModelError(
            f"{role}.path={model.path!r} cannot be read: {one_line(error)}. Give a "
            "folder with config.json, tokenizer files and *.safetensors, or a hub name"
        ) from error

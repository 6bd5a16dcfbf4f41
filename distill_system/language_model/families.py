"""The families of models that are supported, and what must be known of each.

A family stands in this table once a test has taken it through rollout, scoring, learning, publish
and export (tests/pipeline/test_families.py). A model of another family is read as the library reads
it, in padded batches, and runs if its engine agrees in the start check.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from distill_system.errors import ConfigError, ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What must be known of the models of one `model_type`.

    linear_modules: the linear layers of a block, by the last part of their names.
    keeps_transposed: their weights are kept [in, out], not [out, in].
    requires: settings of config.json and the values of them that all readers compute alike.
    multiplies_logits, divides_logits: the setting by which it does.
    caps_logits: the setting c by which a logit z becomes c tanh(z / c); null there caps nothing.
    window_differs: whether vLLM's sliding window is wider than transformers' by a token.
    is_packed: whether its attention can be told where sequences end in a packed line.
    renamed_in_files: how names of parameters begin in the model, and how instead in its files.
    teacher_only: why no student of it can be trained; empty where one can.
    is_listed: whether the family has been tested.
    is_encoder_decoder: the prompt is an encoder's input; only the transformers engine generates.
    """

    linear_modules: tuple[str, ...] = ()
    keeps_transposed: bool = False
    requires: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    multiplies_logits: str | None = None
    divides_logits: str | None = None
    caps_logits: str | None = None
    window_differs: bool = False
    is_packed: bool = True
    renamed_in_files: Mapping[str, str] = field(default_factory=dict)
    teacher_only: str = ""
    is_listed: bool = True
    is_encoder_decoder: bool = False


_GATED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_FUSED = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
_GEMMA = Family(
    linear_modules=_GATED,
    requires={"use_bidirectional_attention": (False, None)},
    caps_logits="final_logit_softcapping",
)
_COHERE = Family(linear_modules=_GATED, multiplies_logits="logit_scale")
_MIXTURE = Family(
    teacher_only="its experts are one tensor in transformers and many in vLLM, which takes no "
    "weights of them while it runs"
)

FAMILIES: dict[str, Family] = {
    "llama": Family(linear_modules=_GATED),
    "mistral": Family(linear_modules=_GATED),
    "qwen2": Family(linear_modules=_GATED),
    "qwen3": Family(linear_modules=_GATED),
    "gemma": Family(linear_modules=_GATED),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": Family(linear_modules=("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "granite": Family(linear_modules=_GATED, divides_logits="logits_scaling"),
    "cohere": _COHERE,
    "cohere2": replace(_COHERE, window_differs=True),
    "olmo2": Family(linear_modules=_GATED),
    "olmo3": Family(linear_modules=_GATED),
    "smollm3": Family(linear_modules=_GATED),
    "gpt_neox": Family(linear_modules=_FUSED, renamed_in_files={"lm_head.": "embed_out."}),
    "falcon": Family(linear_modules=_FUSED, is_packed=False, requires={"alibi": (False,)}),
    "gpt2": Family(
        linear_modules=("c_attn", "c_proj", "c_fc"),
        keeps_transposed=True,
        requires={
            "add_cross_attention": (False,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "reorder_and_upcast_attn": (False,),
        },
    ),
    "t5": Family(
        linear_modules=("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"), is_encoder_decoder=True
    ),
    "bart": Family(
        linear_modules=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        is_encoder_decoder=True,
    ),
    "opt": Family(linear_modules=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")),
    "mixtral": _MIXTURE,
    "qwen3_moe": _MIXTURE,
    "gpt_oss": replace(_MIXTURE, is_packed=False),
}
"""By the `model_type` of config.json."""

UNLISTED = Family(is_packed=False, is_listed=False)
"""Of a model that nobody has tested: read as the library reads it, one rectangle at a time."""


def find_family(config: Any, model: str) -> Family:
    """The family of a transformers configuration; UNLISTED if it is in no table.

    model: what to call the model in an error, such as "student.path='gpt2'".
    Raises: ModelError for a setting that vLLM does not compute.
    """
    family = FAMILIES.get(config.model_type, UNLISTED)
    if bool(config.is_encoder_decoder) != family.is_encoder_decoder:
        raise ModelError(
            f"{model}: expected is_encoder_decoder={family.is_encoder_decoder} in the config.json "
            f"of a model of type {config.model_type}, got {config.is_encoder_decoder}. The "
            "encoder-decoders that this system knows are t5 and bart; choose another model"
        )
    for setting, values in family.requires.items():
        actual = getattr(config, setting, values[0])
        if actual not in values:
            raise ModelError(
                f"{model}: expected {setting}={values[0]} in its config.json, got {actual}: vLLM "
                f"does not compute {config.model_type} models of that kind as transformers does. "
                "Choose another model"
            )
    return family


def check_longest(config: Any, longest: int, model: str) -> None:
    """Refuse sequences of so many tokens where vLLM and transformers compute long ones differently.

    Raises: ModelError naming the setting.
    """
    window = getattr(config, "sliding_window", None)
    rope = getattr(config, "rope_parameters", None) or {}
    short = rope.get("original_max_position_embeddings")
    if find_family(config, model).window_differs and window is not None and longest > window:
        setting, most = "sliding_window", int(window)
        why = "vLLM's windows are a token wider than transformers'"
    elif rope.get("rope_type") == "longrope" and short is not None and longest > short:
        setting, most = "original_max_position_embeddings", int(short)
        why = "from there on vLLM turns all positions by long factors, transformers those of long "
        why += "texts alone"
    else:
        return
    raise ModelError(
        f"{model}: expected sequences of at most {setting}={most} tokens, the run asks for "
        f"data.max_prompt_tokens + rollout.sampling.max_response_tokens = {longest}: {why}. Lower "
        "one of the two, or choose another model"
    )


def require_trainable(config: Any, model: str) -> None:
    """Refuse a model of a family that can only teach.

    Raises: ModelError with the reason.
    """
    reason = find_family(config, model).teacher_only
    if reason:
        raise ModelError(
            f"{model}: models of type {config.model_type!r} can teach and not be trained: {reason}"
            ". Choose a dense student, and no teacher.sft"
        )


def is_read_packed(config: Any) -> bool:
    """Whether a model of this configuration reads packed lines; else it reads rectangles."""
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return FAMILIES.get(config.model_type, UNLISTED).is_packed and not capped


def name_in_files(config: Any, name: str) -> str:
    """A parameter's name in the safetensors files of a model."""
    for own, stored in FAMILIES.get(config.model_type, UNLISTED).renamed_in_files.items():
        if name.startswith(own):
            return stored + name.removeprefix(own)
    return name


def logit_scale(config: Any) -> float:
    """What logits are multiplied by after the unembedding; 1 in most families."""
    family = FAMILIES.get(config.model_type, UNLISTED)
    scale = 1.0
    if family.multiplies_logits is not None:
        scale *= float(getattr(config, family.multiplies_logits))
    if family.divides_logits is not None:
        scale /= float(getattr(config, family.divides_logits))
    return scale


def logit_cap(config: Any) -> float | None:
    """c, where logits z become c tanh(z / c) at last; None where they stay as they are."""
    family = FAMILIES.get(config.model_type, UNLISTED)
    cap = None if family.caps_logits is None else getattr(config, family.caps_logits)
    return None if cap is None else float(cap)


def choose_linear_modules(family: Family, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The linear layers that get adapters: those wanted, or all of a block.

    Raises: ConfigError for a name that is none of the family's, or for none where the family is not
        listed.
    """
    if not family.is_listed:
        if not wanted:
            raise ConfigError(
                "distill.update.target_modules: expected the names of linear layers, since the "
                "student's family is not in the table that names them, got none. Give some, such "
                "as q_proj"
            )
        return tuple(wanted)
    if wanted is None:
        return family.linear_modules
    unknown = [name for name in wanted if name not in family.linear_modules]
    if unknown or not wanted:
        raise ConfigError(
            "distill.update.target_modules: expected one or more of the student's linear layers "
            f"{', '.join(family.linear_modules)}, got {', '.join(unknown) or 'none'}. Give some of "
            "these names, or null for all"
        )
    return tuple(wanted)

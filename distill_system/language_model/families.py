"""The families of models that are supported, and what must be known of each.

A family stands in this table once a test has taken it through rollout, scoring, learning, publish
and export (tests/pipeline/test_families.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distill_system.errors import ConfigError, ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What must be known of the models of one `model_type`.

    linear_modules: the linear layers of a block, by the last part of their names.
    keeps_transposed: their weights are kept [in, out], not [out, in].
    requires: settings of config.json that are computed for one value alone, by vLLM or by us.
    is_encoder_decoder: the prompt is an encoder's input; only the transformers engine generates.
    """

    linear_modules: tuple[str, ...]
    keeps_transposed: bool = False
    requires: Mapping[str, object] = field(default_factory=dict)
    is_encoder_decoder: bool = False


_GATED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

FAMILIES: dict[str, Family] = {
    "llama": Family(linear_modules=_GATED),
    "mistral": Family(linear_modules=_GATED),
    "qwen2": Family(linear_modules=_GATED),
    "qwen3": Family(linear_modules=_GATED),
    "gemma": Family(linear_modules=_GATED),
    "gpt2": Family(
        linear_modules=("c_attn", "c_proj", "c_fc"),
        keeps_transposed=True,
        requires={
            "add_cross_attention": False,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
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
}
"""By the `model_type` of config.json."""


def find_family(config: Any, model: str) -> Family:
    """The family of a transformers configuration.

    model: what to call the model in an error, such as "student.path='gpt2'".
    Raises: ModelError for another family, or for a setting that vLLM does not compute.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(
            f"{model}: expected a model of one of the families {', '.join(sorted(FAMILIES))}, got "
            f"model_type={config.model_type!r} in its config.json. Nobody has tested that family "
            "through rollout, scoring, learning, publish and export. Choose a model of these "
            "families, or add yours to distill_system/language_model/families.py and to "
            "tests/pipeline/test_families.py"
        )
    if bool(config.is_encoder_decoder) != family.is_encoder_decoder:
        raise ModelError(
            f"{model}: expected is_encoder_decoder={family.is_encoder_decoder} in its config.json, "
            f"as {config.model_type} models have it, got {config.is_encoder_decoder}. Choose "
            "another model"
        )
    for setting, value in family.requires.items():
        actual = getattr(config, setting, value)
        if actual != value:
            raise ModelError(
                f"{model}: expected {setting}={value} in its config.json, got {actual}: vLLM does "
                f"not compute {config.model_type} models of that kind. Choose another model"
            )
    return family


def choose_linear_modules(family: Family, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The linear layers that get adapters: those wanted, or all of a block.

    Raises: ConfigError for a name that is none of the family's.
    """
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

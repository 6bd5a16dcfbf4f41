"""Where the student of a learner comes from: a folder, or random weights of a shape.

Float32 weights, in evaluation mode: dropout would part the learner from the sampler.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch

from distill_system.config.model import ArchitectureConfig, FullUpdate, LoraUpdate
from distill_system.language_model import (
    LanguageModel,
    build_empty_model,
    build_language_model,
    check_linear_read,
    check_packed_read,
    load_language_model,
    read_weights,
)
from distill_system.learner.adapters import add_adapters, checkpoint_name, initialise_adapters
from distill_system.learner.sharding import Policy, allocate


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where the learner's model comes from: a folder, or random weights of a shape.

    vocabulary_size: tokens that both policies are distributions over, and rows of a model of random
        weights; None: every row. update: what of the model learns.
    teacher_path: the teacher's folder, None for supervised fine-tuning. teacher_dtype: the
        precision in which the scorers multiply by its unembedding. action_dimension: the most
        columns of action embeddings, as the scorers have them.
    """

    path: str | None = None
    architecture: ArchitectureConfig | None = None
    vocabulary_size: int | None = None
    pad_token_id: int = 0
    bos_token_id: int | None = None
    eos_token_id: int = 0
    trust_remote_code: bool = False
    teacher_path: str | None = None
    teacher_dtype: str = "float32"
    action_dimension: int | None = None
    update: FullUpdate | LoraUpdate = field(default_factory=FullUpdate)


def build_student(
    source: ModelSource, *, seed: int, device: torch.device, empty: bool
) -> LanguageModel:
    """The student; empty: one from a folder gets its weights later, by fill_from_folder."""
    model = _build_plain(source, seed=seed, device=device, empty=empty)
    if isinstance(source.update, LoraUpdate):
        add_adapters(model, source.update, seed=seed)
    return model


def _build_plain(
    source: ModelSource, *, seed: int, device: torch.device, empty: bool
) -> LanguageModel:
    if source.path is not None:
        if empty:
            return build_empty_model(source.path, trust_remote_code=source.trust_remote_code)
        return load_language_model(
            source.path,
            dtype=torch.float32,
            device=device,
            trust_remote_code=source.trust_remote_code,
        )
    assert source.architecture is not None, "the configuration gives a path or an architecture"
    assert source.vocabulary_size is not None, "random weights need a number of rows"
    model = build_language_model(
        source.architecture,
        vocab_size=source.vocabulary_size,
        pad_token_id=source.pad_token_id,
        bos_token_id=source.bos_token_id,
        eos_token_id=source.eos_token_id,
        seed=seed,
    )
    return model.to("cpu" if empty else device).eval()


@torch.no_grad()
def fill_from_folder(
    policy: Policy, source: ModelSource, *, seed: int, device: torch.device
) -> None:
    """Give a sharded model of a folder its weights; every rank reads its own part.

    seed: as build_student had it. device: where parameters are at rest.
    Raises: ModelError as load_language_model does.
    """
    if source.path is None:
        return
    # It was built and sharded on the meta device: no rank ever holds the whole model.
    allocate(policy.model, device)
    read_weights(policy.model, source.path, rename=checkpoint_name)
    initialise_adapters(policy.model, seed=seed)
    policy(partial(check_linear_read, path=source.path))
    policy(partial(check_packed_read, path=source.path))
    policy.release()

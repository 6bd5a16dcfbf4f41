"""Which model generates the samples of a trajectory store, and how: the configuration's answer; and
the teacher's targets that the store already holds, for a run's scorers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from distill_system.config import RunConfig
from distill_system.config.objective import TeacherNeeds
from distill_system.data import (
    SampleOrigin,
    TargetStore,
    fingerprint_model,
    fingerprint_tokenizer,
    store_path,
)
from distill_system.data.target_store import target_folder
from distill_system.errors import RunStateError
from distill_system.observe import RunDirectory
from distill_system.records import Author, TeacherTargets
from distill_system.run.context import RunContext, model_path, sft_directory
from distill_system.run.vocabulary import stop_token_ids


def sample_origin(
    config: RunConfig, run: RunDirectory, tokenizer: Any, author: Author
) -> SampleOrigin:
    """The origin of samples of one of the run's models with the run's sampling settings.

    Raises: RunStateError if the model has yet to be fine-tuned; ModelError if it does not exist.
    """
    sampling = config.rollout.sampling
    # The fingerprint reads the model's files, so the model must exist: after sft, or as given.
    path = model_path(config, run, author)
    if getattr(config, author).sft is not None and not sft_directory(run, author).exists():
        raise RunStateError(
            f"the {author} is fine-tuned by this run, and {path} does not exist yet: run "
            "`distill-system sft` with the same configuration, then this command again"
        )
    return SampleOrigin(
        author=author,
        model=path,
        model_fingerprint=fingerprint_model(path),
        tokenizer_fingerprint=fingerprint_tokenizer(tokenizer),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        max_response_tokens=sampling.max_response_tokens,
        stop_token_ids=stop_token_ids(config, tokenizer),
        seed=config.seed,
    )


def describe_reading(config: RunConfig, teacher_fingerprint: str) -> str:
    """A text that is equal for stored targets of the same teacher, precision and contents.

    TargetStore keeps it with every row and ignores rows of another one.
    """
    needs: TeacherNeeds = config.distill.objective.teacher_needs("off_policy")
    reading = {
        "teacher": teacher_fingerprint,
        "dtype": config.scoring.dtype,
        "action_dimension": config.distill.action_dimension,
        **needs.model_dump(),
    }
    return json.dumps(reading)


PREFIX = "stored/"
"""The trajectory id of a stored sample is this prefix and the sample's key."""


class StoredTargets:
    """Targets by trajectory id. Pickles as a path and a text; the scorer opens the store itself."""

    def __init__(self, store: Path, reading: str) -> None:
        self._folder = store
        self._reading = reading

    def read(self, trajectory_ids: Sequence[str]) -> dict[str, TeacherTargets]:
        """The targets of those trajectories that the store holds with this reading, by id."""
        known = [each for each in trajectory_ids if each.removeprefix(PREFIX) in self._store]
        keys = [each.removeprefix(PREFIX) for each in known]
        return dict(zip(known, self._store.read(keys, known), strict=True))

    @cached_property
    def _store(self) -> TargetStore:
        return TargetStore(self._folder, self._reading)


def find_stored_targets(context: RunContext) -> StoredTargets | None:
    """The stored targets that a run's scorers can use; None if there are none."""
    config = context.config
    if "store" not in config.distill.off_policy_mixture:
        return None
    folder = store_path(config.data)
    if not target_folder(folder).is_dir():  # `generate` was called without --cache-targets
        return None
    teacher = sample_origin(config, context.run, context.tokenizer, Author.TEACHER)
    return StoredTargets(folder.absolute(), describe_reading(config, teacher.model_fingerprint))

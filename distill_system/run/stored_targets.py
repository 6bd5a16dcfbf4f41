"""Gives the scorers of a run the teacher's targets that the trajectory store already holds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from distill_system.data import TargetStore, store_path
from distill_system.data.target_store import target_folder
from distill_system.records import Author, TeacherTargets
from distill_system.run.context import RunContext
from distill_system.run.sample_origin import describe_reading, sample_origin

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

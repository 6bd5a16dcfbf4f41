"""Who writes the off-policy stream: the teacher now, the teacher ahead of the run, or the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from distill_system.config.run import RunConfig
from distill_system.data import (
    PromptFrontier,
    RunData,
    SourceShare,
    StoredTrajectories,
    source_shares,
)
from distill_system.records import Prompt, Trajectory
from distill_system.run.sample_origin import PREFIX


class OffPolicyMixture:
    """Walks over prompts for the teacher, stored samples and rows of data, by their shares.

    The teacher's prompts have the lowest indices, then stored samples, then rows. Over preferences
    it walks alone, pair by pair. Where an objective pairs both streams, the teacher's prompts come
    in the order of the student's.
    """

    def __init__(self, config: RunConfig, data: RunData) -> None:
        mixture = config.distill.off_policy_mixture
        prompts = data.prompts if "teacher" in mixture else ()
        ready = {"store": data.stored, "dataset": data.student_sft}
        if "preferences" in mixture:
            ready["preferences"] = data.preferences
        self._sequences_per_index = 2 if "preferences" in mixture else 1
        self._sets: list[Sequence[Prompt] | Sequence[Trajectory]] = [
            prompts,
            *(rows for name, rows in ready.items() if name in mixture),
        ]
        teacher = source_shares(prompts, config.data.prompt_weights)
        whole = sum(share.weight for share in teacher)
        shares = [
            share._replace(weight=mixture["teacher"] * share.weight / whole) for share in teacher
        ]
        shares += [
            SourceShare(name, len(rows), mixture[name])
            for name, rows in ready.items()
            if name in mixture
        ]
        self._prompt_share = mixture.get("teacher")
        self._other_shares = [share.weight for share in shares[len(teacher) :]]
        alone = tuple(mixture)
        if alone == ("teacher",):
            pairs = config.distill.objective.pairs_streams
            purpose = "student_prompts" if pairs else "teacher_prompts"
            self.frontier = PromptFrontier(teacher, config.seed, purpose)
        elif alone == ("preferences",):
            self.frontier = PromptFrontier(len(data.preferences) // 2, config.seed, *alone)
        elif alone == ("dataset",):
            self.frontier = PromptFrontier(len(data.student_sft), config.seed, "dataset_rows")
        else:
            self.frontier = PromptFrontier(shares, config.seed, "off_policy")

    def weights(self, of_prompts: Sequence[float] | None) -> list[float] | None:
        """Weights of all that the frontier walks over, given those of the prompts' sources."""
        if of_prompts is None or self._prompt_share is None:
            return None
        whole = sum(of_prompts)
        return [self._prompt_share * each / whole for each in of_prompts] + self._other_shares

    def take(
        self, count: int, *, weights: Sequence[float] | None = None
    ) -> list[Prompt | Trajectory]:
        """The next so many; of preferences both answers of each row."""
        each = self._sequences_per_index
        taken = self.frontier.take(count // each, weights=weights)
        return [self.look_up(each * index + at) for index in taken for at in range(each)]

    def look_up(self, index: int) -> Prompt | Trajectory:
        """What stands at an index of the frontier: a prompt to answer, or what is there already."""
        for rows in self._sets:
            if index >= len(rows):
                index -= len(rows)
            elif isinstance(rows, StoredTrajectories):
                return replace(rows[index], trajectory_id=PREFIX + rows.key(index))
            else:
                return rows[index]
        raise AssertionError("the frontier walks over these sets")

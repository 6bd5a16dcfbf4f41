"""A run of the streams over modelled pools: its setting, its configuration, what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from modelled_pools import PROMPT_SHARES, PROMPT_TOKENS, Costs, Lengths

from distill_system.config import RunConfig, load_config
from distill_system.records import Prompt

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
ON_POLICY = '{"type": "token_matching", "on_policy": {"type": "reverse_kl"}}'
POOLS = ("student_rollout", "teacher_rollout", "teacher_scoring", "learner")
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One run.

    max_staleness: S; 0 is the barrier loop, LockstepStreams.  workers: of the student's rollouts.
    num_sequences: that an engine writes at once.  learner_gpus: how many times faster it learns.
    slice_seconds: rollout.slice_seconds, modelled ones.  stretch: real seconds for a modelled one.
    both_streams: AMMD, with as much text of the teacher.
    """

    workers: int
    max_staleness: int
    steps: int = 56
    first: int = 20
    last: int = 46
    batch: int = 128
    scorers: int = 2
    teachers: int = 1
    learner_gpus: float = 1.0
    num_sequences: int = 16
    lengths: Lengths = field(default_factory=Lengths)
    too_old: str = "wait"
    both_streams: bool = False
    slice_seconds: float = 0.05
    stretch: float = 1.0

    @property
    def costs(self) -> Costs:
        """In seconds of the run's own clock."""
        costs = Costs()
        fixed, per_token = costs.learn
        costs = Costs(learn=(fixed, per_token / self.learner_gpus))
        return costs.stretched(self.stretch)

    def config(self) -> RunConfig:
        """The quickstart's, with this run's streams and pools."""
        staleness = [f"distill.staleness.max_staleness={self.max_staleness}"]
        if self.max_staleness and self.too_old != "wait":
            staleness.append(f"distill.staleness.too_old={self.too_old}")
            if self.too_old == "weigh":
                staleness.append("distill.staleness.importance=token")
        objective = [] if self.both_streams else [f"distill.objective={ON_POLICY}"]
        return load_config(
            [QUICKSTART],
            [
                "name=modelled",
                f"distill.steps={self.steps}",
                f"distill.student_prompts_per_step={self.batch}",
                f"distill.teacher_prompts_per_step={self.batch if self.both_streams else 0}",
                f"rollout.slice_seconds={self.slice_seconds * self.stretch}",
                f"scoring.max_wait_seconds={0.1 * self.stretch}",
                "scoring.max_tokens_per_batch=8192",
                f"pools.student_rollout.count={self.workers}",
                f"pools.teacher_rollout.count={self.teachers}",
                f"pools.teacher_scoring.count={self.scorers}",
                *(f"pools.{name}.cpus=0.01" for name in POOLS),
                "cluster.dashboard=false",
                *staleness,
                *objective,
            ],
        )

    def data(self) -> Any:
        """As many prompts as the run takes at most, of real lengths."""
        count = self.batch * (self.steps + 2 * self.max_staleness + 2)
        draw = np.random.default_rng(SEED)
        lengths = np.interp(draw.random(count), PROMPT_SHARES, PROMPT_TOKENS)
        prompts = [
            Prompt(
                prompt_id=f"p{index}", token_ids=np.full(int(length), 1, np.int32), text="modelled"
            )
            for index, length in enumerate(np.minimum(lengths, LONGEST_PROMPT))
        ]
        return SimpleNamespace(prompts=prompts, student_sft=[], stored=[])


LONGEST_PROMPT = 512


@dataclass(kw_only=True)
class Measured:
    """Of the steps first .. last - 1 of a run, in modelled seconds.

    busy: share of each pool's worker-seconds.  ages: share of on-policy tokens by staleness.
    driver_ms: CPU milliseconds of the driver's thread for each trajectory learned from, and
    process_ms of its whole process; nan under the simulated clock.
    """

    setting: Setting
    step_seconds: float
    busy: dict[str, float]
    ages: dict[str, float] = field(default_factory=dict)
    driver_ms: float = float("nan")
    process_ms: float = float("nan")

    @property
    def learner_idle(self) -> float:
        """Share of its time."""
        return 1.0 - self.busy["learner"]


def mean_ages(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Share of on-policy tokens by age over several steps; "older" for those over S."""
    prefix = "staleness/share_"
    total = sum(row["staleness/tokens"] for row in rows)
    names = {name for row in rows for name in row if name.startswith(prefix)}
    shares = {
        name.removeprefix(prefix): sum(r.get(name, 0.0) * r["staleness/tokens"] for r in rows)
        / total
        for name in names
    }
    return dict(sorted(shares.items(), key=lambda item: (len(item[0]), item[0])))

"""Two runs held against each other: what each step learned, from which prompts, and what came out.

One was broken by something, the other was not. Both are judged by the files that a run leaves.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from distill_system.observe import RunDirectory
from distill_system.observe.metrics import read_metrics, read_prompts

CLOCKS = (
    *("seconds/", "tokens_per_second/", "busy_share/", "starved_share/", "blocked_share/"),
    *("queued/", "workers/", "speedup/", "faults/", "disk/", "learner/peak_memory_bytes"),
    "bytes_per_teacher_token/",  # a lost scorer takes what it had counted with it
)
"""Metrics that the clock, the process's memory and what was lost say."""

WEIGHTS = "student/model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a broken run has that the unbroken one has not, and the other way round.

    lost_prompts, doubled_prompts: ids that a step of one stream should have learned from and did
        not, and that it learned from once too often; over all steps.
    missing_steps: steps without a row of metrics, or with two.
    differing_metrics: step and name of each metric with another value, clocks aside.
    differing_evaluations: labels.  equal_order: each step's prompts came in the same order.
    equal_bytes: the exported student is the same file.
    """

    lost_prompts: int
    doubled_prompts: int
    missing_steps: list[int]
    differing_metrics: list[str]
    differing_evaluations: list[str]
    equal_order: bool
    equal_bytes: bool

    @property
    def feeds_the_same(self) -> bool:
        """Whether every step learned from the prompts that it should have learned from."""
        return not (self.lost_prompts or self.doubled_prompts or self.missing_steps)

    @property
    def is_the_same(self) -> bool:
        """Whether the broken run is the unbroken one, to the bit."""
        differing = self.differing_metrics or self.differing_evaluations
        return self.feeds_the_same and self.equal_order and self.equal_bytes and not differing


def judge(broken: RunDirectory, unbroken: RunDirectory) -> Verdict:
    """Compare a run that was broken with one that was not; both are finished."""
    ours, theirs = read_prompts(broken), read_prompts(unbroken)
    learned, expected = read_learned(broken), read_learned(unbroken)
    fed, wanted = _feeding(broken), _feeding(unbroken)
    steps = [row.step for row in read_metrics(broken) if row.stage == "distill"]
    labels = sorted({path.stem for path in unbroken.evaluation_path("x").parent.glob("*.json")})
    return Verdict(
        lost_prompts=(wanted - fed).total(),
        doubled_prompts=(fed - wanted).total(),
        missing_steps=[step for step in expected if steps.count(step) != 1],
        differing_metrics=[
            f"{step} {name}: {learned.get(step, {}).get(name)} for {value}"
            for step, metrics in expected.items()
            for name, value in metrics.items()
            if learned.get(step, {}).get(name) != value
        ],
        differing_evaluations=[
            label for label in labels if read_scores(broken, label) != read_scores(unbroken, label)
        ],
        equal_order=ours == theirs,
        equal_bytes=(broken.path / WEIGHTS).read_bytes() == (unbroken.path / WEIGHTS).read_bytes(),
    )


def read_learned(run: RunDirectory) -> dict[int, dict[str, float | None]]:
    """What each step computed, without what CLOCKS say."""
    return {
        row.step: {name: v for name, v in row.metrics.items() if not name.startswith(CLOCKS)}
        for row in read_metrics(run)
        if row.stage == "distill"
    }


def read_scores(run: RunDirectory, label: str) -> Any:
    """What an evaluation found, text by text; None if there is none."""
    path = run.evaluation_path(label)
    return json.loads(path.read_text())["splits"] if path.exists() else None


def _feeding(run: RunDirectory) -> Counter[tuple[int, str, str]]:
    """How often each step learned from each prompt, by stream."""
    return Counter(
        (row.step, stream, prompt)
        for row in read_prompts(run)
        if row.stage == "distill"
        for stream, prompts in row.prompt_ids.items()
        for prompt in prompts
    )

"""Writes the folder of a comparison as `train` leaves its runs, without training anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from distill_system.comparison import Plan, run_directory, write_plan
from distill_system.observe.metrics import MetricLog
from distill_system.observe.run_directory import write_json
from distill_system.observe.summary import write_evaluation

Values = Mapping[str, Mapping[str, Sequence[float]]]
"""split -> metric -> values per example; of bleu the corpus score, then its replicates."""


class Split:
    """The JSON form of a SplitEvaluation."""

    def __init__(self, metrics: Mapping[str, Sequence[float]], first_id: str = "p0") -> None:
        self.metrics, self.first_id = metrics, first_id

    def to_json(self) -> dict[str, object]:
        bleu = {name: v for name, v in self.metrics.items() if name.startswith("bleu")}
        others = {name: list(v) for name, v in self.metrics.items() if name not in bleu}
        means = {name: float(np.mean(v)) for name, v in others.items()}
        means |= {name: v[0] for name, v in bleu.items()}
        num_examples = len(next(iter(others.values()))) if others else 50
        return {
            "num_examples": num_examples,
            "scores": {name: {"mean": mean, "stderr": None} for name, mean in means.items()},
            "prompt_ids": [self.first_id, *(f"p{i}" for i in range(1, num_examples))],
            "per_example": others,
            "bootstrap": {name: list(v[1:]) for name, v in bleu.items()},
            "shown": [],
        }


def write_run(
    folder: Path,
    objective: str,
    seed: int,
    values: Values,
    *,
    step: int = 20,
    distance: float = 0.01,
    first_id: str = "p0",
    metrics: Mapping[str, float] | None = None,
) -> None:
    """A finished run of two logged steps."""
    run = run_directory(folder, objective, seed)
    write_json(run.config_path, {"name": "run"})
    write_json(run.timings_path, {"seconds": {"sft_teacher": 9.0, "distill": 70.0}})
    with MetricLog(run, run_name="run") as log:
        for done, falling in ((0, 3.0), (step // 2, 2.0), (step, 1.0)):
            row = {"held_out/on_policy_distance": falling * distance}
            # As the recorder writes it: before the first step there is only what was measured.
            kept = {n: v for n, v in (metrics or {}).items() if done or n.startswith("evaluation/")}
            log.log("distill", done, row | kept)
    splits = {name: Split(found, first_id) for name, found in values.items()}
    distances = {"on_policy": distance, "off_policy": distance / 2}
    for label, done in {"before": 0, "after": step}.items():
        write_evaluation(
            run, label, step=done, weight_version=done, splits=splits, distances=distances
        )


def make_plan(objectives: Sequence[str], seeds: Sequence[int], **changes: object) -> Plan:
    fields: dict[str, object] = {
        "name": "trial",
        "config": {"evaluation": {"metrics": ["exact_match"]}},
        "objectives": tuple(objectives),
        "seeds": tuple(seeds),
        "budget": "updates",
        "budget_value": 20,
        "steps": dict.fromkeys(objectives, 20),
    }
    return Plan(**{**fields, **changes})  # type: ignore[arg-type]


def write_trial(folder: Path, plan: Plan, values: Mapping[str, Mapping[int, Values]]) -> None:
    """plan.json and every run of `values`: objective -> seed -> its scores."""
    write_plan(folder, plan)
    for objective, seeds in values.items():
        for seed, found in seeds.items():
            write_run(folder, objective, seed, found)

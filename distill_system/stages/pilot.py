"""How many steps of each objective an equal budget pays for; pilot runs measure their costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

from distill_system.comparison.plan import Budget
from distill_system.config import RunConfig
from distill_system.errors import ConfigError, RunStateError
from distill_system.observe.metrics import read_metrics
from distill_system.stages.processes import Job, run_jobs

PILOT_STEPS = 12
PILOT_EXAMPLES = 4
WARM_UP_STEPS = 3
"""Steps at the beginning of a process that are not measured, because they are slower."""


def plan_steps(
    configs: Mapping[str, RunConfig],
    folder: Path,
    *,
    budget: Budget,
    value: float | None,
    notify: Callable[[str], None],
) -> tuple[dict[str, int], float, dict[str, str]]:
    """Steps of each objective's runs, the budget's value, and the failures of pilots by objective.

    A budget of updates is the same number of steps for all. A budget of sampled_tokens or seconds
    is divided by the objective's cost per step, measured in a pilot of PILOT_STEPS steps. An
    objective that samples no tokens gets the base configuration's steps then.

    Raises: ConfigError if the budget pays for less than one step; RunStateError if every pilot
        failed.
    """
    steps = {name: config.distill.steps for name, config in configs.items()}
    if budget == "updates":
        if value is not None:
            steps = dict.fromkeys(steps, round(value))
        return steps, float(next(iter(steps.values()))), {}
    jobs = [_pilot(name, config, folder) for name, config in configs.items()]
    failed = run_jobs(jobs, at_once=1, notify=notify)
    costs = {job.key.split("/")[1]: _cost(job, budget) for job in jobs if job.key not in failed}
    if not costs:
        raise RunStateError(f"no pilot came to its end; see the logs in {folder / 'pilot'}")
    first = next(iter(costs))
    total = steps[first] * costs[first] if value is None else value
    steps = {name: round(total / cost) if cost else steps[name] for name, cost in costs.items()}
    if min(steps.values()) < 1:
        raise ConfigError(
            f"--budget-value: expected enough for one step of every objective, got {total:g} "
            f"{budget} with these costs of a step: {costs}"
        )
    notify(f"budget: {total:g} {budget} each; steps: {steps}")
    return steps, total, {key.split("/")[1]: failure for key, failure in failed.items()}


def _pilot(name: str, config: RunConfig, folder: Path) -> Job:
    distill = config.distill.model_copy(
        update={
            "steps": PILOT_STEPS,
            "measure_every": config.distill.measure_every and PILOT_STEPS,
            "evaluate_every": None,
        }
    )
    evaluation = {
        split: source.model_copy(update={"num_examples": PILOT_EXAMPLES})
        for split, source in config.data.evaluation.items()
    }
    data = config.data.model_copy(update={"evaluation": evaluation})
    update = {"name": name, "runs_directory": str(folder / "pilot"), "data": data}
    return Job(key=f"pilot/{name}", config=config.model_copy(update={**update, "distill": distill}))


def _cost(job: Job, budget: Budget) -> float:
    """Cost of one step: seconds, or sampled tokens.

    Raises: RunStateError if the pilot has recorded none.
    """
    rows = [row.metrics for row in read_metrics(job.run) if row.stage == "distill"]
    steps = [row for row in rows if "seconds/step" in row][WARM_UP_STEPS:]
    if not steps:
        raise RunStateError(
            f"{job.run.metrics_path}: expected the steps of a pilot, got none. Remove "
            f"{job.run.path} and give the same command again"
        )
    if budget == "seconds":
        return median(step["seconds/step"] or 0.0 for step in steps)
    authors = ("sampled_tokens/student", "sampled_tokens/teacher")
    return sum(step.get(author) or 0.0 for step in steps for author in authors) / len(steps)

"""Equal runs of several objectives and seeds from one shared start, and their comparison.

    base configuration --> shared fine-tuning --> objective x seed runs --> compare.json and tables

Every run is an ordinary run in a process of its own, and can be resumed or repeated alone:
`distill-system train FOLDER/OBJECTIVE/seed_0.json --resume`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from distill_system.comparison import Plan, run_key, write_comparison, write_plan
from distill_system.comparison.plan import Budget, plan_path, read_plan
from distill_system.config import RunConfig, load_config, require_one_run
from distill_system.config.data import PretrainedTokenizer
from distill_system.config.model import ModelConfig
from distill_system.config.recipes import recipe_path
from distill_system.errors import ConfigError, RunStateError
from distill_system.observe import RunDirectory
from distill_system.observe.run_lock import locked
from distill_system.planning import read_shape
from distill_system.run.context import model_path
from distill_system.run.model_checks import check_engine, check_folders
from distill_system.run.preparation import on_day, run_directory
from distill_system.stages.pilot import plan_steps
from distill_system.stages.processes import Job, run_jobs
from distill_system.stages.train import train

MOST_SEEDS = 1000
MOST_BUDGET = 1e12
"""Of any unit; a larger one is a slip, and its runs would have no end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonRequest:
    """The arguments of `distill-system compare`.

    paths, overrides: the base configuration.  objectives: names of methods, or their YAML files.
    teachers: folders or hub names of teachers that are compared instead; with the configuration's
    objective, or the one of `objectives`.
    seeds: runs of each objective, with the seeds 0, 1, ...
    budget: the quantity that is equal for all objectives.  budget_value: how much of it; None: what
    the base configuration's steps cost the first objective.  at_once: runs side by side.
    """

    paths: Sequence[str]
    overrides: Sequence[str] = ()
    objectives: Sequence[str] = ()
    teachers: Sequence[str] = ()
    seeds: int = 3
    budget: Budget = "updates"
    budget_value: float | None = None
    at_once: int = 1


def compare(request: ComparisonRequest, *, notify: Callable[[str], None]) -> Path:
    """Run what has not been run yet, then write the comparison; returns its folder.

    A run that fails is reported in the tables, and the others go on. The same call tries failed
    runs again and resumes interrupted ones.  notify: takes lines for the person.
    Raises: DistillError before anything runs, or from the shared fine-tuning; RunStateError after
        the tables are written if every run failed.
    """
    _check(request)
    first = _of_teacher(request.teachers[0]) if request.teachers else []
    base = load_config(request.paths, [*request.overrides, *first])
    require_one_run(base, "compare")
    check_engine(base)
    folder = run_directory(base).path
    with locked(run_directory(base), notify=notify):
        _compare(request, base, folder, notify)
    return folder


def _compare(
    request: ComparisonRequest, base: RunConfig, folder: Path, notify: Callable[[str], None]
) -> None:
    """Shared fine-tuning, every run, and the tables, in a folder that is ours alone."""
    day = _first_day(folder)
    base = on_day(base, day)
    load = _load_teachers if request.teachers else _load_objectives
    configs = {name: on_day(config, day) for name, config in load(request).items()}
    shared = base.model_copy(update={"name": "shared", "runs_directory": str(folder)})
    runs = ("distill", "evaluate")
    start = train(shared, resume="auto", stages=("sft",), followed_by=runs)
    configs = {
        name: _from_shared(config, shared, start, keeps_teacher=bool(request.teachers))
        for name, config in configs.items()
    }
    seeds = tuple(range(request.seeds))
    steps, value, failed = plan_steps(
        configs, folder, budget=request.budget, value=request.budget_value, notify=notify
    )
    # An objective whose pilot failed has no steps, so none of its runs is started.
    failures = {run_key(name, seed): why for name, why in failed.items() for seed in seeds}
    plan = Plan(
        name=base.name,
        config=base.model_dump(mode="json"),
        objectives=tuple(configs),
        seeds=seeds,
        budget=request.budget,
        budget_value=value,
        steps=steps,
        failures=failures,
        size_ratios=_size_ratios(configs) if request.teachers else {},
    )
    write_plan(folder, plan)
    jobs = [_job(folder, configs, name, seed, steps) for seed in seeds for name in steps]
    failures = failures | run_jobs(jobs, at_once=request.at_once, notify=notify)
    write_plan(folder, replace(plan, failures=failures))
    files = write_comparison(folder)
    notify(f"comparison: {files.html_path}\ntable: {files.markdown_path}")
    planned = [run_key(name, seed) for name in configs for seed in seeds]
    if all(key in failures for key in planned):
        raise RunStateError(
            f"all {len(planned)} runs failed, the first, {planned[0]}, with: "
            f"{failures[planned[0]].splitlines()[-1]}. The same command tries them again"
        )


def _first_day(folder: Path) -> date:
    """The day on which the comparison began: all its runs tell it to chat templates.

    A plan of an older version says none.  Raises: RunStateError if plan.json holds something else.
    """
    begun = plan_path(folder).exists()
    day = read_plan(folder).config.get("data", {}).get("chat_date") if begun else None
    return date.today() if day is None else date.fromisoformat(day)


def _check(request: ComparisonRequest) -> None:
    """Refuse a request that no run could come of.

    Raises: ConfigError that names the option.
    """
    if request.teachers:
        _check_teachers(request)
    elif not request.objectives:
        raise ConfigError(
            "--objectives: expected names of methods or YAML files joined by commas, such as "
            "ammd,gkd, got none"
        )
    if not 1 <= request.seeds <= MOST_SEEDS:
        raise ConfigError(f"--seeds: expected 1 to {MOST_SEEDS}, got {request.seeds}")
    value = request.budget_value
    if value is None:
        return
    if not (math.isfinite(value) and 0 < value <= MOST_BUDGET):
        raise ConfigError(
            f"--budget-value: expected a number above 0 and at most {MOST_BUDGET:g}, got {value:g}"
        )
    if request.budget == "updates" and not value.is_integer():
        raise ConfigError(f"--budget-value: expected a whole number of updates, got {value:g}")


def _check_teachers(request: ComparisonRequest) -> None:
    if len(request.objectives) > 1:
        raise ConfigError(
            f"--teachers compares teachers under one objective, got {len(request.objectives)} of "
            "--objectives: give one, or leave it out for the configuration's own"
        )
    labels = [_label(teacher) for teacher in request.teachers]
    if len({*labels, "shared", "pilot"}) < len(labels) + 2:
        raise ConfigError(
            "--teachers: expected folders whose last names differ from one another and from "
            f"'shared' and 'pilot', got {list(request.teachers)}"
        )


def _label(teacher: str) -> str:
    return Path(teacher).name


def _of_teacher(path: str) -> list[str]:
    """Overrides with which a pretrained model teaches as it is."""
    return [f"teacher.path={path}", "teacher.architecture=null", "teacher.sft=null"]


def _load_teachers(request: ComparisonRequest) -> dict[str, RunConfig]:
    """The configuration of each teacher; its folder is looked at before any run."""
    layers = [recipe_path(name) for name in request.objectives]
    configs: dict[str, RunConfig] = {}
    for teacher in request.teachers:
        overrides = [*request.overrides, *_of_teacher(teacher)]
        config = load_config([*request.paths, *layers], overrides)
        check_folders(config)
        configs[_label(teacher)] = config.model_copy(update={"hub": None})
    return configs


def _size_ratios(configs: Mapping[str, RunConfig]) -> dict[str, float]:
    """Parameters of each teacher over those of its student."""

    def count(model: ModelConfig, role: str) -> int:
        assert model.path is not None, "a comparison's models exist by now"
        trusted = model.trust_remote_code
        return read_shape(model.path, key=role, trust_remote_code=trusted).num_parameters

    return {
        name: count(config.teacher, "teacher.path") / count(config.student, "student.path")
        for name, config in configs.items()
    }


def _load_objectives(request: ComparisonRequest) -> dict[str, RunConfig]:
    """The configuration of each objective; loaded first, so that a mistake shows before any run."""
    configs: dict[str, RunConfig] = {}
    for name in request.objectives:
        label = recipe_path(name).stem
        if label in configs or label in ("shared", "pilot"):
            raise ConfigError(
                f"--objectives: expected names that differ from one another and from 'shared' and "
                f"'pilot', got {label!r} in {list(request.objectives)}"
            )
        config = load_config([*request.paths, recipe_path(name)], request.overrides)
        configs[label] = config.model_copy(update={"hub": None})  # no run of many is the student
    return configs


def _from_shared(
    config: RunConfig, shared: RunConfig, start: RunDirectory, *, keeps_teacher: bool
) -> RunConfig:
    """The same configuration, starting from the models of the shared fine-tuning."""

    def tuned(model: ModelConfig, role: str) -> ModelConfig:
        path = model_path(shared, start, role)
        return model.model_copy(update={"path": path, "architecture": None, "sft": None})

    changes: dict[str, object] = {
        "teacher": config.teacher if keeps_teacher else tuned(config.teacher, "teacher"),
        "student": tuned(config.student, "student"),
    }
    if start.tokenizer_directory.exists():
        changes["tokenizer"] = PretrainedTokenizer(path=str(start.tokenizer_directory))
    return config.model_copy(update=changes)


def _job(
    folder: Path,
    configs: Mapping[str, RunConfig],
    objective: str,
    seed: int,
    steps: Mapping[str, int],
) -> Job:
    config = configs[objective]
    changes = {
        "name": f"seed_{seed}",
        "seed": seed,
        "runs_directory": str(folder / objective),
        "distill": config.distill.model_copy(update={"steps": steps[objective]}),
    }
    alike = [other for other in steps if configs[other].teacher == config.teacher]
    same_teacher = tuple(folder / run_key(other, seed) for other in alike)
    own = config.model_copy(update=changes)
    return Job(key=run_key(objective, seed), config=own, same_teacher=same_teacher)

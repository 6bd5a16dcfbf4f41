"""Plans a run before it starts: what its workers hold, and everything that would stop it.

Models, chat template, data and the machine's size are looked at one by one, so that one mistake
does not hide the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_system.cluster import (
    describe_shortage,
    find_shortages,
    joins_a_cluster,
    machine_supply,
    pools_demand,
)
from distill_system.config import RunConfig
from distill_system.config.data import (
    DatasetsSource,
    EmbeddedSource,
    MixtureSource,
    Source,
    TrainedTokenizer,
)
from distill_system.data import build_tokenizer, load_run_data, tokenizer_texts
from distill_system.data.run_data import SetName
from distill_system.errors import DistillError
from distill_system.evaluation import check_evaluation
from distill_system.observe import require_trackers
from distill_system.planning import Plan, make_plan
from distill_system.run.machine_checks import machine_notes, machine_problems
from distill_system.run.model_checks import check_data, check_folders, check_models
from distill_system.run.model_sources import find_gguf_files
from distill_system.run.settings_notes import settings_notes
from distill_system.run.vocabulary import vocabulary_size

_APART = EmbeddedSource(type="embedded", split="distractor", num_examples=1)
"""Stands in for held-out rows while another set is looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """A run that was looked at.

    plan: None if the models cannot be read.  problems: what would stop the run, a line each.
    notes: what to know besides.
    """

    plan: Plan | None
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def can_start(self) -> bool:
        """Whether nothing is known that would stop it."""
        return self.plan is not None and self.plan.fits and not self.problems


def plan_run(config: RunConfig, *, device_gib: float, on_this_machine: bool = True) -> PlannedRun:
    """What the run's workers will hold, and what would stop it; nothing is started or fetched.

    device_gib: memory of each GPU.
    on_this_machine: the run is for this machine, or for the cluster of RAY_ADDRESS.
    """
    problems: list[str] = []
    notes = settings_notes(config)
    plan = None
    try:
        plan = make_plan(config, vocabulary=find_vocabulary(config), device_gib=device_gib)
        problems += _problems_of_data(config, notes)
    except DistillError as error:
        problems.append(str(error))
    if on_this_machine:
        problems += _problems_of_size(config, notes)
        try:
            require_trackers(config.trackers)
        except DistillError as error:
            problems.append(str(error))
    return PlannedRun(plan=plan, problems=tuple(dict.fromkeys(problems)), notes=tuple(notes))


def find_vocabulary(config: RunConfig) -> int | None:
    """The tokenizer's size if a model of random weights takes it over; None if none does."""
    if config.teacher.architecture is None and config.student.architecture is None:
        return None
    if isinstance(config.tokenizer, TrainedTokenizer):
        return config.tokenizer.vocab_size  # an upper bound: little text trains fewer tokens
    return vocabulary_size(build_tokenizer(config, None))


def _problems_of_data(config: RunConfig, notes: list[str]) -> Iterator[str]:
    """What is wrong with models and tokenizer, or else with the sets, each by itself."""
    if files := find_gguf_files(config):
        notes.append(f"{' and '.join(files)}: models and data are checked as the run starts")
        return
    try:
        check_folders(config)
        tokenizer = build_tokenizer(config, tokenizer_texts(config))
        check_models(config, tokenizer)
    except DistillError as error:
        yield str(error)
        return
    remote = [name for *_, name in _sets(config) if name is not None]
    together = None if remote else _problem_of_all_sets(config, tokenizer)
    if not remote and together is None:
        return  # each set alone would only be read a second time
    notes += [
        f"data.{name} is on the Hugging Face hub: it is read as the run starts" for name in remote
    ]
    found = False
    for alone, sets, fetched in _sets(config):
        if fetched is not None:
            continue
        if problem := _problem_of(alone, tokenizer, sets):
            found = True
            yield problem
    if not found and together is not None:
        yield together  # it shows only where the sets stand side by side


def _problem_of_all_sets(config: RunConfig, tokenizer: Any) -> str | None:
    names: list[SetName] = ["prompts", "held_out", "evaluation"]
    trained: list[SetName] = ["teacher_sft", "student_sft", "preferences", "plain_text"]
    names += [name for name in trained if getattr(config.data, name) is not None]
    return _problem_of(config, tokenizer, names)


def _problem_of(config: RunConfig, tokenizer: Any, sets: list[SetName]) -> str | None:
    """The first thing that is wrong with these sets."""
    try:
        data = load_run_data(config, tokenizer, sets)
        check_data(config, data)
        check_evaluation(config.evaluation, data.evaluation, data.places)
    except DistillError as error:
        return str(error)
    return None


def _sets(config: RunConfig) -> Iterator[tuple[RunConfig, list[SetName], str | None]]:
    """Each set alone in a configuration, the sets to load there, and its name if it is remote."""
    data = config.data
    evaluation: Mapping[str, Source] = data.evaluation
    for split, source in evaluation.items():
        update = {"evaluation": {split: source}, "held_out": _APART}
        yield _with_data(config, update), ["evaluation"], _if_remote(f"evaluation.{split}", source)
    alone: dict[str, Any] = {"evaluation": {}}
    yield (
        _with_data(config, alone),
        ["held_out"],
        _if_remote("held_out", data.held_out),
    )
    training: list[SetName] = [
        *("prompts", "teacher_sft", "student_sft", "preferences", "plain_text")
    ]
    for name in training:
        if getattr(data, name) is not None:
            remote = _if_remote(name, getattr(data, name))
            yield _with_data(config, {**alone, "held_out": _APART}), [name], remote


def _with_data(config: RunConfig, update: Mapping[str, object]) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update=update)})


def _if_remote(name: str, source: Source | MixtureSource) -> str | None:
    """The name if any of it would have to be fetched."""
    sources = (
        [weighted.source for weighted in source.sources.values()]
        if isinstance(source, MixtureSource)
        else [source]
    )
    remote = any(isinstance(s, DatasetsSource) and not Path(s.name).exists() for s in sources)
    return name if remote else None


def _problems_of_size(config: RunConfig, notes: list[str]) -> Iterator[str]:
    """What this machine lacks, and whether it could ever place all pools; with GPUs they may be
    meant for others."""
    demand = pools_demand(config)
    yield from machine_problems(config)
    notes += machine_notes(config)
    if joins_a_cluster():
        notes.append("RAY_ADDRESS is set: the size of its cluster is looked at as the run starts")
        return
    shortages = find_shortages(demand, machine_supply())
    if not shortages:
        return
    line = describe_shortage(demand, shortages)
    if "GPU" in shortages:
        notes.append(f"not for this machine alone: {line}")
    else:
        yield line

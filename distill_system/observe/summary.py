"""Evaluations, timings and environment of a run in; the figures of summary.json out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from distill_system.observe.bottleneck import find_bottleneck, shares_cores
from distill_system.observe.metrics import read_metrics
from distill_system.observe.recorded import (
    EVALUATION_FORM,
    read_config,
    read_environment,
    read_trackers,
)
from distill_system.observe.run_directory import (
    RunDirectory,
    read_form_if_exists,
    to_json,
    write_json,
)
from distill_system.observe.run_writes import RunWrites
from distill_system.observe.text_figures import summarise_staleness
from distill_system.observe.timings import MAIN_STAGE, read_timings
from distill_system.records import PoolActivity
from distill_system.standard_errors import paired_bootstrap_standard_error, paired_standard_error

DISTANCES = ("cross_entropy", "forward_kl", "on_policy", "off_policy")
"""How far the student is from the teacher on held-out data: losses in nats first, which every
objective is after, then both moment-matching distances."""
_POOL_FIGURES = (
    "num_workers",
    "busy_share",
    "starved_share",
    "blocked_share",
    "num_tokens",
    "num_sequences",
)


class JsonForm(Protocol):
    """What write_evaluation needs of evaluation.SplitEvaluation, which this room may not import."""

    def to_json(self) -> dict[str, object]:
        """A dictionary that json.dumps takes."""


def write_evaluation(
    run: RunDirectory,
    label: str,
    *,
    step: int,
    weight_version: int | None,
    weights: Mapping[str, str] | None = None,
    splits: Mapping[str, JsonForm],
    distances: Mapping[str, float] | None,
    writes: RunWrites | None = None,
) -> None:
    """Write one evaluation to evaluations/<label>.json.

    run: where.
    label: teacher, before, after or step_000100.
    step: steps of distillation done.
    weight_version: version of the student that was evaluated; None for the teacher.
    weights: dtype of the engine's weights, and rounding, how they became so; None: not known.
    splits: name -> the result of evaluate_splits.
    distances: those of DISTANCES, on held-out data; None if they were not measured.
    writes: takes the file where the disk does not.
    """
    form = {
        "label": label,
        "step": step,
        "weight_version": weight_version,
        "weights": weights,
        "time": time.time(),
        "distances": distances,
        "splits": {name: evaluation.to_json() for name, evaluation in splits.items()},
    }
    (writes or RunWrites()).write_text(run.evaluation_path(label), to_json(form))


def read_evaluation(run: RunDirectory, label: str) -> dict[str, Any] | None:
    """What write_evaluation wrote under this label; None if there is no such evaluation.

    Raises: RunStateError if the file holds something else.
    """
    way_out = "Remove the file: `distill-system evaluate` makes what is missing"
    return read_form_if_exists(run.evaluation_path(label), EVALUATION_FORM, way_out=way_out)


def write_summary(run: RunDirectory) -> dict[str, Any]:
    """Write build_summary to the run's summary.json; returns it."""
    summary = build_summary(run)
    write_json(run.summary_path, summary)
    return summary


def build_summary(run: RunDirectory) -> dict[str, Any]:
    """The run's figures, from whatever parts of it exist.

    Returns: run: its name.  step: steps of distillation done.
        scores[split][metric]: before, after, teacher (means), num_examples, stderr (of after),
        stderr_before, stderr_teacher, gain (after - before), gain_stderr (paired: from differences
        on the same prompts; None if the two evaluations were of different ones).
        distances[cross_entropy | forward_kl | on_policy | off_policy]: before, after; None where a
            run did not measure it.
        seconds[stage], tokens_per_second[phase], versions, git, machine, seeds.
        pools[pool]: num_workers, busy_share, starved_share, blocked_share, num_tokens,
        num_sequences, over the run; empty for a run that did not record them.
        bottleneck: a sentence on which pool bounds the run.  staleness: see summarise_staleness.
        trackers[name]: where a person sees the run there; None where only its files are.
        missing: files of a complete run that this one lacks.
        A figure that cannot be computed because its file is missing is None.
    Raises: RunStateError if a part exists and cannot be read.
    """
    config = read_config(run)
    environment = read_environment(run)
    timings = read_timings(run)
    evaluations = {label: read_evaluation(run, label) for label in ("teacher", "before", "after")}
    after, pools = evaluations["after"], timings.pools.get(MAIN_STAGE, {})
    return {
        "run": config.get("name", run.path.name),
        "step": after["step"] if after else None,
        "scores": _compare_splits(evaluations),
        "distances": {
            name: {label: _find_distance(evaluations[label], name) for label in ("before", "after")}
            for name in DISTANCES
        },
        "seconds": timings.seconds,
        "tokens_per_second": timings.tokens_per_second,
        "pools": {name: _describe_pool(pool) for name, pool in pools.items()},
        "bottleneck": _find_bottleneck(pools, config, environment),
        "staleness": summarise_staleness(read_metrics(run)),
        "versions": environment.get("versions", {}),
        "git": environment.get("git"),
        "machine": environment.get("machine", {}),
        "seeds": environment.get("seeds", {}),
        "trackers": {name: kept.get("url") for name, kept in read_trackers(run).items()},
        "missing": find_missing(run),
    }


def _describe_pool(pool: PoolActivity) -> dict[str, float]:
    return {name: getattr(pool, name) for name in _POOL_FIGURES}


def _find_bottleneck(
    pools: Mapping[str, PoolActivity], config: Mapping[str, Any], environment: Mapping[str, Any]
) -> str | None:
    staleness = config.get("distill", {}).get("staleness", {})
    machine = {} if environment.get("joined_cluster") else environment.get("machine") or {}
    found = find_bottleneck(
        pools,
        is_asynchronous=staleness.get("max_staleness", 0) > 0,
        shares_cores=shares_cores(config, machine.get("usable_cores") or machine.get("cores")),
    )
    return None if found is None else found.line


def find_missing(run: RunDirectory) -> list[str]:
    """The files that a complete run has and this one lacks, as paths relative to its folder."""
    wanted = [run.config_path, run.environment_path, run.metrics_path, run.timings_path]
    wanted += [run.evaluation_path(label) for label in ("teacher", "before", "after")]
    return [str(path.relative_to(run.path)) for path in wanted if not path.exists()]


def _compare_splits(evaluations: Mapping[str, dict[str, Any] | None]) -> dict[str, Any]:
    splits = {
        label: evaluation["splits"] if evaluation else {}
        for label, evaluation in evaluations.items()
    }
    names = _union(splits.values())
    return {
        name: _compare_scores({label: found.get(name) for label, found in splits.items()})
        for name in names
    }


def _compare_scores(split: Mapping[str, dict[str, Any] | None]) -> dict[str, dict[str, Any]]:
    """Metric -> figures, of one split, given its evaluation by label."""
    found = {label: evaluation for label, evaluation in split.items() if evaluation}
    metrics = _union(evaluation["scores"] for evaluation in found.values())
    return {metric: _compare_metric(metric, found) for metric in metrics}


def _compare_metric(metric: str, split: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    scores = {label: evaluation["scores"].get(metric, {}) for label, evaluation in split.items()}
    mean = {label: score.get("mean") for label, score in scores.items()}
    stderr = {label: score.get("stderr") for label, score in scores.items()}
    before, after = mean.get("before"), mean.get("after")
    counted = split.get("after") or split.get("before") or split["teacher"]
    return {
        "before": before,
        "after": after,
        "teacher": mean.get("teacher"),
        "num_examples": counted["num_examples"],
        "stderr": stderr.get("after"),
        "stderr_before": stderr.get("before"),
        "stderr_teacher": stderr.get("teacher"),
        "gain": None if before is None or after is None else after - before,
        "gain_stderr": _gain_stderr(metric, split.get("before"), split.get("after")),
    }


def _gain_stderr(
    metric: str, before: dict[str, Any] | None, after: dict[str, Any] | None
) -> float | None:
    if before is None or after is None or before["prompt_ids"] != after["prompt_ids"]:
        return None
    if len(before["prompt_ids"]) < 2:
        return None  # a single example has no spread
    if metric in before["per_example"] and metric in after["per_example"]:
        return paired_standard_error(before["per_example"][metric], after["per_example"][metric])
    replicates = [each["bootstrap"].get(metric, ()) for each in (before, after)]
    if not replicates[0] or len(replicates[0]) != len(replicates[1]):
        return None  # another version drew another number of them
    return paired_bootstrap_standard_error(*replicates)


def _find_distance(evaluation: dict[str, Any] | None, name: str) -> float | None:
    measured = (evaluation["distances"] if evaluation else None) or {}
    value = measured.get(name)
    return None if value is None else float(value)


def _union(dictionaries: Iterable[Iterable[str]]) -> list[str]:
    """The keys of all dictionaries, each once, in the order of their first appearance."""
    return list(dict.fromkeys(key for dictionary in dictionaries for key in dictionary))

"""The forms of what a run has recorded of itself in JSON, as far as anything is read from it.

Every key may be missing, since an older version may have written the file, and others may stand
beside these; what stands there is of this form.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, TypeAdapter, with_config
from typing_extensions import TypedDict

from distill_system.observe.run_directory import RunDirectory, read_form_if_exists

_OPEN = ConfigDict(extra="allow")
"""Of a form, and of what stands in it."""


class _Pool(TypedDict, total=False):
    count: int
    gpus: float


class _Threads(TypedDict, total=False):
    threads: int


class _Rollout(TypedDict, total=False):
    student_engine: _Threads
    teacher_engine: _Threads


class _EvaluationKeys(TypedDict, total=False):
    metrics: list[str]


class _Staleness(TypedDict, total=False):
    max_staleness: int


class _Supervised(TypedDict, total=False):
    steps: int


class _Distill(TypedDict, total=False):
    steps: int
    staleness: _Staleness


class _Model(TypedDict, total=False):
    sft: _Supervised | None


@with_config(_OPEN)
class _Config(TypedDict, total=False):
    """The keys of config.json that summary and report read."""

    name: str
    teacher: _Model
    student: _Model
    rollout: _Rollout
    scoring: _Threads
    learner: _Threads
    distill: _Distill
    evaluation: _EvaluationKeys
    pools: dict[str, _Pool | None]


class _Machine(TypedDict, total=False):
    cores: int | None
    usable_cores: int | None


@with_config(_OPEN)
class _Environment(TypedDict, total=False):
    """environment.json, see observe.environment."""

    versions: dict[str, str]
    git: dict[str, Any] | None
    machine: _Machine
    seeds: dict[str, int]
    joined_cluster: bool


class _PoolSize(TypedDict):
    present: int
    wanted: int


@with_config(_OPEN)
class _Scaling(TypedDict):
    """scaling/status.json, as far as no request of `scale` is asked for; see elastic."""

    pools: dict[str, _PoolSize]


class _Estimate(TypedDict):
    mean: float | None
    stderr: float | None


class _Shown(TypedDict):
    prompt: str
    references: list[str]
    greedy: str
    sampled: str


class _Split(TypedDict):
    num_examples: int
    scores: dict[str, _Estimate]
    prompt_ids: list[str]
    per_example: dict[str, list[float | None]]
    bootstrap: dict[str, list[float | None]]
    shown: list[_Shown]


def _check_lengths(split: _Split) -> _Split:
    """The split.  Raises: ValueError unless every metric has a value of every example."""
    count = split["num_examples"]
    rows: dict[str, Sized] = {"prompt_ids": split["prompt_ids"], **split["per_example"]}
    wrong = [name for name, row in rows.items() if len(row) != count]
    replicates = {len(row) for row in split["bootstrap"].values()}
    if wrong or len(replicates) > 1:
        raise ValueError(f"expected {count} values of every example, got others of {wrong}")
    return split


@with_config(_OPEN)
class _Evaluation(TypedDict):
    """evaluations/<label>.json, see summary.write_evaluation."""

    step: int
    distances: dict[str, float | None] | None
    splits: dict[str, Annotated[_Split, AfterValidator(_check_lengths)]]


@with_config(_OPEN)
class _Tracked(TypedDict, total=False):
    id: str
    url: str | None


EVALUATION_FORM: TypeAdapter[Any] = TypeAdapter(_Evaluation)
_CONFIG_FORM: TypeAdapter[Any] = TypeAdapter(_Config)
_SCALING_FORM: TypeAdapter[Any] = TypeAdapter(_Scaling)
_ENVIRONMENT_FORM: TypeAdapter[Any] = TypeAdapter(_Environment)
_TRACKERS_FORM: TypeAdapter[Any] = TypeAdapter(dict[str, _Tracked])


def read_config(run: RunDirectory) -> dict[str, Any]:
    """The configuration that the run recorded, of this version or an older; empty if there is none.

    Raises: RunStateError if the file holds something else.
    """
    way_out = "Put back the configuration with which the run began"
    return read_form_if_exists(run.config_path, _CONFIG_FORM, way_out=way_out) or {}


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """The leaves of a configuration as JSON, by their dotted keys."""
    if not isinstance(tree, dict):
        return {path: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flatten(value, f"{path}.{key}" if path else key)
    return leaves


def read_environment(run: RunDirectory) -> dict[str, Any]:
    """Versions, machine and seeds that the run recorded; empty if there is no such file.

    Raises: RunStateError if the file holds something else.
    """
    way_out = "Remove the file: the run writes it anew when it is continued"
    return read_form_if_exists(run.environment_path, _ENVIRONMENT_FORM, way_out=way_out) or {}


def read_trackers(run: RunDirectory) -> dict[str, dict[str, Any]]:
    """What tracking.json keeps, by tracker; empty where there is none.

    Raises: RunStateError if the file holds something else.
    """
    way_out = "Remove the file: the run is then a new one in its trackers"
    return read_form_if_exists(run.trackers_path, _TRACKERS_FORM, way_out=way_out) or {}


def read_pool_sizes(run: RunDirectory) -> dict[str, dict[str, int]]:
    """Workers present and wanted of each pool; empty for a run that has not distilled.

    Raises: RunStateError if the file holds something else.
    """
    path = run.path / "scaling" / "status.json"
    found = read_form_if_exists(path, _SCALING_FORM, way_out="Remove it: the run writes another")
    return {} if found is None else dict(found["pools"])

"""The plan of a comparison: reads and writes plan.json, and names the folder of each run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from distill_system.observe.run_directory import RunDirectory, read_form, write_json

Budget = Literal["updates", "sampled_tokens", "seconds"]
"""The quantity that is equal for all objectives; sampled tokens are those of both models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The content of plan.json.

    config: the resolved base configuration.
    objectives: their names, in the order of the tables' rows.
    budget_value: updates, tokens or seconds of each run, as `budget` says.
    steps: objective -> distillation steps of each of its runs.
    failures: "objective/seed_0" -> the first lines of the error that ended that run.
    size_ratios: where teachers are compared in place of objectives: a teacher's name -> its
        parameters over the student's. The names stand among the objectives' then.
    """

    name: str
    config: dict[str, Any]
    objectives: tuple[str, ...]
    seeds: tuple[int, ...]
    budget: Budget
    budget_value: float
    steps: dict[str, int]
    failures: dict[str, str] = field(default_factory=dict)
    size_ratios: dict[str, float] = field(default_factory=dict)


_ADAPTER = TypeAdapter(Plan)


def plan_path(folder: Path) -> Path:
    """The file of a comparison's plan."""
    return folder / "plan.json"


def run_key(objective: str, seed: int) -> str:
    """The name of one run within its comparison: its folder, and its key in Plan.failures."""
    return f"{objective}/seed_{seed}"


def run_directory(folder: Path, objective: str, seed: int) -> RunDirectory:
    """The ordinary run directory of one objective and seed."""
    return RunDirectory(folder / run_key(objective, seed))


def write_plan(folder: Path, plan: Plan) -> None:
    """Write plan.json; see write_text on crashes."""
    write_json(plan_path(folder), _ADAPTER.dump_python(plan, mode="json"))


def read_plan(folder: Path) -> Plan:
    """The plan of the comparison in this folder.

    Raises: RunStateError if there is none, or a key is missing or of another type.
    """
    way_out = "Remove it: `distill-system compare` writes it anew, and the runs stay"
    return read_form(plan_path(folder), _ADAPTER, way_out=way_out)

"""The laws of the house (docs/decisions/009), read from the imports; nothing is executed."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "distill_system"

RECORDS = {
    "config",
    "errors",
    "job_process",
    "logs",
    "network",
    "records",
    "seeds",
    "stopping",
    "workers",
    "writer_thread",
}
TORCH_ROOMS = {"language_model", "weights", "rollout", "scoring", "learner"}

# Part of the house -> parts it may import, in the order in which they build on one another. A part
# is a room (a folder) or a module beside the rooms; "config.objective" allows that module alone.
ALLOWED: dict[str, set[str]] = {
    # what everyone reads, and what travels
    "errors": set(),
    "seeds": set(),
    "workers": {"errors"},
    "stopping": set(),
    "writer_thread": set(),
    "network": {"errors"},
    "job_process": set(),
    "logs": {"errors", "writer_thread"},
    "hub": {"errors"},
    "config": {"errors"},
    "records": {"config.objective", "errors", "workers"},
    "standard_errors": {"errors"},
    # rooms that know records and not each other
    "data": RECORDS | {"hub"},
    "language_model": RECORDS,
    "objectives": {"config.objective", "errors"},
    "weights": RECORDS,
    "rollout": RECORDS | {"language_model", "weights"},
    "learner": RECORDS | {"language_model", "objectives", "weights"},
    "scoring": RECORDS | {"language_model", "objectives", "learner"},
    "cluster": RECORDS,
    "observe": RECORDS | {"standard_errors"},
    "evaluation": RECORDS | {"standard_errors"},
    # one run: what it holds, its streams, its pools, its story
    "run": RECORDS | TORCH_ROOMS | {"cluster", "data", "hub", "observe"},
    "streams": RECORDS | {"data", "observe", "rollout", "scoring", "run"},
    "elastic": RECORDS | {"cluster", "observe"},
    "driver": RECORDS
    | {"cluster", "data", "rollout", "weights", "observe", "evaluation"}
    | {"run", "streams", "elastic"},
    # several runs, and what goes before and after them
    "planning": RECORDS | {"language_model", "learner", "objectives", "scoring"},
    "manifests": RECORDS | {"data", "planning"},
    "comparison": RECORDS | {"evaluation", "observe", "standard_errors"},
    "stages": RECORDS
    | {"data", "learner", "cluster", "observe", "run", "driver", "planning", "comparison"}
    | {"evaluation", "manifests"},
    "offline": RECORDS | {"data", "rollout", "scoring", "cluster", "observe", "run", "planning"},
    "cutting": RECORDS | {"data", "language_model", "learner"},
    "jobs": RECORDS | {"cluster", "data", "observe", "run", "stages"},
    "doctor": {"observe"},
    "api": RECORDS | {"observe", "stages"},
    "cli": RECORDS
    | {"cluster", "cutting", "jobs", "stages", "offline", "elastic", "planning", "manifests"}
    | {"doctor"},
    "__main__": {"cli"},
}

# Part -> the packages from outside, beside Python's own library, that it may import.
ALLOWED_FROM_OUTSIDE = {
    "errors": set(),
    "seeds": set(),
    "workers": {"errors"},
    "stopping": set(),
    "writer_thread": set(),
    "network": {"psutil"},
    "job_process": set(),
    "logs": set(),
    "records": {"numpy"},
    "config": {"pydantic", "yaml"},
    "objectives": {"jaxtyping", "torch"},
}

MAY_IMPORT_RAY = {"cluster", "observe", "cli"}

BANNED_FILES = {"utils.py", "helpers.py", "common.py", "misc.py"}

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def _name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def _part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> Iterator[str]:
    """Every imported module, dotted; `from a import b` yields a.b, since b may be a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_name(path)}:{node.lineno}: write imports in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _imports_inside(path: Path) -> list[str]:
    """What a module imports of the house, without the package's name."""
    prefix = f"{PACKAGE.name}."
    inside = [name.removeprefix(prefix) for name in _imports(path) if name.startswith(prefix)]
    # `from distill_system import __version__` names no part
    return [name for name in inside if name.split(".")[0] in ALLOWED]


def _is_allowed(imported: str, part: str) -> bool:
    """Whether one part of the house may import distill_system.<imported>."""
    if imported.split(".")[0] == part:
        return True
    return any(f"{imported}.".startswith(f"{name}.") for name in ALLOWED[part])


def _find_circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Parts that import one another in a circle; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_part_of_the_house_has_a_row_in_the_table_and_every_row_a_part() -> None:
    assert {_part(path) for path in MODULES} == set(ALLOWED)


def test_imports_inside_the_house_follow_the_table() -> None:
    broken = [
        f"{_name(path)} imports {name}"
        for path in MODULES
        for name in _imports_inside(path)
        if not _is_allowed(name, _part(path))
    ]
    assert broken == []


def test_the_table_allows_nothing_that_nobody_does() -> None:
    """RECORDS is everyone's; what a row adds to it, some module of that part imports."""
    done = {part: set[str]() for part in ALLOWED}
    for path in MODULES:
        done[_part(path)] |= {name.split(".")[0] for name in _imports_inside(path)}
    idle = {
        part: unused
        for part, row in ALLOWED.items()
        if (unused := {name.split(".")[0] for name in row} - RECORDS - done[part])
    }
    assert idle == {}


def test_no_circle_of_rooms() -> None:
    assert (
        _find_circle({part: {n.split(".")[0] for n in row} for part, row in ALLOWED.items()}) == []
    )


def test_a_circle_of_rooms_would_be_found() -> None:
    assert set(_find_circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()})) == {"a", "b", "c"}


def test_imports_from_outside_follow_the_table() -> None:
    broken = []
    for path in MODULES:
        part = _part(path)
        outside = {name.split(".")[0] for name in _imports(path)}
        outside -= {PACKAGE.name, *sys.stdlib_module_names}
        allowed = ALLOWED_FROM_OUTSIDE.get(part, outside)
        broken += [f"{_name(path)} imports {name}" for name in outside - allowed]
        if "ray" in outside and part not in MAY_IMPORT_RAY:
            broken.append(f"{_name(path)} imports ray")
    assert broken == []


def _defined_names(path: Path) -> Iterator[str]:
    """Names that our code gives: definitions, arguments, targets of assignments and imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname


def _words(identifier: str) -> set[str]:
    """The words of snake_case and CamelCase, in lower case: factor is not an actor."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", identifier)}


def test_nothing_is_called_an_actor() -> None:
    named = [f"{_name(path)}: {name}" for path in MODULES for name in _defined_names(path)]
    files = [_name(path) for path in MODULES]
    assert [name for name in named + files if _words(name) & {"actor", "actors"}] == []


def test_no_module_is_a_drawer_for_everything() -> None:
    assert [_name(path) for path in MODULES if path.name in BANNED_FILES] == []


@pytest.mark.parametrize(
    ("imported", "part", "allowed"),
    [
        ("objectives.ammd", "learner", True),
        ("config.objective.AmmdConfig", "objectives", True),
        ("config.run.RunConfig", "objectives", False),
        ("config", "objectives", False),
        ("rollout.worker", "scoring", False),
        ("records_of_another_kind", "data", False),
        ("data.sources", "data", True),
        ("driver", "streams", False),
    ],
)
def test_the_table_is_read_as_written(imported: str, part: str, allowed: bool) -> None:
    assert _is_allowed(imported, part) is allowed


def test_words_are_told_apart() -> None:
    assert _words("RolloutActor_factor2JSON") == {"rollout", "actor", "factor", "json"}

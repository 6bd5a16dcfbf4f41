"""The laws of the house (docs/decisions/009), read from the imports; nothing is executed."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "distill_system"

RECORDS = {"config", "errors", "records", "seeds"}
ANY = None

# Part of the house -> parts it may import. A part is a room (a folder) or a module beside the
# rooms; "config.objective" allows that module alone. ANY: what joins the rooms.
ALLOWED: dict[str, set[str] | None] = {
    # what travels, and what everyone reads
    "errors": set(),
    "seeds": set(),
    "records": {"errors"},
    "config": {"errors"},
    # tools without a room of their own
    "workers": set(),
    "standard_errors": {"errors"},
    "peak_memory": set(),
    "language_model": {"config", "errors", "records"},
    # the rooms
    "objectives": {"config.objective", "errors"},
    "data": RECORDS,
    "rollout": RECORDS | {"workers"},
    "scoring": RECORDS | {"workers", "language_model", "objectives", "peak_memory"},
    "weights": RECORDS | {"workers"},
    "learner": RECORDS | {"workers", "language_model", "objectives", "peak_memory", "weights"},
    "evaluation": RECORDS | {"workers", "standard_errors", "rollout"},
    "cluster": RECORDS | {"workers"},
    "observe": RECORDS | {"standard_errors"},
    "planning": RECORDS,
    "flow": RECORDS,
    # reads what runs left behind
    "comparison": RECORDS | {"observe", "standard_errors"},
    # what joins the rooms
    "streams": ANY,
    "elastic": ANY,
    "offline": ANY,
    "stages": ANY,
    "driver": ANY,
    "doctor": ANY,
    "cli": ANY,
    "__main__": ANY,
}

# Part -> the packages from outside, beside Python's own library, that it may import.
ALLOWED_FROM_OUTSIDE = {
    "errors": set(),
    "seeds": set(),
    "records": {"numpy"},
    "config": {"pydantic", "yaml"},
    "objectives": {"torch"},
}

MAY_IMPORT_RAY = {"cluster", "observe", "driver", "cli"}

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


def _is_allowed(imported: str, part: str) -> bool:
    """Whether one part of the house may import distill_system.<imported>."""
    allowed = ALLOWED[part]
    if allowed is ANY or imported.split(".")[0] == part:
        return True
    return any(f"{imported}.".startswith(f"{name}.") for name in allowed)


def test_there_is_something_to_look_at() -> None:
    assert len(MODULES) > 10


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_every_part_of_the_house_has_a_row_in_the_table(path: Path) -> None:
    assert _part(path) in ALLOWED


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_imports_inside_the_house_follow_the_table(path: Path) -> None:
    prefix = f"{PACKAGE.name}."
    inside = [name.removeprefix(prefix) for name in _imports(path) if name.startswith(prefix)]
    # `from distill_system import __version__` names no part
    parts = [name for name in inside if name.split(".")[0] in ALLOWED]
    assert [name for name in parts if not _is_allowed(name, _part(path))] == []


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_imports_from_outside_follow_the_table(path: Path) -> None:
    outside = {name.split(".")[0] for name in _imports(path)}
    outside -= {PACKAGE.name, *sys.stdlib_module_names}
    allowed = ALLOWED_FROM_OUTSIDE.get(_part(path))
    if allowed is not None:
        assert outside <= allowed
    assert "ray" not in outside or _part(path) in MAY_IMPORT_RAY


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


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_nothing_is_called_an_actor(path: Path) -> None:
    assert [n for n in _defined_names(path) if _words(n) & {"actor", "actors"}] == []
    assert not _words(path.stem) & {"actor", "actors"}


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
        ("learner.learner", "stages", True),
    ],
)
def test_the_table_is_read_as_written(imported: str, part: str, allowed: bool) -> None:
    assert _is_allowed(imported, part) is allowed


def test_words_are_told_apart() -> None:
    assert _words("RolloutActor_factor2JSON") == {"rollout", "actor", "factor", "json"}

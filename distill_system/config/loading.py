"""Configuration files and overrides in, one checked RunConfig out.

Files are layered left to right (layers.py). The overrides of one command line, dotted key=value,
form one more layer on top.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill_system.config.base import check_path
from distill_system.config.curriculum import Stage, resolve_stages
from distill_system.config.layers import check_tree, merge
from distill_system.config.run import RunConfig
from distill_system.config.schema import ANYTHING, root_slot
from distill_system.config.yaml_tree import Located, parse_yaml, require_utf8, to_plain
from distill_system.errors import ConfigError

# Characters that JSON may hold as they are and YAML may not, or reads as the end of a line.
_NOT_IN_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


_GIVEN = "the settings given"
LONGEST_SHOWN = 200
"""Characters of an override in a message."""


def load_config(
    paths: Sequence[str | Path | Mapping[str, Any]], overrides: Sequence[str] = ()
) -> RunConfig:
    """The run that YAML files and dotted overrides describe.

    paths: YAML (or JSON) files, the later ones on top; a mapping stands for a file's content.
    overrides: texts such as distill.steps=200 or data.evaluation.mine={type: jsonl, path: x};
        the value is YAML. They form one layer above the files.
    Raises: ConfigError if a file or override cannot be read, or the configuration cannot be used:
        all of its problems at once, each with its key, where it was set, what was expected and what
        came.
    """
    if not paths:
        raise ConfigError("expected at least one YAML file, got none; try configs/quickstart.yaml")
    root = root_slot(RunConfig)
    for path in paths:
        _check_name(path)
    files = ", ".join(_GIVEN if isinstance(path, Mapping) else str(path) for path in paths)
    tree = Located({}, files)
    for path in paths:
        layer = _locate(path, "") if isinstance(path, Mapping) else _read_file(Path(path))
        tree = merge(tree, layer, root)
    on_top = Located({}, files)
    for override in overrides:
        on_top = merge(on_top, _read_override(override), ANYTHING)
    tree = merge(tree, on_top, root)
    config = check_tree(tree)
    resolve_stages(tree, config)  # for its errors: every stage is checked before anything starts
    return config


def load_stages(config: RunConfig) -> tuple[Stage, ...]:
    """The stages of a run's curriculum, each an ordinary run; empty if it has none.

    Raises: ConfigError as load_config does, naming the stage.
    """
    return resolve_stages(_locate(json.loads(dump_config(config)), ""), config)


def planned_runs(config: RunConfig) -> list[RunConfig]:
    """What there is to check and to plan ahead: the run, or every stage of its curriculum."""
    return [stage.planned for stage in load_stages(config)] or [config]


def require_one_run(config: RunConfig, command: str) -> None:
    """Refuse a curriculum.  Raises: ConfigError that says what the command takes instead."""
    if config.curriculum:
        raise ConfigError(
            f"curriculum: {command} is for one run. Give curriculum=[], or the configuration of "
            "one stage, runs/NAME/1_STAGE/config.json, which is there once the stage has begun"
        )


def dump_config(config: RunConfig) -> str:
    """The whole configuration with all defaults, as JSON that load_config reads back unchanged."""
    text = json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False)
    return _NOT_IN_YAML.sub(lambda match: f"\\u{ord(match[0]):04x}", text) + "\n"


def _locate(value: object, key: str) -> Located:
    """The tree of a mapping that was given in place of a file; key: the value's own, dotted."""
    where = _GIVEN if not key else f"{_GIVEN}, {key}"
    if isinstance(value, Mapping):
        below = {str(name): f"{key}.{name}" if key else str(name) for name in value}
        children = {str(name): _locate(item, below[str(name)]) for name, item in value.items()}
        return Located(children, where)
    if isinstance(value, list | tuple):
        return Located([_locate(item, f"{key}[{i}]") for i, item in enumerate(value)], where)
    if isinstance(value, str | Path):
        return Located(require_utf8(str(value), where), where)
    if value is None or isinstance(value, bool | int | float):
        return Located(value, where)
    raise ConfigError(
        f"{where}: expected a mapping, a list, text, a number, true or false, None or a path, got "
        f"{type(value).__name__}"
    )


def _check_name(path: str | Path | Mapping[str, Any]) -> None:
    if isinstance(path, Mapping):
        return
    try:
        check_path(str(path))
    except ValueError as error:
        raise ConfigError(f"no configuration file: {error}") from error


def _read_file(path: Path) -> Located:
    if not path.is_file():
        raise ConfigError(_no_such_file(path))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 text, got other bytes: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    tree = parse_yaml(text, source=str(path), place=lambda mark: f"{path}:{mark.line + 1}")
    if tree is None:
        raise ConfigError(f"{path}: expected a mapping of keys to values, got an empty file")
    if not isinstance(tree.value, dict):
        actual = json.dumps(to_plain(tree))[:80]
        raise ConfigError(f"{path}: expected a mapping of keys to values at the top, got {actual}")
    return tree


def _no_such_file(path: Path) -> str:
    if path.exists():
        what = "a folder" if path.is_dir() else "a pipe or a device"
        return f"{path}: expected a YAML file, got {what}"
    beside = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, sorted(beside), n=1)
    hint = f"; did you mean {path.parent / near[0]}?" if near else ""
    return f"{path}: no such configuration file (looked from {Path.cwd()}){hint}"


def _read_override(text: str) -> Located:
    """The tree of one override: nested mappings down to its value."""
    where = f"override '{text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + '...'}'"
    key, equals, value = text.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"{where}: expected key.sub=value, such as distill.steps=200")
    tree = parse_yaml(value, source=where, place=lambda _mark: where)
    if tree is None:
        raise ConfigError(
            f"{where}: expected a value after '='; write {key}=null for none, {key}='' for no text"
        )
    for name in reversed(names):
        tree = Located({name: tree}, where)
    return tree

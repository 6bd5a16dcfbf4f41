"""Recipes: published methods by name, each a small YAML layer over a run's configuration."""

from __future__ import annotations

import difflib
from pathlib import Path

from distill_system.errors import ConfigError

FOLDER = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """The names of all recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The YAML file of a recipe; `name` itself if it is a YAML file.

    Raises: ConfigError, with the names of all recipes.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    path = FOLDER / f"{name}.yaml"
    if not path.exists():
        near = difflib.get_close_matches(name, recipe_names(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"expected the name of a method or a YAML file, got {name!r}{hint} "
            f"(there are {', '.join(recipe_names())})"
        )
    return path

"""Recipes: published methods by name, each a small YAML layer over a run's configuration."""

from __future__ import annotations

import difflib
from pathlib import Path

from distill_system.errors import ConfigError

LONGEST_SHOWN = 80
"""Characters of a wrong name in a message."""
FOLDER = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """The names of all recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find_recipe(name: str) -> str | None:
    """The recipe that a person means, however it is spelled: GKD and reverse-kl-on-policy."""
    plain = name.strip().lower().replace("-", "_").replace(" ", "_")
    return plain if plain in recipe_names() else None


def recipe_path(name: str) -> Path:
    """The YAML file of a recipe; `name` itself if it is a YAML file.

    Raises: ConfigError, with the names of all recipes.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    if name not in recipe_names():
        near = [find_recipe(name), *difflib.get_close_matches(name.lower(), recipe_names(), n=1)]
        hint = next((f"; did you mean {found}?" for found in near if found), "")
        shown = repr(name) if len(name) <= LONGEST_SHOWN else f"{name[:LONGEST_SHOWN]!r}..."
        raise ConfigError(
            f"expected the name of a method or a YAML file, got {shown}{hint} "
            f"(there are {', '.join(recipe_names())})"
        )
    return FOLDER / f"{name}.yaml"

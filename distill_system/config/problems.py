"""pydantic's errors in, sentences for a person out: key, place, expected, came, nearest key."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from distill_system.config.foreign_keys import find_ours
from distill_system.config.recipes import find_recipe
from distill_system.config.schema import Slot, describe, fields_of, quoted_list
from distill_system.config.yaml_tree import Located, to_plain

_LONGEST_VALUE = 80
_MOST_PLACES = 3


class _Spot:
    """Where one error of pydantic lies: its dotted path, the slot there, and what was written."""

    def __init__(self, location: Sequence[str | int], tree: Located, root: Slot) -> None:
        self.path = ""
        self.slot = root
        self.parent_slot = root
        self.node: Located | None = tree
        self.parent = tree
        self.tag: object = None
        self.parent_tag: object = None
        for item in location:
            # Inside a union pydantic names the alternative, which is no key of the file.
            if self.slot.discriminator and self.tag is None:
                self.tag = item
            elif self.slot.is_plain_union:
                break  # "constrained-int", and what that alternative found
            else:
                self._step(item)

    def _step(self, item: str | int) -> None:
        self.path += f"[{item}]" if isinstance(item, int) else f".{item}" if self.path else item
        self.parent_slot, self.parent_tag = self.slot, self.tag
        self.slot, self.tag = self.slot.child(item, self.tag), None
        self.parent = self.node or self.parent
        value = self.node.value if self.node else None
        if isinstance(value, dict):
            self.node = value.get(str(item))
        elif isinstance(value, list) and isinstance(item, int) and item < len(value):
            self.node = value[item]
        else:
            self.node = None


def describe_problems(error: ValidationError, tree: Located, root: Slot) -> str:
    """All problems of a configuration, one a line.

    error: what pydantic found wrong with the tree's plain value.
    tree: the configuration as written.
    root: the slot that the tree fills.
    """
    # A value that fits none of several types is one problem, of which each type has complained.
    found = error.errors(include_url=False)
    lines = list(dict.fromkeys(_describe(each, tree, root) for each in found))
    count = f"{len(lines)} problem" + ("s" if len(lines) > 1 else "")
    return "\n  ".join([f"the configuration has {count}:", *lines])


def _describe(found: Any, tree: Located, root: Slot) -> str:
    location: tuple[str | int, ...] = found["loc"]
    kind: str = found["type"]
    if kind == "missing" and isinstance(location[-1], int):
        location = location[:-1]  # a list that is too short is the list's problem
        kind = "too_short"
    spot = _Spot(location, tree, root)
    match kind:
        case "value_error":
            return _from_validator(spot, str(found["ctx"]["error"]))
        case "missing":
            return _missing(spot.path, spot.parent, describe(spot.slot))
        case "extra_forbidden":
            return _unknown_key(spot, str(location[-1]), root)
        case "union_tag_not_found":
            path = f"{spot.path}.{spot.slot.discriminator}"
            return _missing(path, spot.node or tree, quoted_list(list(spot.slot.alternatives)))
        case "union_tag_invalid":
            return _unknown_alternative(spot)
    actual = to_plain(spot.node) if spot.node else found["input"]
    return (
        f"{_head(spot)}: expected {describe(spot.slot)}, got {_show(actual)}{_hint(spot, actual)}"
    )


def _head(spot: _Spot) -> str:
    return f"{spot.path} ({(spot.node or spot.parent).where})"


def _from_validator(spot: _Spot, said: str) -> str:
    return f"{_head(spot)}: {said}" if spot.path else said


def _missing(path: str, parent: Located, expected: str) -> str:
    return (
        f"{path}: missing; expected {expected}; add it to the mapping at {parent.where}, "
        f"or give {path}=VALUE"
    )


def _unknown_key(spot: _Spot, key: str, root: Slot) -> str:
    model = spot.parent_slot.model_for(spot.parent_tag)
    valid = list(model.model_fields) if model else []
    near = difflib.get_close_matches(key, valid, n=1)
    elsewhere = _find_elsewhere(spot.path, key, root)
    foreign = find_ours(key)
    if 1 <= len(elsewhere) <= _MOST_PLACES:
        way_out = f"did you mean {' or '.join(elsewhere)}?"
    elif foreign is not None:
        way_out = foreign
    else:
        way_out = f"did you mean '{near[0]}'?" if near else f"valid keys here: {', '.join(valid)}"
    return f"{_head(spot)}: unknown key; {way_out}"


def _find_elsewhere(path: str, key: str, root: Slot) -> list[str]:
    """The dotted paths of the keys of this name that lie nearest to where it was written."""
    written = path.split(".")[:-1]
    places = sorted(
        (-_num_shared(written, found), len(found), ".".join(found))
        for found in _paths_to(key, root, ())
    )
    return [place for *near, place in places if tuple(near) == places[0][:2]]


def _num_shared(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the beginning that two paths have in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))


def _paths_to(key: str, slot: Slot, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Every path below a slot that ends in a key of this name; a path stands once."""
    below = {name: child for model in slot.models for name, child in fields_of(model).items()}
    for name, child in below.items():
        if name == key:
            yield (*path, name)
        else:
            yield from _paths_to(key, child, (*path, name))


def _unknown_alternative(spot: _Spot) -> str:
    key = spot.slot.discriminator
    valid = list(spot.slot.alternatives)
    written = spot.node.value if spot.node else None
    tag = written[key] if isinstance(written, dict) and key else spot.parent
    near = difflib.get_close_matches(str(tag.value), valid, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return (
        f"{spot.path}.{key} ({tag.where}): expected {quoted_list(valid)}, "
        f"got {_show(to_plain(tag))}{_method_hint(spot.path, tag.value) or hint}"
    )


def _show(value: object) -> str:
    text = f"'{value}'" if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def _method_hint(path: str, value: object) -> str:
    """A method of the field that is written where an objective belongs is a recipe."""
    recipe = find_recipe(value) if isinstance(value, str) else None
    if not path.endswith("objective") or recipe is None:
        return ""
    return f"; {recipe} is a recipe of several keys: give --objective {recipe}"


def _hint(spot: _Spot, actual: object) -> str:
    if method := _method_hint(spot.path, actual):
        return method
    if spot.slot.annotation is str and isinstance(actual, (bool, int, float)):
        return "; put it in quotes"
    if isinstance(actual, float) and not math.isfinite(actual):
        return "; it must be finite"
    return ""

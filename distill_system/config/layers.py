"""Layers of a configuration: laid over one another as trees, then checked as a whole run.

Mappings merge deeply, all else is replaced, and a mapping that changes which alternative of a union
it follows (its `type` or `format`) replaces the one before.
"""

from __future__ import annotations

import json

from pydantic import ValidationError

from distill_system.config.problems import describe_problems
from distill_system.config.run import RunConfig
from distill_system.config.schema import Slot, root_slot
from distill_system.config.yaml_tree import Located, to_plain
from distill_system.errors import ConfigError


def check_tree(tree: Located) -> RunConfig:
    """The run that a tree describes.

    Raises: ConfigError with every problem, each with its key, where it was set, what was expected
        and what came.
    """
    root = root_slot(RunConfig)
    whole = _with_default_tags(tree, root)
    try:
        # JSON, so that strict models take a list for a tuple and a whole number for a float.
        return RunConfig.model_validate_json(json.dumps(to_plain(whole)))
    except ValidationError as error:
        raise ConfigError(describe_problems(error, whole, root)) from error


def merge(old: Located, new: Located, slot: Slot) -> Located:
    """The new layer on top of the old one, at one slot."""
    if not isinstance(old.value, dict) or not isinstance(new.value, dict):
        return new
    old_tag = _tag(old, slot) or slot.default_tag
    new_tag = _tag(new, slot)
    if old_tag is not None and new_tag is not None and new_tag != old_tag:
        return new
    merged = dict(old.value)
    for key, child in new.value.items():
        below = slot.child(key, new_tag or old_tag)
        merged[key] = merge(merged[key], child, below) if key in merged else child
    return Located(merged, old.where)


def _with_default_tags(node: Located, slot: Slot) -> Located:
    """Writes out the `type` that a mapping leaves to its slot's default; pydantic asks for it."""
    if not isinstance(node.value, dict):
        return node
    children = dict(node.value)
    if slot.discriminator and slot.default_tag and slot.discriminator not in children:
        children[slot.discriminator] = Located(slot.default_tag, node.where)
    tag = _tag(Located(children, node.where), slot)
    return Located(
        {key: _with_default_tags(child, slot.child(key, tag)) for key, child in children.items()},
        node.where,
    )


def _tag(node: Located, slot: Slot) -> object:
    if slot.discriminator is None or not isinstance(node.value, dict):
        return None
    given = node.value.get(slot.discriminator)
    return None if given is None else given.value

"""Makes the page docs/configuration.md from the configuration models.

python -m distill_system.config.reference > docs/configuration.md
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import Literal, get_args, get_origin

import yaml

from distill_system.config.base import ConfigModel
from distill_system.config.run import RunConfig
from distill_system.config.schema import Slot, describe, fields_of, root_slot

_HEAD = """\
# Configuration

<!-- Made by `make docs` from distill_system/config; edit the docstrings there, not this page. -->

`distill-system train CONFIG [CONFIG...] [key.sub=value...]` reads one or more YAML files and any
number of overrides, and refuses what it does not know: unknown keys, wrong types and impossible
combinations end the command at once, each with its key, where it was set, what was expected and
the nearest valid key.

- Files are layered left to right. Mappings merge key by key; every other value is replaced. A
  mapping that changes its alternative (`type`, or `format` of `fields`) replaces the one before it.
- Overrides form one more layer on top, whatever their order: `distill.steps=50`,
  `student.sft=null`, `data.evaluation.mine={type: jsonl, path: mine.jsonl}`. Values are YAML.
- Scalars follow YAML 1.2: `1e-3` is a number; `on`, `off`, `yes` and `no` are text, only `true`
  and `false` are truth values; a key may stand once in a mapping.
- A union lists its alternatives by `type`; where `type` is left out, that of the default holds. A
  source without one is of type `files`, `fields` without a `format` are `prompt_response`.
- The resolved configuration is written to the run's folder as JSON, which is a CONFIG too.
"""


def render_reference() -> str:
    """The page as Markdown: one section per model, in the order of their first appearance."""
    paths: dict[type[ConfigModel], dict[str, None]] = {}  # model -> its paths; an ordered set
    for model, path in _walk(root_slot(RunConfig), ""):
        paths.setdefault(model, {})[path] = None
    return "\n".join([_HEAD, *(_section(model, list(paths[model])) for model in paths)])


def _walk(slot: Slot, path: str) -> Iterator[tuple[type[ConfigModel], str]]:
    """Every model with each of its dotted paths, parents before children."""
    for model in slot.models:
        yield model, path
        for name, below in fields_of(model).items():
            yield from _walk(below, f"{path}.{name}" if path else name)
    if not slot.models:
        named, item = slot.child("NAME"), slot.child(0)
        if named.models:
            yield from _walk(named, f"{path}.NAME")
        elif item.models:
            yield from _walk(item, f"{path}[]")


def _section(model: type[ConfigModel], paths: list[str]) -> str:
    where = ", ".join(f"`{path}`" for path in paths if path)
    lines = [
        f"## {model.__name__}",
        "",
        inspect.cleandoc(model.__doc__ or ""),
        "",
        *([f"Stands at {where}.", ""] if where else []),
        "| key | type | default | meaning |",
        "|---|---|---|---|",
        *(_row(name, slot) for name, slot in fields_of(model).items()),
        "",
    ]
    return "\n".join(lines)


def _row(name: str, slot: Slot) -> str:
    cells = [f"`{name}`", _type(slot), _default(slot), _meaning(slot)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type(slot: Slot) -> str:
    """The type in words, models as links to their sections."""
    named, item = slot.child("NAME"), slot.child(0)
    if slot.discriminator:
        links = [f"[{tag}]({_anchor(model)})" for tag, model in slot.alternatives.items()]
        text = f"by `{slot.discriminator}`: {', '.join(links)}"
    elif slot.models:
        text = f"[{slot.models[0].__name__}]({_anchor(slot.models[0])})"
    elif named.models:
        text = f"a mapping of names, each {_type(named)}"
    elif item.models:
        text = f"a list, each item {_type(item)}"
    else:
        return describe(slot)
    return text + (" or null" if slot.nullable else "")


def _anchor(model: type[ConfigModel]) -> str:
    return f"#{model.__name__.lower()}"


def _default(slot: Slot) -> str:
    if slot.required:
        return "**required**"
    if isinstance(slot.default, ConfigModel):
        given = slot.default.model_dump(mode="json", exclude_unset=True)
        tag = {slot.discriminator: slot.default_tag} if slot.discriminator else {}
        text = yaml.safe_dump({**tag, **given}, default_flow_style=True, width=1000).strip()
        return f"`{text}`" if text != "{}" else "its own"
    default = list(slot.default) if isinstance(slot.default, tuple) else slot.default
    return f"`{json.dumps(default)}`"


def _meaning(slot: Slot) -> str:
    """The field's docstring; for a field without one, the first line of its model's."""
    if get_origin(slot.annotation) is Literal and len(get_args(slot.annotation)) == 1:
        return slot.description or "Chooses this alternative."
    if slot.description or not slot.models or slot.discriminator:
        return slot.description
    return inspect.cleandoc(slot.models[0].__doc__ or "").splitlines()[0]


if __name__ == "__main__":
    print(render_reference(), end="")

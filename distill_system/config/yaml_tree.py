"""YAML text in, a tree of values out in which each value knows where it was written.

Scalars follow YAML 1.2's core schema, not PyYAML's 1.1: 1e-3 is a number; on, off, yes and no
are text, as are dates and 1:30; 010 is ten. Keys are always text. A key given twice is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import yaml

from distill_system.errors import ConfigError

Scalar = str | int | float | bool | None
Plain = Scalar | list["Plain"] | dict[str, "Plain"]
Place = Callable[[yaml.Mark], str]
"""Turns a position in the text into what a person reads, such as run.yaml:12."""

MAX_CHARACTERS, MAX_VALUES, MAX_DEPTH = 2**18, 100_000, 50
"""Of one text; the largest configurations have some thousand characters and six levels."""
_TOO_DEEP = f"expected lists and mappings of at most {MAX_DEPTH} levels, got deeper ones"


_KINDS: dict[type[yaml.Node], str] = {yaml.MappingNode: "map", yaml.SequenceNode: "seq"}


@dataclass(frozen=True)
class Located:
    """A YAML value and where it was written, as file:line or as the override's own text."""

    value: Scalar | list[Located] | dict[str, Located]
    where: str


class _CoreLoader(yaml.SafeLoader):
    """Resolves plain scalars by YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """The next node; PyYAML calls itself for each level below it."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=_TOO_DEEP, problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_PATTERNS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
for _kind, (_pattern, _first) in _PATTERNS.items():
    _CoreLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z"), _first
    )


def parse_yaml(text: str, *, source: str, place: Place) -> Located | None:
    """The tree of one YAML document, None if the text holds no document.

    text: the document.
    source: what to call the text in errors that have no position.
    place: turns a position in the text into what a person reads.
    Raises: ConfigError if the text is not YAML, a key stands twice in a mapping, a key is not a
        plain text, a value has a tag of its own, or the text is larger or deeper than a
        configuration can be; with the position.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(
            f"{source}: expected at most {MAX_CHARACTERS:,} characters, got {len(text):,}"
        )
    try:
        node = yaml.compose(text, Loader=_CoreLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = place(mark) if mark is not None else source
        said = ": ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{at}: not valid YAML: {said}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from error
    return None if node is None else _Writing(place).located(node, place(node.start_mark), ())


def to_plain(node: Located) -> Plain:
    """The value without its places."""
    if isinstance(node.value, dict):
        return {key: to_plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [to_plain(child) for child in node.value]
    return node.value


class _Writing:
    """Nodes written out as a tree, aliases in full, no further than a configuration can go."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._num_values = 0

    def located(self, node: yaml.Node, where: str, parents: tuple[int, ...]) -> Located:
        """A node and all below it. parents: ids of the nodes that it stands in."""
        self._num_values += 1
        if self._num_values > MAX_VALUES:
            raise ConfigError(
                f"{where}: expected at most {MAX_VALUES:,} values, got more once all aliases "
                "(*name) are written out"
            )
        if id(node) in parents:
            raise ConfigError(
                f"{where}: an alias (*name) that contains itself; write the value out"
            )
        if len(parents) == MAX_DEPTH:
            raise ConfigError(f"{where}: {_TOO_DEEP}")
        inside = (*parents, id(node))
        kind = _KINDS.get(type(node))
        if kind is not None and node.tag != f"tag:yaml.org,2002:{kind}":
            raise ConfigError(_refused_tag(node, where))
        if isinstance(node, yaml.MappingNode):
            return Located(self._mapping(node, inside), where)
        if isinstance(node, yaml.SequenceNode):
            items = [
                self.located(item, self._place(item.start_mark), inside) for item in node.value
            ]
            return Located(items, where)
        return Located(_scalar(node, where), where)

    def _mapping(self, node: yaml.MappingNode, inside: tuple[int, ...]) -> dict[str, Located]:
        children: dict[str, Located] = {}
        for key_node, value_node in node.value:
            where = self._place(key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{where}: expected a text as key, got a {key_node.id}")
            key = require_utf8(key_node.value, where)
            if key in children:
                raise ConfigError(
                    f"{where}: the key '{key}' already stands in this mapping at "
                    f"{children[key].where}; keep one of the two"
                )
            children[key] = self.located(value_node, where, inside)
        return children


def _scalar(node: yaml.Node, where: str) -> Scalar:
    text, kind = node.value, node.tag.removeprefix("tag:yaml.org,2002:")
    if kind == "str":
        return require_utf8(text, where)
    try:
        match kind:
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int":
                return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
            case "float":
                return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
    except ValueError as error:
        raise ConfigError(f"{where}: '{text}' is not a {node.tag}: {error}") from error
    raise ConfigError(_refused_tag(node, where))


def _refused_tag(node: yaml.Node, where: str) -> str:
    return f"{where}: expected a plain value, got one with the tag {node.tag}; drop it"


def require_utf8(text: str, where: str) -> str:
    """The text.  Raises: ConfigError if no file in UTF-8 can hold it, as half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where}: expected text that UTF-8 can write, got {text[error.start]!r} in it"
        ) from error
    return text

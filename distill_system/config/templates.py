"""Text templates: {field} is replaced by a field of a row; {{ and }} are braces."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from string import Formatter
from typing import NamedTuple


def template_fields(template: str) -> tuple[str, ...]:
    """The fields that a template names, in order, each once.

    Raises: ValueError for a single brace, or a field without a name, with a format or a conversion.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"the template {template!r} cannot be read: {error}; write {{{{ and }}}} for braces"
        ) from error
    names: dict[str, None] = {}
    for _, name, form, conversion in parts:
        if name is None:
            continue
        if not name.strip() or form or conversion:
            raise ValueError(
                f"the template {template!r} must name fields as {{name}} or {{outer.inner}}, with "
                "nothing after the name; write {{ and }} for braces"
            )
        names[name] = None
    return tuple(names)


class Piece(NamedTuple):
    """A stretch of a text: a row's (is_data), or a template's own."""

    text: str
    is_data: bool


def fill_pieces(template: str, values: Mapping[str, str]) -> tuple[Piece, ...]:
    """The template with each field replaced by its value; braces in values are not interpreted."""
    pieces: list[Piece] = []
    for literal, name, _, _ in Formatter().parse(template):
        pieces.append(Piece(literal, is_data=False))
        if name is not None:
            pieces.append(Piece(values[name], is_data=True))
    return tuple(piece for piece in pieces if piece.text)


def joined(pieces: Iterable[Piece]) -> str:
    """The text that the pieces make."""
    return "".join(piece.text for piece in pieces)

"""Text templates: {field} is replaced by a field of a row; {{ and }} are braces."""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter


def template_fields(template: str) -> tuple[str, ...]:
    """The fields that a template names, in order, each once.

    Raises:
        ValueError: a single brace, or a field without a name, with a format or a conversion.
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


def fill_template(template: str, values: Mapping[str, str]) -> str:
    """The template with each field replaced by its value; braces in values are not interpreted."""
    filled = (
        literal + ("" if name is None else values[name])
        for literal, name, _, _ in Formatter().parse(template)
    )
    return "".join(filled)

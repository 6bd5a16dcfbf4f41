"""The fields of a row that a field map needs, and their values.

In: the configured field map; a row, or the column names of a table.  Out: fields and their values;
a missing field is an error that names the nearest existing one.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

from distill_system.config.data import (
    FieldMap,
    InstructionFields,
    MessagesFields,
    PreferenceFields,
    PromptResponseFields,
    ShareGptFields,
    TemplateFields,
)
from distill_system.config.templates import template_fields
from distill_system.data.messages import lacks_words
from distill_system.data.row_values import Row, describe
from distill_system.errors import DataError

NeededFields = list[tuple[str, str]]  # setting that names a field, the field

ANSWER_SETTINGS = ("response", "output", "reference")
MAY_BE_ABSENT = ("tools",)
_MAY_BE_NULL = (*ANSWER_SETTINGS, "input")


def needed_fields(fields: FieldMap, with_answers: bool) -> NeededFields:
    """Fields that must exist in every row, each with the setting that names it.

    A nested field has its full name, "outer.inner"; see `needed_columns` for its column.
    """
    named: list[tuple[str, str | None]]
    match fields:
        case PromptResponseFields():
            named = [("prompt", fields.prompt), ("response", fields.response)]
        case InstructionFields():
            named = [
                ("instruction", fields.instruction),
                ("input", fields.input),
                ("output", fields.output),
            ]
        case MessagesFields():
            named = [("messages", fields.messages), ("tools", fields.tools)]
        case ShareGptFields():
            return [("conversations", fields.conversations)]
        case PreferenceFields():
            named = [("prompt", fields.prompt), ("chosen", fields.chosen)]
        case TemplateFields():
            named = [
                (setting, name)
                for setting, template in given_templates(fields)
                for name in template_fields(template)
            ]
    return [
        (setting, field)
        for setting, field in named
        if field is not None and (with_answers or setting not in ANSWER_SETTINGS)
    ]


def needed_columns(needed: NeededFields, existing: Collection[str]) -> list[str]:
    """The columns of a table that contain the needed fields."""
    columns = {_column(field, existing) for _, field in needed}
    return sorted(columns & set(existing))  # a field that may be absent has no column


def check_fields(needed: NeededFields, existing: Collection[str], where: str, key: str) -> None:
    """Refuse a row or table that lacks a needed field.

    needed: as from `needed_fields`.
    existing: the names of the row's or table's fields.
    where: the row or table, for the message.
    key: configuration key of the field map, e.g. "data.prompts.fields".
    Raises: DataError that names the missing field, the existing ones and the nearest of them.
    """
    for setting, field in needed:
        if _column(field, existing) in existing or setting in MAY_BE_ABSENT:
            continue
        nearest = difflib.get_close_matches(field, existing, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        way_out = f", or to null for rows without {setting}" if setting in _MAY_BE_NULL else ""
        raise DataError(
            f"{where}: no field {field!r}, the fields are {sorted(existing)}{hint} "
            f"Set {key}.{setting} to the field's name{way_out}"
        )


def lacks_text(row: Row, fields: FieldMap, with_answers: bool) -> bool:
    """Whether a needed field exists and is empty; an input may always be empty, and tools.

    A chat is empty where a question of it is, or, with answers, its answer.
    """
    values = {s: _find_value(row, field) for s, field in needed_fields(fields, with_answers)}
    if "messages" in values and lacks_words(values["messages"], with_answer=with_answers):
        return True
    return any(
        setting not in ("input", *MAY_BE_ABSENT) and _is_empty(value)
        for setting, value in values.items()
    )


def given_templates(fields: TemplateFields) -> list[tuple[str, str]]:
    """The templates that are configured, each with its setting."""
    given = [(setting, getattr(fields, setting)) for setting in ("prompt", "response", "reference")]
    return [(setting, template) for setting, template in given if template is not None]


_ABSENT = object()


def _find_value(row: Row, name: str) -> object:
    """The value of "outer.inner"; _ABSENT if there is no such field."""
    if name in row:  # a field whose own name contains dots
        return row[name]
    value: object = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def field_value(row: Row, name: str, where: str) -> object:
    """The value of a field, "outer.inner" for a nested one.

    Raises: DataError if the outer field exists and has no such inner one; `where` names the row.
    """
    value = _find_value(row, name)
    if value is _ABSENT:
        outer = name.partition(".")[0]
        if outer not in row:
            return None  # a field that may be absent: check_fields has looked for the others
        raise DataError(
            f"{where}: no field {name!r}: field {outer!r} is {describe(row[outer])}; name another "
            "field of the row"
        )
    return value


def _column(field: str, existing: Collection[str]) -> str:
    """The column that contains the field "outer.inner"."""
    return field if field in existing else field.partition(".")[0]


def _is_empty(value: object) -> bool:
    if isinstance(value, list):
        return not value or any(isinstance(text, str) and not text.strip() for text in value)
    return value is None or (isinstance(value, str) and not value.strip())

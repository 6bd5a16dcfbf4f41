"""Values of rows: how messages show them, what tables add, and texts that no tokenizer reads."""

from __future__ import annotations

from collections.abc import Mapping

from distill_system.errors import DataError

Row = Mapping[str, object]


def describe(value: object) -> str:
    """A value's type and its beginning, for messages."""
    try:
        shown = repr(value)
    except RecursionError:
        shown = "nested too deep to be shown"
    return f"{type(value).__name__} {shown[:57] + '...' if len(shown) > 60 else shown}"


def without_padding(row: Row) -> Row:
    """A row of a table without the keys that only other rows have.

    A table gives every mapping within a column the keys of all, null where a row had none. Columns
    themselves stay, and so does `content`: a message with tool calls may have none.
    """
    return {name: _unpadded(value) for name, value in row.items()}


def _unpadded(value: object) -> object:
    if isinstance(value, list):
        return [_unpadded(item) for item in value] if _is_nested(value) else value
    if isinstance(value, dict):
        return {
            key: _unpadded(item)
            for key, item in value.items()
            if item is not None or key == "content"
        }
    return value


def _is_nested(items: list[object]) -> bool:
    return any(isinstance(item, dict | list) for item in items)


def check_texts(value: object, what: str) -> None:
    """Refuse texts, at any depth, that are no Unicode.

    JSON can spell half of a surrogate pair, which stands for no character. what: row and field.
    Raises: DataError, also for a value that is nested too deep to be looked through.
    """
    try:
        _check_texts(value, what)
    except RecursionError as error:
        raise DataError(f"{what}: nested too deep; mend or remove the row") from error


def _check_texts(value: object, what: str) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{what}: character {error.start} is half of a surrogate pair "
                f"({value[error.start]!r}), which no tokenizer reads; mend or remove the row"
            ) from error
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_texts(key, what)
            _check_texts(item, what)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_texts(item, what)

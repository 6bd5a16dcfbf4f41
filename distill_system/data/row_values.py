"""Values of rows: how messages show them, and texts that no tokenizer can read."""

from __future__ import annotations

from collections.abc import Mapping

from distill_system.errors import DataError


def describe(value: object) -> str:
    """A value's type and its beginning, for messages."""
    shown = repr(value)
    return f"{type(value).__name__} {shown[:57] + '...' if len(shown) > 60 else shown}"


def check_texts(value: object, what: str) -> None:
    """Refuse texts, at any depth, that are no Unicode.

    JSON can spell half of a surrogate pair, which stands for no character. what: row and field.
    Raises: DataError.
    """
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
            check_texts(key, what)
            check_texts(item, what)
    elif isinstance(value, list | tuple):
        for item in value:
            check_texts(item, what)

"""Reads a file of a run: each kind has one form, and anything else there is one kind of error.

In: a path, its form, and what to do where the file is broken.  Out: the content, or RunStateError
that names the file, the place in it, what was expected and the way out.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from distill_system.errors import RunStateError

Content = TypeVar("Content")

MOST_SHOWN = 80
"""Characters of a wrong value that a message shows."""


def read_form(path: Path, form: TypeAdapter[Content], *, way_out: str) -> Content:
    """The JSON in a file.

    form: what it must be; read strictly, so that no text passes for a number.
    way_out: what to do about a broken file, a sentence for the message.
    Raises: RunStateError if there is no such file, or it cannot be read, or is of another form.
    """
    content = read_form_if_exists(path, form, way_out=way_out)
    if content is None:
        raise RunStateError(f"{path} is missing: is {path.parent} a run's folder?")
    return content


def read_form_if_exists(path: Path, form: TypeAdapter[Content], *, way_out: str) -> Content | None:
    """As read_form; None if there is no such file."""
    text = read_bytes_if_exists(path, way_out=way_out)
    return None if text is None else parse_form(text, form, place=str(path), way_out=way_out)


def read_bytes_if_exists(path: Path, *, way_out: str) -> bytes | None:
    """A file's bytes; None if there is no such file.

    Raises: RunStateError if it cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = "a folder stands there" if path.is_dir() else error.strerror
        raise RunStateError(f"{path} cannot be read: {reason}. {way_out}") from error


def parse_form(text: bytes, form: TypeAdapter[Content], *, place: str, way_out: str) -> Content:
    """The content of a JSON text.  place: where it stands, for the message."""
    try:
        return form.validate_json(text, strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]  # the first is enough for a person
        if found["type"] == "json_invalid":
            shown = _cut(text.decode(errors="replace"))
            said = f"{place} is not JSON ({found['ctx']['error']}): {shown}"
        else:
            key = "".join(f", {part}" for part in found["loc"])
            got = "" if found["type"] == "missing" else f", got {_cut(repr(found['input']))}"
            said = f"{place}{key}: {found['msg']}{got}"
        raise RunStateError(f"{said}. {way_out}") from error


def _cut(text: str) -> str:
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."

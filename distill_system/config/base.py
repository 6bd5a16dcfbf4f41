"""What all configuration models share: frozen, no unknown keys, docstrings are the help text."""

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


class ConfigModel(BaseModel):
    """Base of all configuration models."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        # The resolved configuration is written as JSON, which has no infinity.
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


LONGEST_PATH, LONGEST_NAME = 4095, 255
"""Bytes, on Linux; of a whole path, and of a name in it."""


def expand_home(path: str) -> str:
    """The path with a leading ~ or ~user as that person's home folder.

    Raises: ValueError if this machine knows no such home folder, or no file could have this path.
    """
    check_path(path)
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(
            f"{path!r}: '~' stands for a home folder, and this machine knows none of "
            f"{expanded.partition('/')[0]!r}; write the whole path"
        )
    return expanded


def check_path(path: str) -> None:
    """Check that a file could have this path.

    Raises: ValueError that says why none can.
    """
    if "\0" in path:
        raise ValueError(f"{path!r}: no file's path holds a NUL character")
    try:
        names = path.encode().split(b"/")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{path!r}: expected a path in UTF-8, got other bytes; give the file another name"
        ) from error
    longest = max(map(len, names))
    if longest > LONGEST_NAME or len(path.encode()) > LONGEST_PATH:
        raise ValueError(
            f"{path[:40]!r}...: expected a path of at most {LONGEST_PATH} bytes and names of at "
            f"most {LONGEST_NAME} in it, got {len(path.encode())} and {longest}"
        )


LocalPath = Annotated[str, AfterValidator(expand_home)]
"""A path, or a hub name where one may stand: ~ is the home folder, as a shell has it."""

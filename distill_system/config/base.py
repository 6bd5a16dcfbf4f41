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


def expand_home(path: str) -> str:
    """The path with a leading ~ or ~user as that person's home folder.

    Raises: ValueError if this machine knows no such home folder.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(
            f"{path!r}: '~' stands for a home folder, and this machine knows none of "
            f"{expanded.partition('/')[0]!r}; write the whole path"
        )
    return expanded


LocalPath = Annotated[str, AfterValidator(expand_home)]
"""A path, or a hub name where one may stand: ~ is the home folder, as a shell has it."""

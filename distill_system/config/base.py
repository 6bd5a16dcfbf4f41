"""What all configuration models share: frozen, no unknown keys, docstrings are the help text."""

from pydantic import BaseModel, ConfigDict


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

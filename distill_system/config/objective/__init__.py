"""The distillation objectives, a union on `type`; one model per file of objectives/.

Their parts are in the modules of this folder: needs (what a teacher is asked), ammd, minillm,
preference, token_losses, token_matching.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from distill_system.config.objective.ammd import AmmdConfig
from distill_system.config.objective.minillm import MinillmConfig
from distill_system.config.objective.needs import HELD_OUT, MOMENTS, StreamName, TeacherNeeds
from distill_system.config.objective.preference import PreferenceConfig
from distill_system.config.objective.token_matching import TokenMatchingConfig

__all__ = [
    "HELD_OUT",
    "MOMENTS",
    "AmmdConfig",
    "MinillmConfig",
    "ObjectiveConfig",
    "PreferenceConfig",
    "StreamName",
    "TeacherNeeds",
    "TokenMatchingConfig",
]

ObjectiveConfig = Annotated[
    AmmdConfig | MinillmConfig | TokenMatchingConfig | PreferenceConfig,
    Field(discriminator="type"),
]

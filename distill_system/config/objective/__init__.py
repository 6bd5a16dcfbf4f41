"""The distillation objectives, a union on `type`, their losses and what they ask of the teacher."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from distill_system.config.objective.ammd import (
    AdvantageConfig,
    AmmdConfig,
    ClosedFormCritic,
    CriticConfig,
    FeaturesConfig,
    GradientCritic,
    ProjectedFeatures,
    UnitFeatures,
    WhitenedFeatures,
)
from distill_system.config.objective.minillm import (
    MinillmConfig,
)
from distill_system.config.objective.needs import (
    DISTRIBUTION,
    MOMENTS,
    NOTHING,
    OpenShare,
    Share,
    StreamName,
    TeacherNeeds,
)
from distill_system.config.objective.token_losses import (
    AdaptiveClipKlConfig,
    CrossEntropyConfig,
    FirstConfig,
    ForwardKlConfig,
    GeneralizedJsdConfig,
    InterpolatedCrossEntropyConfig,
    ReverseKlConfig,
    SinkhornConfig,
    SkewKlConfig,
    SkewReverseKlConfig,
    TokenLossConfig,
    TopKConfig,
    TotalVariationConfig,
)
from distill_system.config.objective.token_matching import (
    HiddenMatchingConfig,
    RelationalConfig,
    TermConfig,
    TokenMatchingConfig,
)

__all__ = [
    "DISTRIBUTION",
    "MOMENTS",
    "NOTHING",
    "AdaptiveClipKlConfig",
    "AdvantageConfig",
    "AmmdConfig",
    "ClosedFormCritic",
    "CriticConfig",
    "CrossEntropyConfig",
    "FeaturesConfig",
    "FirstConfig",
    "ForwardKlConfig",
    "GeneralizedJsdConfig",
    "GradientCritic",
    "HiddenMatchingConfig",
    "InterpolatedCrossEntropyConfig",
    "MinillmConfig",
    "ObjectiveConfig",
    "OpenShare",
    "ProjectedFeatures",
    "RelationalConfig",
    "ReverseKlConfig",
    "Share",
    "SinkhornConfig",
    "SkewKlConfig",
    "SkewReverseKlConfig",
    "StreamName",
    "TeacherNeeds",
    "TermConfig",
    "TokenLossConfig",
    "TokenMatchingConfig",
    "TopKConfig",
    "TotalVariationConfig",
    "UnitFeatures",
    "WhitenedFeatures",
]

ObjectiveConfig = Annotated[
    AmmdConfig | MinillmConfig | TokenMatchingConfig, Field(discriminator="type")
]

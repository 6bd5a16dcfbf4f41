"""The objectives: pure torch, one file per method, behind one seam (rows.py)."""

from __future__ import annotations

from distill_system.config.objective import (
    AmmdConfig,
    MinillmConfig,
    ObjectiveConfig,
    PreferenceConfig,
    TokenMatchingConfig,
)
from distill_system.config.objective.token_losses import CrossEntropyConfig
from distill_system.objectives.action_space import make_action_embeddings
from distill_system.objectives.ammd import Ammd
from distill_system.objectives.distances import measure_overlap, measure_stream
from distill_system.objectives.importance import UNWEIGHTED, Importance
from distill_system.objectives.language_model import language_model_loss
from distill_system.objectives.minillm import Minillm
from distill_system.objectives.preference import Preference
from distill_system.objectives.rows import (
    Objective,
    PairRows,
    PolicyHeads,
    TeacherRows,
    TokenRows,
)
from distill_system.objectives.token_matching import TokenMatching
from distill_system.objectives.vocabulary import read_top_k, read_vocabulary

__all__ = [
    "Importance",
    "PairRows",
    "PolicyHeads",
    "TeacherRows",
    "TokenRows",
    "build_objective",
    "language_model_loss",
    "make_action_embeddings",
    "measure_overlap",
    "measure_stream",
    "read_top_k",
    "read_vocabulary",
]

SUPERVISED = TokenMatchingConfig(
    type="token_matching", off_policy=CrossEntropyConfig(type="cross_entropy")
)
"""Next-token loss on the responses of the data; asks nothing of a teacher."""


def build_objective(
    config: ObjectiveConfig | None,
    *,
    max_response_tokens: int,
    total_steps: int,
    importance: Importance = UNWEIGHTED,
) -> Objective:
    """The objective that the configuration names; None is supervised fine-tuning on data.

    max_response_tokens: no response is longer. total_steps: learner steps of the whole run.
    importance: how on-policy tokens that an older student wrote are weighed.
    """
    match config:
        case None:
            return TokenMatching(SUPERVISED, total_steps=total_steps)
        case AmmdConfig():
            return Ammd(config, max_response_tokens=max_response_tokens, importance=importance)
        case MinillmConfig():
            return Minillm(config, importance=importance)
        case PreferenceConfig():
            return Preference(config)
        case TokenMatchingConfig():
            return TokenMatching(config, total_steps=total_steps, importance=importance)

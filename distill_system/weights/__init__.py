"""Weight transfer: the learner's weights in, the same weights in every rollout worker out."""

from distill_system.weights.agreement import GapAlarm, explain_gap
from distill_system.weights.client import FanOutClient, WeightSyncClient
from distill_system.weights.publisher import WeightPublisher
from distill_system.weights.rounding import WireFormat

__all__ = [
    "FanOutClient",
    "GapAlarm",
    "WeightPublisher",
    "WeightSyncClient",
    "WireFormat",
    "explain_gap",
]

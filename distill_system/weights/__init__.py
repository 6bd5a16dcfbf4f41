"""Weight transfer: the learner's weights in, the same weights in every rollout worker out."""

from distill_system.weights.agreement import check_logprob_gap
from distill_system.weights.client import FanOutClient, WeightSyncClient
from distill_system.weights.publisher import WeightPublisher

__all__ = ["FanOutClient", "WeightPublisher", "WeightSyncClient", "check_logprob_gap"]

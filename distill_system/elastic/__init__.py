"""Workers that come, go and are lost while a run goes on."""

from distill_system.elastic.elastic_pools import ElasticPools
from distill_system.elastic.replacement_budget import ReplacementBudget
from distill_system.elastic.scale_requests import ScaleRequests

__all__ = ["ElasticPools", "ReplacementBudget", "ScaleRequests"]

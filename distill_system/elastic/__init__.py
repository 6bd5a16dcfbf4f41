"""Pools that change while a run goes on: who asks, who decides, who comes and leaves."""

from distill_system.elastic.elastic_pools import ElasticPools
from distill_system.elastic.scale_requests import ScaleRequests

__all__ = ["ElasticPools", "ScaleRequests"]

"""Pools whose size changes while a run goes on: by request, or by automatic scaling."""

from distill_system.elastic.elastic_pools import ElasticPools
from distill_system.elastic.scale_requests import ScaleRequests

__all__ = ["ElasticPools", "ScaleRequests"]

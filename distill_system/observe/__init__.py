"""What a run reports: live view, metrics, timings, summary, report, TensorBoard, Prometheus."""

from distill_system.observe.activity import (
    PoolClock,
    RecentActivity,
    Wait,
    activity_metrics,
    join_stretches,
    wire_metrics,
)
from distill_system.observe.bottleneck import find_bottleneck, shares_cores
from distill_system.observe.environment import write_environment
from distill_system.observe.live import LiveView
from distill_system.observe.metrics import MetricLog
from distill_system.observe.optional_writes import OptionalWrites
from distill_system.observe.prompt_log import PromptLog
from distill_system.observe.report import write_report
from distill_system.observe.run_directory import RunDirectory
from distill_system.observe.staleness import staleness_metrics
from distill_system.observe.summary import write_evaluation, write_summary
from distill_system.observe.timings import Timings

__all__ = [
    "LiveView",
    "MetricLog",
    "OptionalWrites",
    "PoolClock",
    "PromptLog",
    "RecentActivity",
    "RunDirectory",
    "Timings",
    "Wait",
    "activity_metrics",
    "find_bottleneck",
    "join_stretches",
    "shares_cores",
    "staleness_metrics",
    "wire_metrics",
    "write_environment",
    "write_evaluation",
    "write_report",
    "write_summary",
]

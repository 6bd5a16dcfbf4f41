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
from distill_system.observe.fault_log import FaultLog
from distill_system.observe.job_page import JobPage
from distill_system.observe.live import LiveView
from distill_system.observe.metrics import MetricLog, PromptLog
from distill_system.observe.report import write_curriculum, write_report
from distill_system.observe.run_directory import RunDirectory
from distill_system.observe.run_gauges import EngineGauges, RunGauges
from distill_system.observe.run_writes import RunWrites
from distill_system.observe.summary import write_evaluation, write_summary
from distill_system.observe.text_figures import staleness_metrics, text_metrics
from distill_system.observe.timings import Timings
from distill_system.observe.trackers import require_trackers

__all__ = [
    "EngineGauges",
    "FaultLog",
    "JobPage",
    "LiveView",
    "MetricLog",
    "PoolClock",
    "PromptLog",
    "RecentActivity",
    "RunDirectory",
    "RunGauges",
    "RunWrites",
    "Timings",
    "Wait",
    "activity_metrics",
    "find_bottleneck",
    "join_stretches",
    "require_trackers",
    "shares_cores",
    "staleness_metrics",
    "text_metrics",
    "wire_metrics",
    "write_curriculum",
    "write_environment",
    "write_evaluation",
    "write_report",
    "write_summary",
]

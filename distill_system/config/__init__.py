"""The configuration of a run: pydantic models, layered YAML files, dotted overrides."""

from distill_system.config.loading import (
    dump_config,
    load_config,
    load_stages,
    planned_runs,
    require_one_run,
)
from distill_system.config.run import RunConfig

__all__ = [
    "RunConfig",
    "dump_config",
    "load_config",
    "load_stages",
    "planned_runs",
    "require_one_run",
]

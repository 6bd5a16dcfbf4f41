"""Whether this process is the driver of a submitted job: Ray tells it by one variable."""

from __future__ import annotations

import os

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set for the process that a job's entrypoint runs, and for no worker."""


def is_job() -> bool:
    """Whether `ray job submit` or `distill-system submit` started this process."""
    return JOB_VARIABLE in os.environ

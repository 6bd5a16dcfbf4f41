"""Batch inference over many workers by Ray Data: tables in, tables out, as they are finished.

For work that is not part of a run: results come in no order, a worker that dies is started again
and its batch done again, until nothing has been finished for as long as the deadlines allow.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow
import ray
from ray.exceptions import GetTimeoutError, RayError

from distill_system.cluster.liveness import plain_text
from distill_system.config.pools import DeadlinesConfig, PoolConfig
from distill_system.errors import DeadlineError, DistillError, ResourceError, WorkerError

LAST_TRACEBACK_LINES = 30
RAY_ADDS = "\nFailed to apply UDF transform"
"""Begins what Ray Data appends to the message of whatever a worker raised."""


def infer_batches(
    batches: Sequence[pyarrow.Table],
    worker_class: type,
    arguments: Mapping[str, Any],
    *,
    pool: PoolConfig,
    environment: Mapping[str, str],
    deadlines: DeadlinesConfig,
) -> Iterator[pyarrow.Table]:
    """What worker_class(**arguments)(batch) returns for each batch, in the order of completion.

    batches: not empty; each is one call.  worker_class: a plain class that maps a table to a
    table.  Needs a ClusterSession.

    Raises: the DistillError that a worker raised; ResourceError if the cluster cannot place the
        workers in time; DeadlineError if nothing is finished for so long as a worker may take to
        load and to answer; WorkerError for anything else that ended a worker.
    """
    from ray.data.exceptions import ExecutionTimeoutError  # a second, which other commands spare

    mapped = _plan(batches, worker_class, arguments, pool, environment, deadlines)
    try:
        yield from mapped.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    except GetTimeoutError as error:
        raise ResourceError(
            f"the cluster did not place {pool.count} workers of {pool.cpus:g} CPUs, {pool.gpus:g} "
            f"GPUs and {dict(pool.custom_resources)} within deadlines.resources_seconds="
            f"{deadlines.resources_seconds:.0f}. Lower the pool's count, cpus or gpus, or add nodes"
        ) from error
    except ExecutionTimeoutError as error:
        raise DeadlineError(
            "no batch was finished within deadlines.start_seconds + deadlines.call_seconds = "
            f"{_patience(deadlines):.0f} s. Raise them, or look at the workers' logs in the Ray "
            "dashboard"
        ) from error
    except RayError as error:
        cause = getattr(error, "cause", error)
        if isinstance(cause, DistillError):
            raise type(cause)(str(cause).partition(RAY_ADDS)[0]) from error
        lines = plain_text(error).splitlines()[-LAST_TRACEBACK_LINES:]
        raise WorkerError("\n".join([f"{worker_class.__name__} failed:", *lines])) from error


def _plan(
    batches: Sequence[pyarrow.Table],
    worker_class: type,
    arguments: Mapping[str, Any],
    pool: PoolConfig,
    environment: Mapping[str, str],
    deadlines: DeadlinesConfig,
) -> Any:  # ray.data.Dataset, whose import takes a second that no other command need pay
    import ray.data

    _configure(deadlines)
    size = min(pool.count, len(batches))  # more would find nothing to do
    return ray.data.from_arrow(list(batches)).map_batches(
        worker_class,
        fn_constructor_kwargs=dict(arguments),
        batch_size=None,  # a block, which is one of the batches
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=2),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
        resources=dict(pool.custom_resources),
        runtime_env={"env_vars": dict(environment)},
    )


def _configure(deadlines: DeadlinesConfig) -> None:
    """Deadlines, errors as they were raised, and no second progress bar beside ours."""
    context = ray.data.DataContext.get_current()
    wanted = {
        "wait_for_min_actors_s": max(1, round(deadlines.resources_seconds)),
        "execution_no_progress_timeout_s": _patience(deadlines),
        "raise_original_map_exception": True,
        "enable_progress_bars": False,
        "print_on_execution_start": False,
    }
    for name, value in wanted.items():
        setattr(context, name, value)
    logger = logging.getLogger("ray.data")  # its file in Ray's folder stays
    for handler in [h for h in logger.handlers if isinstance(h, logging.StreamHandler)]:
        logger.removeHandler(handler)


def _patience(deadlines: DeadlinesConfig) -> float:
    return deadlines.start_seconds + deadlines.call_seconds

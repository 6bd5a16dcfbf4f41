"""Batch inference over many workers with Ray Data: tables in, result tables out as they finish.

For work outside a run (`distill-system generate`). Results come in any order. Ray Data restarts a
worker that dies and repeats its batch; the call fails only when no batch finishes within the
deadlines.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow
import ray
from ray.exceptions import GetTimeoutError, RayError

from distill_system.cluster.liveness import plain_text
from distill_system.cluster.ray_messages import logged_stderr
from distill_system.config.pools import DeadlinesConfig, PoolConfig
from distill_system.errors import DeadlineError, DistillError, ResourceError, WorkerError

LAST_TRACEBACK_LINES = 30
RAY_SUFFIX = "\nFailed to apply UDF transform"
"""Ray Data appends a text that starts with this to the message of every error a worker raises."""

START_METHOD = "_start_actor"
"""Of Ray Data's operator that maps over workers: it starts one of them."""


def infer_batches(
    batches: Sequence[pyarrow.Table],
    worker_class: type,
    arguments: Mapping[str, Any],
    *,
    pool: PoolConfig,
    environment: Mapping[str, str],
    deadlines: DeadlinesConfig,
) -> Iterator[pyarrow.Table]:
    """Yield worker_class(**arguments)(batch) for each batch, in the order of completion.

    batches: not empty; each is one call.  worker_class: a plain class whose instances map a table
    to a table.  Call it inside a ClusterSession.

    Raises: the DistillError that a worker raised; ResourceError if the cluster does not place the
        workers within deadlines.resources_seconds; DeadlineError if no batch finishes within
        deadlines.start_seconds + call_seconds; WorkerError for any other end of a worker.
    """
    # Imported here: Ray Data takes a second to import, and only this command uses it.
    from ray.data.exceptions import ExecutionTimeoutError

    mapped = _plan(batches, worker_class, arguments, pool, environment, deadlines)
    try:
        with _starts_logged():
            yield from mapped.iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=0
            )
    except GetTimeoutError as error:
        raise ResourceError(
            f"the cluster did not place {pool.count} workers of {pool.cpus:g} CPUs, {pool.gpus:g} "
            f"GPUs and {dict(pool.custom_resources)} within deadlines.resources_seconds="
            f"{deadlines.resources_seconds:.0f}. Lower the pool's count, cpus or gpus, or add nodes"
        ) from error
    except ExecutionTimeoutError as error:
        raise DeadlineError(
            "no batch was finished within deadlines.start_seconds + deadlines.call_seconds = "
            f"{_progress_seconds(deadlines):.0f} s. Raise them, or look at the workers' logs in "
            "Ray's dashboard"
        ) from error
    except RayError as error:
        cause = getattr(error, "cause", error)
        if isinstance(cause, DistillError):
            raise type(cause)(str(cause).partition(RAY_SUFFIX)[0]) from error
        lines = plain_text(error).splitlines()[-LAST_TRACEBACK_LINES:]
        raise WorkerError("\n".join([f"{worker_class.__name__} failed:", *lines])) from error


def _plan(
    batches: Sequence[pyarrow.Table],
    worker_class: type,
    arguments: Mapping[str, Any],
    pool: PoolConfig,
    environment: Mapping[str, str],
    deadlines: DeadlinesConfig,
) -> Any:  # a ray.data.Dataset; naming the type would import Ray Data in every command
    import ray.data

    _configure(deadlines)
    size = min(pool.count, len(batches))  # further workers would have no batch to do
    # from_arrow makes one block of each table, and batch_size=None hands a worker one whole block:
    # together, each call gets exactly one of the given batches.
    return ray.data.from_arrow(list(batches)).map_batches(
        worker_class,
        fn_constructor_kwargs=dict(arguments),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=2),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
        resources=dict(pool.custom_resources),
        runtime_env={"env_vars": dict(environment)},
    )


@contextmanager
def _starts_logged() -> Iterator[None]:
    """Log what Ray's core worker writes to the terminal of each worker that Ray Data starts.

    Ray Data hands the work over by the object store, and the core worker says of everyone started
    so that it could not be restarted once that is gone; it stays until the work is done. There is
    no switch for it: a method of Ray Data is replaced, by name.
    """
    from ray.data._internal.execution.operators.actor_pool_map_operator import (
        ActorPoolMapOperator,
    )

    start = getattr(ActorPoolMapOperator, START_METHOD)

    def start_logged(*arguments: Any) -> Any:
        with logged_stderr():
            return start(*arguments)

    setattr(ActorPoolMapOperator, START_METHOD, start_logged)
    try:
        yield
    finally:
        setattr(ActorPoolMapOperator, START_METHOD, start)


def _configure(deadlines: DeadlinesConfig) -> None:
    """Set our deadlines, keep a worker's own exception, silence Ray Data's terminal output."""
    context = ray.data.DataContext.get_current()
    settings = {
        "wait_for_min_actors_s": max(1, round(deadlines.resources_seconds)),
        "execution_no_progress_timeout_s": _progress_seconds(deadlines),
        "raise_original_map_exception": True,
        "enable_progress_bars": False,
        "print_on_execution_start": False,
    }
    for name, value in settings.items():
        setattr(context, name, value)
    # Our live view owns the terminal; Ray Data still logs to the file in its session's folder.
    logger = logging.getLogger("ray.data")
    for handler in [h for h in logger.handlers if isinstance(h, logging.StreamHandler)]:
        logger.removeHandler(handler)


def _progress_seconds(deadlines: DeadlinesConfig) -> float:
    """Longest time without a finished batch: a worker may load its model and then do one call."""
    return deadlines.start_seconds + deadlines.call_seconds

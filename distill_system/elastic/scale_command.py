"""`distill-system scale`: ask a running distillation for other pool sizes and wait for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from distill_system.config import load_config
from distill_system.config.pools import ELASTIC_POOLS
from distill_system.elastic.scale_requests import PoolStatus, ScaleRequests, ScaleStatus
from distill_system.errors import (
    ConfigError,
    DeadlineError,
    DistillError,
    ResourceError,
    RunStateError,
)
from distill_system.observe import RunDirectory
from distill_system.observe.run_status import find_run

POLL_SECONDS = 0.5
NOTIFY_SECONDS = 5.0


def scale(
    run_name: str,
    sizes: Sequence[str],
    *,
    runs_directory: str,
    wait_seconds: float,
    notify: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, PoolStatus]:
    """Send a request and wait up to wait_seconds until the pools have the sizes asked for.

    run_name: the run's folder, or its name below runs_directory.  sizes: pool=count each.
    Returns the status of those pools at the end.

    Raises: ConfigError for a pool that cannot change or a size out of its bounds; RunStateError if
    no run reads requests in that folder; ResourceError if the run refused the request, gave a
    worker up, or found no place for one; DeadlineError if it did not read it, or the workers were
    not there, in time.
    """
    run = find_run(run_name, runs_directory)
    wanted = parse_sizes(sizes)
    _require_bounds(run, wanted)
    requests = ScaleRequests(run)
    _require_listener(run, requests)
    request_id = requests.write(wanted)
    deadline, notified_at, told = clock() + wait_seconds, clock(), ""
    while True:
        status = requests.read_status()
        if status is not None and _is_answered(status, request_id, wanted):
            return {name: status.pools[name] for name in wanted}
        now = clock()
        if now >= deadline:  # the request goes on all the same
            raise _unanswered(status, request_id, wanted, wait_seconds)
        _require_listener(run, requests)
        lacking = _find_lacking(status, wanted)
        if lacking and lacking != told:
            told = lacking
            notify(lacking)
        elif now - notified_at >= NOTIFY_SECONDS:
            notified_at = now
            notify(_describe_wait(status, request_id, wanted))
        sleep(min(POLL_SECONDS, deadline - now))


def parse_sizes(sizes: Sequence[str]) -> dict[str, int]:
    """Pool -> number of workers from texts such as student_rollout=4.  Raises: ConfigError."""
    wanted: dict[str, int] = {}
    for text in sizes:
        name, _, count = text.partition("=")
        if name not in ELASTIC_POOLS or not (count.isascii() and count.isdigit()):
            raise ConfigError(
                f"expected pool=count such as student_rollout=4, pool one of "
                f"{', '.join(ELASTIC_POOLS)}, got {text!r}"
            )
        if name in wanted:
            raise ConfigError(f"{name} is given twice: {wanted[name]} and {count}; give one")
        wanted[name] = int(count)
    return wanted


def describe(pools: Mapping[str, PoolStatus]) -> list[str]:
    """One line for each pool."""
    return [_describe_pool(name, pool) for name, pool in pools.items()]


def _require_bounds(run: RunDirectory, wanted: Mapping[str, int]) -> None:
    pools = load_config([run.config_path]).pools.by_name
    for name, count in wanted.items():
        if not pools[name].fewest <= count <= pools[name].most:
            raise ConfigError(
                f"{name}={count} is out of its bounds in {run.config_path}: expected "
                f"{pools[name].fewest} to {pools[name].most}. pools.{name}.min_count and max_count "
                "widen them when the run is started anew with --resume"
            )


def _require_listener(run: RunDirectory, requests: ScaleRequests) -> None:
    if not requests.has_listener():
        raise RunStateError(
            f"{run.path}: expected a run that is distilling, found none, so the request would not "
            "be read. For a run that is to start, set pools.*.count"
        )


def _is_answered(status: ScaleStatus, request_id: str, wanted: Mapping[str, int]) -> bool:
    """Whether the request is fulfilled.  Raises: ResourceError if it was refused or given up."""
    if request_id not in status.answers:
        return False
    refusal = status.answers[request_id]
    if refusal:
        raise ResourceError(f"the run refused: {refusal}")
    for name in wanted:
        if status.pools[name].problem:
            raise ResourceError(f"{status.pools[name].problem}. The run goes on without it")
    return all(status.pools[name].is_settled for name in wanted)


def _unanswered(
    status: ScaleStatus | None, request_id: str, wanted: Mapping[str, int], seconds: float
) -> DistillError:
    """The error of a wait that has ended before the pools have the sizes asked for."""
    if status is None or request_id not in status.answers:
        return DeadlineError(
            f"the run did not read the request within {seconds:g} s. It reads between two steps "
            "and will still do so; --wait waits longer"
        )
    pools = {name: status.pools[name] for name in wanted}
    standing = "; ".join(describe(pools))
    lacking = [pool.no_place for pool in pools.values() if pool.no_place]
    if lacking:
        return ResourceError(
            f"{standing}: {lacking[0]}. The run goes on with those it has, and waits for a place "
            "until deadlines.resources_seconds have passed. Add nodes, or ask for fewer workers"
        )
    return DeadlineError(
        f"{standing}, after {seconds:g} s. They are still on their way; --wait waits longer"
    )


def _find_lacking(status: ScaleStatus | None, wanted: Mapping[str, int]) -> str:
    """For which pool the cluster has no place, and what it has instead; "" if for none."""
    pools = {} if status is None else status.pools
    lacking = {name: pools[name].no_place for name in wanted if name in pools}
    return "; ".join(f"{name}: {text}" for name, text in lacking.items() if text)


def _describe_wait(status: ScaleStatus | None, request_id: str, wanted: Mapping[str, int]) -> str:
    if status is None or request_id not in status.answers:
        return "waiting for the run to read the request, as it does between two steps"
    return "; ".join(describe({name: status.pools[name] for name in wanted}))


def _describe_pool(name: str, pool: PoolStatus) -> str:
    line = f"{name}: {pool.present} of {pool.wanted} workers"
    parts = [f"{pool.starting} starting"] if pool.starting else []
    parts += [f"{pool.leaving} leaving"] if pool.leaving else []
    if pool.since is not None:
        parts.append(f"asked for {max(0.0, time.time() - pool.since):.0f} s ago")
    return line + (f" ({', '.join(parts)})" if parts else "")

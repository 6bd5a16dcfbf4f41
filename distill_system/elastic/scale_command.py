"""`distill-system scale`: ask a running distillation for other pool sizes and wait for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from distill_system.config import load_config
from distill_system.config.pools import ELASTIC_POOLS
from distill_system.elastic.scale_requests import PoolStatus, ScaleRequests, ScaleStatus
from distill_system.errors import ConfigError, DeadlineError, ResourceError, RunStateError
from distill_system.observe import RunDirectory

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
    Returns the status of those pools at the end; workers may still be starting or leaving then.

    Raises: ConfigError for a pool that cannot change or a size out of its bounds; RunStateError if
    no run reads requests in that folder; ResourceError if the run refused the request or gave a
    worker up; DeadlineError if the run did not read it in time.
    """
    run = find_run(run_name, runs_directory)
    wanted = parse_sizes(sizes)
    _require_bounds(run, wanted)
    requests = ScaleRequests(run)
    _require_listener(run, requests)
    request_id = requests.write(wanted)
    deadline, notified_at = clock() + wait_seconds, clock()
    while True:
        status = requests.read_status()
        if status is not None and _is_answered(status, request_id, wanted):
            return {name: status.pools[name] for name in wanted}
        now = clock()
        if now >= deadline:  # an accepted request goes on; only an unread one is an error
            return _at_deadline(status, request_id, wanted, wait_seconds)
        _require_listener(run, requests)
        if now - notified_at >= NOTIFY_SECONDS:
            notified_at = now
            notify(_describe_wait(status, request_id, wanted))
        sleep(min(POLL_SECONDS, deadline - now))


def find_run(name: str, runs_directory: str) -> RunDirectory:
    """The folder of a run, by path or name.  Raises: RunStateError if there is no such run."""
    with suppress(OSError, ValueError):  # a name that no file could have
        for path in (Path(name), Path(runs_directory) / name):
            run = RunDirectory(path)
            if run.config_path.exists():
                return run
    raise RunStateError(
        f"no run {name!r}: expected a run's folder, or the name of one below {runs_directory}/ "
        "(--runs-directory); a run has a config.json"
    )


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


def _at_deadline(
    status: ScaleStatus | None, request_id: str, wanted: Mapping[str, int], seconds: float
) -> dict[str, PoolStatus]:
    if status is None or request_id not in status.answers:
        raise DeadlineError(
            f"the run did not read the request within {seconds:g} s. It reads between two steps "
            "and will still do so; --wait waits longer"
        )
    return {name: status.pools[name] for name in wanted}


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

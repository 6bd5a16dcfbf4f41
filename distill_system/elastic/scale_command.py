"""`distill-system scale`: ask a run that goes on for other pool sizes, and wait for its answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from distill_system.config import load_config
from distill_system.config.pools import ELASTIC_POOLS
from distill_system.elastic.scale_requests import PoolStatus, ScaleRequests, ScaleStatus
from distill_system.errors import ConfigError, DeadlineError, ResourceError, RunStateError
from distill_system.observe import RunDirectory

LOOK_SECONDS = 0.5
TELL_SECONDS = 5.0


def scale(
    run_name: str,
    sizes: Sequence[str],
    *,
    runs_directory: str,
    wait_seconds: float,
    say: Callable[[str], None],
) -> dict[str, PoolStatus]:
    """Ask, and wait until the pools have the sizes that were asked for, or for so long.

    run_name: the run's folder, or its name below runs_directory.  sizes: pool=count each.
    Returns the pools asked for as they are then; workers may still be on their way.

    Raises: ConfigError for a pool that cannot change or a size out of its bounds; RunStateError if
    no run listens there; ResourceError if the run refused or gave up; DeadlineError if it did not
    answer in time.
    """
    run = find_run(run_name, runs_directory)
    wanted = parse_sizes(sizes)
    _require_bounds(run, wanted)
    requests = ScaleRequests(run)
    _require_heard(run, requests)
    request_id = requests.write(wanted)
    deadline, told_at = time.monotonic() + wait_seconds, time.monotonic()
    while True:
        status = requests.read_status()
        if status is not None and _is_answered(status, request_id, wanted):
            return {name: status.pools[name] for name in wanted}
        now = time.monotonic()
        if now >= deadline:
            return _at_deadline(status, request_id, wanted, wait_seconds)
        _require_heard(run, requests)
        if now - told_at >= TELL_SECONDS:
            told_at = now
            say(_describe_wait(status, request_id, wanted))
        time.sleep(min(LOOK_SECONDS, deadline - now))


def find_run(name: str, runs_directory: str) -> RunDirectory:
    """The folder of a run.  Raises: RunStateError if neither place holds one."""
    for path in (Path(name), Path(runs_directory) / name):
        run = RunDirectory(path)
        if run.config_path.exists():
            return run
    raise RunStateError(
        f"no run {name!r}: expected a run's folder, or the name of one below {runs_directory}/ "
        "(--runs-directory); a run has a config.json"
    )


def parse_sizes(sizes: Sequence[str]) -> dict[str, int]:
    """pool=count texts as numbers.  Raises: ConfigError."""
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


def _require_heard(run: RunDirectory, requests: ScaleRequests) -> None:
    if not requests.is_heard():
        raise RunStateError(
            f"{run.path}: no run distils here now, so that nobody would read the request. It is "
            "read while the distillation itself goes on; give pools.*.count to a run that is to "
            "start"
        )


def _is_answered(status: ScaleStatus, request_id: str, wanted: Mapping[str, int]) -> bool:
    """Whether nothing more is to come.  Raises: ResourceError if it is not what was asked for."""
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

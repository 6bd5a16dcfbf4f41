"""Modelled pools: what bounded staleness brings at 1 to 64 workers, and what the driver costs.

    python benchmarks/pipeline.py modelled [--quick]

Engines, scorers and learner last as long as a cost model says (modelled_pools.py); the streams, the
staleness window, the queues and the learner's door are the real ones. First under a simulated clock
(modelled_clock.py): the barrier loop, which is max_staleness 0, against S = 1, 2, 4, 8 on the same
workers and the same prompts. Then with the real driver on real Ray (modelled_ray.py), to see how
near the simulation is and to take the driver's CPU time.

Two bounds stand beside a speed-up. slowest pool: the barrier's step over what the busiest of the
pools needs for a step if it never waits. window: S + 1, since that many batches share the time from
weights to weights; it is no strict bound, as more sequences at once make each slower, and a batch's
scoring overlaps its writing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from modelled_clock import simulate
from modelled_plot import draw_ages, draw_scaling
from modelled_pools import Lengths
from modelled_ray import hosts, run_on_ray
from modelled_runs import SEED, Measured, Setting
from record import RESULTS, write_result

STALENESS = (1, 2, 4, 8)
WORKERS = (1, 2, 4, 8, 16, 32, 64)
ON_RAY = (
    (4, 4, 0.05, 3.0),
    (16, 0, 0.05, 3.0),
    (16, 4, 0.05, 3.0),
    (64, 4, 0.05, 6.0),
    (64, 4, 0.2, 3.0),
)
"""Workers, S, slice_seconds, and real seconds for a modelled one, so that two cores can follow."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one setting: a try of the script")
    measure(quick=parser.parse_args().quick)


def measure(*, quick: bool) -> None:
    """Both parts; writes results/pipeline_modelled.json and two plots."""
    rows, found = _sweep(quick)
    rows += _regimes(quick)
    write_result("pipeline_modelled", rows, {}, seeds={"seed": SEED})
    on_ray = _compare_on_ray(quick)
    best = max((one for one in found if one.setting.max_staleness), key=_rate)
    barrier = next(
        one
        for one in found
        if one.setting.max_staleness == 0 and one.setting.workers == best.setting.workers
    )
    driver = {row["workers"]: row["driver_ms"] for row in on_ray if row["slice_s"] == 0.05}
    headline = {
        "modelled_speedup_vs_barrier": barrier.step_seconds / best.step_seconds,
        "learner_idle_share": best.learner_idle,
        "driver_ms_per_trajectory": max(driver.values()),
        **{f"driver_ms_per_trajectory_{count}_workers": ms for count, ms in driver.items()},
        "largest_gap_to_ray": max(abs(row["gap"]) for row in on_ray),
    }
    write_result("pipeline_modelled_on_ray", on_ray, {}, seeds={"seed": SEED})
    write_result("pipeline_modelled", rows, headline, seeds={"seed": SEED})
    if not quick:
        draw_scaling(found, RESULTS / "pipeline_modelled.svg")
        draw_ages(found, RESULTS / "pipeline_modelled_staleness.svg", workers=16)


def _sweep(quick: bool) -> tuple[list[dict[str, Any]], list[Measured]]:
    """The default workload over workers and S."""
    workers, staleness = ((8,), (4,)) if quick else (WORKERS, STALENESS)
    rows, found = [], []
    for count in workers:
        base = Setting(workers=count, max_staleness=0)
        some, ones = _against_barrier("default", base, staleness)
        rows, found = rows + some, found + ones
    return rows, found


def _regimes(quick: bool) -> list[dict[str, Any]]:
    """Where there is more or less to gain, and the policies for what comes late."""
    if quick:
        return []
    base = Setting(workers=16, max_staleness=0)
    even = Lengths(is_ragged=False)
    cases = {
        "all of mean length": replace(base, lengths=even),
        "mean length, 2 workers": replace(base, lengths=even, workers=2),
        "4 times as long": replace(base, lengths=Lengths(times=4.0, longest=2048)),
        "batch of 512": replace(base, batch=512),
        "engines of 256": replace(base, workers=2, num_sequences=256),
        "both streams (AMMD)": replace(base, both_streams=True, teachers=2, scorers=3),
    }
    rows = [row for name, case in cases.items() for row in _against_barrier(name, case, (4, 8))[0]]
    for slices in (0.1, 0.2):
        longer = replace(base, workers=64, slice_seconds=slices)
        rows += _against_barrier(f"slices of {slices} s", longer, (4, 8))[0]
    for policy in ("reissue", "weigh"):
        rows += _against_barrier(f"too_old={policy}", replace(base, too_old=policy), (1, 4))[0]
    return rows


def _against_barrier(
    name: str, base: Setting, staleness: Sequence[int]
) -> tuple[list[dict[str, Any]], list[Measured]]:
    found = [simulate(replace(base, max_staleness=most)) for most in (0, *staleness)]
    barrier = found[0]
    return [_row(name, barrier, one) for one in found], found


def _row(name: str, barrier: Measured, one: Measured) -> dict[str, Any]:
    setting = one.setting
    # At its best a pool needs for a step what it worked for one, over as many workers.
    needs = {pool: share * one.step_seconds for pool, share in one.busy.items()}
    slowest = max(needs, key=lambda pool: needs[pool])
    return {
        "workload": name,
        "workers": setting.workers,
        "S": setting.max_staleness,
        "step_s": one.step_seconds,
        "speed-up": barrier.step_seconds / one.step_seconds,
        "bound, slowest pool": barrier.step_seconds / needs[slowest],
        "bound, window": float(setting.max_staleness + 1),
        "slowest": slowest,
        "learner_idle": one.learner_idle,
        **{f"busy_{pool}": one.busy[pool] for pool in ("student_rollout", "teacher_scoring")},
        "mean_age": _mean_age(one),
        "ages": ", ".join(f"{age}: {share:.2f}" for age, share in one.ages.items()),
    }


def _mean_age(one: Measured) -> float:
    """Of on-policy tokens; those older than S count as S + 1."""
    older = one.setting.max_staleness + 1
    return sum(share * (older if age == "older" else int(age)) for age, share in one.ages.items())


def _compare_on_ray(quick: bool) -> list[dict[str, Any]]:
    cases = ((4, 4, 0.05, 2.0),) if quick else ON_RAY
    steps = {"first": 4, "last": 9, "steps": 18} if quick else {"first": 6, "last": 15, "steps": 25}
    rows = []
    with hosts() as processes:
        for workers, most, slice_seconds, stretch in cases:
            how = {"slice_seconds": slice_seconds, "stretch": stretch}
            setting = Setting(workers=workers, max_staleness=most, **how, **steps)
            real = run_on_ray(setting, processes)
            modelled = simulate(replace(setting, stretch=1.0))
            rows.append(_ray_row(real, modelled))
            print(rows[-1], flush=True)
    return rows


def _ray_row(real: Measured, modelled: Measured) -> dict[str, Any]:
    return {
        "workers": real.setting.workers,
        "S": real.setting.max_staleness,
        "slice_s": real.setting.slice_seconds,
        "step_s": real.step_seconds,
        "simulated_step_s": modelled.step_seconds,
        "gap": real.step_seconds / modelled.step_seconds - 1.0,
        "learner_idle": real.learner_idle,
        "simulated_learner_idle": modelled.learner_idle,
        "mean_age": _mean_age(real),
        "simulated_mean_age": _mean_age(modelled),
        "driver_ms": real.driver_ms,
        "process_ms": real.process_ms,
    }


def _rate(one: Measured) -> float:
    return one.setting.batch / one.step_seconds


if __name__ == "__main__":
    main()

"""Where a step's time goes: engine start, weight publish, and the driver's own share.

    python benchmarks/step_breakdown.py [--steps 60]

The quickstart's models and pools, hardly trained (what the weights hold does not change the time of
a matrix product, only the length of responses: rollouts of an untrained student run to the limit).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from record import write_result

from distill_system.config import load_config
from distill_system.driver import Driver
from distill_system.observe.metrics import read_metrics
from distill_system.records import Author
from distill_system.run.context import RunContext
from distill_system.run.pools import open_pools, wait_until_ready
from distill_system.run.preparation import open_run
from distill_system.run.worker_requests import rollout_request
from distill_system.stages.train import open_context, train

QUICKSTART = Path(__file__).parents[1] / "configs/quickstart.yaml"
WARM_UP_STEPS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--sft-steps", type=int, default=300)
    steps, sft_steps = vars(parser.parse_args()).values()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            [QUICKSTART],
            [
                f"runs_directory={folder}",
                f"distill.steps={steps}",
                f"teacher.sft.steps={sft_steps}",
                f"student.sft.steps={sft_steps}",
                "cluster.dashboard=false",
            ],
        )
        train(config, stages=("sft",))
        run = open_run(config)
        with open_context(config, run, resume=False) as context:
            ready_seconds = _time_engine_start(context)
            pools = open_pools(context, student_path=context.student_path)
            Driver(context, pools, context.data).run()
        rows = _breakdown([row.metrics for row in read_metrics(run) if row.stage == "distill"])
    by_part = {row["part"]: row for row in rows}
    headline = {
        "engine_ready_seconds": ready_seconds,
        "publish_seconds": by_part["publish"]["median_seconds"],
        "driver_share": by_part["driver"]["share"],
    }
    write_result("step_breakdown", rows, headline, seeds={"seed": config.seed})


def _time_engine_start(context: RunContext) -> float:
    """Wall seconds from asking for one rollout worker to its engine being ready."""
    started = time.perf_counter()
    request = rollout_request(context, "student_rollout", Author.STUDENT, context.student_path)
    workers = context.cluster.start_workers(request)
    wait_until_ready(context, workers)
    seconds = time.perf_counter() - started
    context.cluster.stop_workers(workers)
    return seconds


def _breakdown(steps: list[dict[str, float | None]]) -> list[dict[str, object]]:
    """One row per part of a step: total, median and share of the steps' own time."""
    timed = [row for row in steps if "seconds/step" in row][WARM_UP_STEPS:]
    whole = sum(row["seconds/step"] for row in timed)
    parts = [name for name in timed[0] if name.startswith("seconds/")]
    return [
        {
            "part": name.removeprefix("seconds/"),
            "median_seconds": statistics.median(row[name] for row in timed),
            "largest_seconds": max(row[name] for row in timed),
            "share": sum(row[name] for row in timed) / whole,
        }
        for name in parts
    ]


if __name__ == "__main__":
    main()

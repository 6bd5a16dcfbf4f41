"""Ten thousand steps under a simulated clock while workers and learner are lost again and again.

The streams and the pools that replace what is lost are the real ones (tests/simulated_losses.py).
Every step must learn from its own prompts, at most S + 1 batches of each stream may be in flight,
and nothing may grow: the objects that Python holds, and the process's memory, after a tenth of the
steps and at the end.

    python benchmarks/long_simulation.py [--steps 10000] [--seconds 10] [--seed 0]

--seconds: mean time between two losses, on the simulated clock; a step takes up to 0.3.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from record import write_result

from distill_system.config import load_config

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from simulated_losses import LossyRun

QUICKSTART = Path(__file__).parents[1] / "configs/quickstart.yaml"
BOUND, BATCH, PROMPTS = 2, 8, 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = load_config(
        [QUICKSTART],
        [
            f"distill.steps={options.steps}",
            f"distill.staleness.max_staleness={BOUND}",
            f"distill.student_prompts_per_step={BATCH}",
            f"distill.teacher_prompts_per_step={BATCH}",
            "pools.student_rollout.count=4",
            "pools.teacher_rollout.count=3",
            "pools.teacher_scoring.count=2",
            "deadlines.call_seconds=20",
            "deadlines.publish_seconds=10",
            "faults.max_replacements=1000000",
        ],
    )
    began = time.monotonic()
    with TemporaryDirectory() as folder:
        run = LossyRun(config, Path(folder), options.seed, num_prompts=PROMPTS)
        held: list[tuple[int, int]] = []

        def look(step: int) -> None:
            if step in (options.steps // 10, options.steps):
                gc.collect()
                held.append((len(gc.get_objects()), psutil.Process().memory_info().rss))

        run.play(options.steps, mean_seconds=options.seconds, after_step=look)
    (first_objects, first_bytes), (last_objects, last_bytes) = held[0], held[-1]
    assert run.most_in_flight <= (BOUND + 1) * BATCH
    write_result(
        "long_simulation",
        [{"lost": kind, "times": count} for kind, count in sorted(run.losses.items())],
        {
            "steps": options.steps,
            "losses": run.losses.total(),
            "simulated_hours": run.clock.now / 3600.0,
            "lost_prompts": 0,
            "doubled_prompts": 0,
            "most_batches_in_flight": run.most_in_flight / BATCH,
            "objects_after_a_tenth": first_objects,
            "objects_at_the_end": last_objects,
            "mebibytes_after_a_tenth": first_bytes / 2**20,
            "mebibytes_at_the_end": last_bytes / 2**20,
            "seconds": time.monotonic() - began,
        },
        seeds={"seed": options.seed},
    )


if __name__ == "__main__":
    main()

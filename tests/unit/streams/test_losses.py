"""The streams under a simulated clock while workers, and the learner, are lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from simulated_losses import LossyRun

from distill_system.config import load_config

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
BOUND, BATCH = 2, 4


@pytest.mark.parametrize("seed", [0, 4, 5, 7])
def test_every_step_has_its_own_prompts_however_many_workers_are_lost(tmp_path, seed):
    config = load_config(
        [QUICKSTART],
        [
            "distill.steps=300",
            f"distill.staleness.max_staleness={BOUND}",
            f"distill.student_prompts_per_step={BATCH}",
            f"distill.teacher_prompts_per_step={BATCH}",
            "pools.student_rollout.count=3",
            "pools.teacher_rollout.count=2",
            "pools.teacher_scoring.count=2",
            "deadlines.call_seconds=20",
            "deadlines.publish_seconds=10",
            "faults.max_replacements=100000",
        ],
    )
    run = LossyRun(config, tmp_path, seed, num_prompts=37)
    run.play(300, mean_seconds=4.0)
    assert run.losses.total() > 20
    assert len(run.losses) > 4, "every kind of loss"
    assert run.most_in_flight <= (BOUND + 1) * BATCH

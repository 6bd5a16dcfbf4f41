"""Sizes that may change, workers side by side, a pool for evaluations, engines that sleep."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill_system.config import RunConfig, load_config
from distill_system.errors import ConfigError

QUICKSTART = Path(__file__).parents[3] / "configs/quickstart.yaml"
ON_GPU = ("pools.student_rollout.gpus=1", "pools.learner.gpus=1")


def _load(*overrides: str) -> RunConfig:
    return load_config([QUICKSTART], overrides)


def test_a_pool_keeps_its_size_unless_it_is_given_room() -> None:
    pool = _load("pools.student_rollout.count=3").pools.student_rollout
    assert (pool.fewest, pool.most, pool.is_elastic) == (3, 3, False)
    pool = _load("pools.student_rollout.max_count=4").pools.student_rollout
    assert (pool.fewest, pool.most, pool.is_elastic) == (1, 4, True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("pools.student_rollout.min_count=2",), "expected min_count <= count <= max_count, got 2"),
        (("pools.teacher_scoring.gpus=1.5",), "whole GPUs or a share of one.* got 1.5"),
        (("pools.learner.max_count=4",), "learner keeps its size while a run goes on"),
        (("pools.evaluation.max_count=4",), "evaluation keeps its size"),
        (
            ("pools.learner.colocate_with=teacher_rollout",),
            "teacher_scoring with teacher_rollout and evaluation with student_rollout",
        ),
        (
            (
                "pools.teacher_scoring.colocate_with=teacher_rollout",
                "pools.teacher_scoring.count=2",
            ),
            r"expected equal counts.*\(2, 2, 2\) and \(1, 1, 1\)",
        ),
        (
            (
                "pools.teacher_scoring.colocate_with=teacher_rollout",
                "pools.teacher_rollout.max_count=2",
            ),
            r"without room to change.*\(1, 1, 1\) and \(1, 1, 2\)",
        ),
        (
            (
                "pools.teacher_scoring.colocate_with=teacher_rollout",
                "pools.teacher_scoring.gpus=0.5",
                "pools.teacher_rollout.gpus=0.6",
            ),
            "shares of at most 1 together, got gpus of 0.5 and 0.6",
        ),
        (
            ("pools.teacher_scoring.gpus=4",),
            "one GPU: expected .* at most 1, got 4.0.*gpus=1 and scoring.shard_ranks=4",
        ),
        (
            ("pools.teacher_scoring.gpus=0.5", "scoring.shard_ranks=2"),
            "expected pools.teacher_scoring.gpus of 0 or 1 for scoring.shard_ranks=2, got 0.5",
        ),
        (
            ("pools.teacher_scoring.colocate_with=teacher_rollout", "scoring.shard_ranks=2"),
            "takes as many places, a rollout worker one: expected .*=null, got teacher_rollout",
        ),
        (("pools.evaluation.gpus=1",), "learner and evaluation must both have GPUs"),
        (("pools.student_rollout.gpus=1",), "learner and student_rollout must both have GPUs"),
        (("scaling.automatic=true",), "they take turns: expected max_staleness >= 1"),
        (
            ("scaling.automatic=true", "distill.staleness.max_staleness=1"),
            "nothing to change: expected min_count below max_count",
        ),
        (("rollout.teacher_engine.sleep_when_idle=true",), "vLLM has no sleep on a CPU"),
        (
            ("rollout.student_engine.sleep_when_idle=true", *ON_GPU),
            "only the teacher's may sleep",
        ),
    ],
)
def test_what_cannot_be_is_told(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _load(*overrides)


def test_what_can_be_is_taken() -> None:
    config = _load(
        *ON_GPU,
        "pools.student_rollout.gpus=0.5",
        "pools.evaluation.gpus=0.5",
        "pools.evaluation.colocate_with=student_rollout",
        "pools.teacher_rollout.gpus=0.5",
        "pools.teacher_scoring.gpus=0.5",
        "pools.teacher_scoring.colocate_with=teacher_rollout",
        "rollout.teacher_engine.sleep_when_idle=true",
    )
    assert set(config.pools.by_name) == {
        "student_rollout",
        "teacher_rollout",
        "teacher_scoring",
        "learner",
        "evaluation",
    }
    assert "evaluation" not in _load().pools.by_name
    automatic = _load(
        "scaling.automatic=true",
        "distill.staleness.max_staleness=1",
        "pools.teacher_scoring.max_count=3",
    )
    assert automatic.scaling.automatic


@pytest.mark.parametrize(
    ("overrides", "backend"),
    [
        ((), "gloo"),
        (ON_GPU, "nccl"),
        ((*ON_GPU, "pools.evaluation.gpus=1"), "nccl"),
        ((*ON_GPU, "pools.evaluation.gpus=0.5"), "gloo"),
        (("pools.student_rollout.gpus=0.5", "pools.learner.gpus=0.5"), "gloo"),
        ((*ON_GPU, "rollout.engine=transformers"), "gloo"),
        (("pools.learner.gpus=1", "rollout.engine=transformers"), "gloo"),
    ],
)
def test_weights_go_from_gpu_to_gpu_where_each_worker_has_its_own(
    overrides: tuple[str, ...], backend: str
) -> None:
    assert _load(*overrides).transfer_backend == backend


def test_a_whole_run_fits_one_gpu() -> None:
    pools = ("student_rollout", "teacher_rollout", "teacher_scoring", "learner")
    shares = [f"pools.{name}.gpus=0.25" for name in pools]
    config = _load("rollout.engine=transformers", *shares)
    assert sum(pool.gpus for pool in config.pools.by_name.values()) == 1.0
    assert config.transfer_backend == "gloo"

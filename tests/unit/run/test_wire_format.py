"""Whose weights are rounded how: from the configuration to the learner's ranks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill_system.config import RunConfig, load_config
from distill_system.config.objective import AmmdConfig
from distill_system.learner import ModelSource
from distill_system.observe import RunDirectory
from distill_system.run.worker_requests import learner_request, wire_format
from distill_system.weights import WireFormat

CONFIGURATION = Path(__file__).parents[3] / "configs" / "quickstart.yaml"


def _load(*settings: str) -> RunConfig:
    return load_config([CONFIGURATION], settings)


@pytest.mark.parametrize(
    ("settings", "dtype", "rounding"),
    [
        ((), torch.float32, "none"),
        (("rollout.weight_rounding=nearest",), torch.float32, "none"),
        (("rollout.student_engine.dtype=bfloat16",), torch.bfloat16, "stochastic"),
        (
            ("rollout.student_engine.dtype=bfloat16", "learner.compute_dtype=bfloat16"),
            torch.bfloat16,
            "stochastic",
        ),
        (
            ("rollout.student_engine.dtype=bfloat16", "rollout.weight_rounding=nearest"),
            torch.bfloat16,
            "nearest",
        ),
        (("rollout.student_engine.dtype=float16",), torch.float16, "nearest"),
        (("rollout.teacher_engine.dtype=bfloat16",), torch.float32, "none"),
    ],
)
def test_weights_travel_in_the_student_engines_dtype(
    settings: tuple[str, ...], dtype: torch.dtype, rounding: str
) -> None:
    config = _load(*settings)
    wire = wire_format(config)
    assert config.rounding == rounding
    assert wire.dtype is dtype
    assert wire.is_stochastic is (rounding == "stochastic")


def test_the_draw_follows_the_runs_seed() -> None:
    first, again, other = (
        wire_format(_load("rollout.student_engine.dtype=bfloat16", f"seed={seed}"))
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first.seed != other.seed


@pytest.mark.parametrize("objective", [AmmdConfig(), None])
def test_every_rank_of_a_distillation_and_none_of_a_fine_tuning_gets_it(
    objective: AmmdConfig | None,
) -> None:
    config = _load("rollout.student_engine.dtype=bfloat16", "pools.learner.count=2")
    context: Any = SimpleNamespace(config=config, run=RunDirectory("runs/run"))
    request = learner_request(
        context,
        name="learner",
        source=ModelSource(path="anywhere"),
        objective=objective,
        compute_dtype="bfloat16",
        optimizer=config.distill.optimizer,
        total_steps=1,
    )
    wires = [arguments["wire"] for arguments in request.arguments]
    expected = WireFormat() if objective is None else wire_format(config)
    assert wires == [expected, expected]

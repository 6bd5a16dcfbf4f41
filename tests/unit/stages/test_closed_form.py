"""The weight of the labels in closed form, against a grid and the published example of kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distill_system.config import load_config, load_stages
from distill_system.config.objective import TokenMatchingConfig
from distill_system.config.objective.token_losses import InterpolatedCrossEntropyConfig
from distill_system.errors import ConfigError
from distill_system.stages.closed_form import best_label_weight, with_label_weight

ROOT = Path(__file__).parents[3]
LAYERS = [ROOT / "configs/quickstart.yaml", ROOT / "configs/methods/self_distillation_rounds.yaml"]
GRID = np.linspace(0.0, 1.0, 2001)


def _losses(targets_N, labels_fit_N, teacher_fit_N):
    mixed_GN = GRID[:, None] * labels_fit_N + (1.0 - GRID[:, None]) * teacher_fit_N
    return ((mixed_GN - targets_N) ** 2).mean(axis=1)


@pytest.mark.parametrize("seed", range(8))
def test_no_weight_of_a_fine_grid_is_better(seed):
    drawn = np.random.default_rng(seed)
    targets_N, (labels_fit_N, teacher_fit_N) = drawn.normal(size=9), drawn.normal(size=(2, 9))
    weight = best_label_weight(targets_N, labels_fit_N, teacher_fit_N)
    best = GRID[np.argmin(_losses(targets_N, labels_fit_N, teacher_fit_N))]
    assert weight == pytest.approx(best, abs=1 / 2000)
    assert best_label_weight(targets_N, labels_fit_N, labels_fit_N) == 1.0


def test_the_published_example_of_kernels_is_met_and_its_weight_is_the_best():
    """Eleven noisy points of a sine, RBF kernel of gamma 80, lambda 0.2: data of Mobahi et al.
    (2020), losses of the example of arXiv 2102.13088."""
    x_N, truth_at = np.arange(0, 1.1, 0.1), np.arange(0, 1.01, 0.01)
    noisy = "0.384766 1.233397 1.332322 0.692016 -0.297561 -0.241893 -0.796449 -0.961648 -0.496725"
    y_N = np.array([float(each) for each in f"{noisy} -0.346907 0.558951".split()])
    truth = np.sin(2 * np.pi * truth_at)

    def kernel(one, other):
        return np.exp(-80 * (one[:, None] - other[None, :]) ** 2)

    inverse = np.linalg.inv(kernel(x_N, x_N) + 0.2 * np.eye(11))
    on_rows, on_truth = kernel(x_N, x_N) @ inverse, kernel(truth_at, x_N) @ inverse

    def loss(targets):
        return float(np.mean((on_truth @ targets - truth) ** 2))

    def losses(weight, steps):
        fit, found = y_N, []
        for _ in range(steps):
            targets = weight * y_N + (1 - weight) * fit
            found.append(loss(targets))
            fit = on_rows @ targets
        return found

    alone, mixed = losses(0.0, 2000), losses(0.35, 2000)
    assert alone[:3] == pytest.approx([0.16477, 0.15076, 0.14915], abs=1e-5)
    assert mixed[:3] == pytest.approx([0.16477, 0.15424, 0.15089], abs=1e-5)
    assert (alone[-1], mixed[-1]) == pytest.approx((0.49505, 0.14959), abs=1e-5)

    fit = on_rows @ y_N
    weight = best_label_weight(truth, on_truth @ y_N, on_truth @ fit)
    best = min(losses(each, 2)[1] for each in GRID)
    assert losses(weight, 2)[1] == pytest.approx(best, abs=1e-9)
    assert best <= 0.15076


def test_a_stage_takes_the_weight_from_the_students_that_it_names():
    stages = {stage.name: stage for stage in load_stages(load_config(LAYERS))}
    fits = stages["round_2"].label_weight
    assert fits is not None
    assert [Path(path).parts[-2:] for path in fits] == [
        ("1_labels", "student"),
        ("4_soft_2", "student"),
    ]
    objective = with_label_weight(stages["round_2"].config, 0.3).distill.objective
    assert isinstance(objective, TokenMatchingConfig)
    loss = objective.off_policy
    assert isinstance(loss, InterpolatedCrossEntropyConfig)
    assert (loss.teacher_weight, loss.schedule) == (0.7, "constant")


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (
            "label_weight: {labels: a}",
            r"expected \{labels: STAGE, teacher: STAGE\}.*initial, a, pr",
        ),
        ("label_weight: {labels: a, teacher: z}", r"'b': label_weight .*got \{'labels'"),
        (
            "label_weight: {labels: a, teacher: a}, distill: {objective: {off_policy: "
            "{schedule: linear}}}",
            r"'b': label_weight is a constant weight",
        ),
        (
            "label_weight: {labels: a, teacher: a}, distill: {objective: {type: ammd}}",
            r"'b': label_weight is a constant weight",
        ),
    ],
)
def test_a_weight_that_nothing_reads_is_refused(stage, said):
    with pytest.raises(ConfigError, match=said):
        load_config(LAYERS, [f"curriculum=[{{name: a}}, {{name: b, {stage}}}]"])

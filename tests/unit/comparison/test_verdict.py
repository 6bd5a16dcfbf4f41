from pathlib import Path

import pytest
from comparison_runs import make_plan, write_run, write_trial

from distill_system.comparison.results import Column, read_comparison
from distill_system.comparison.verdict import (
    ColumnVerdict,
    Verdict,
    better_direction,
    reach_verdict,
)
from distill_system.evaluation.scores import Direction


def scores(*values: float, **splits: float) -> dict[str, dict[str, list[float]]]:
    found = {"easy": list(values), **{name: [value] * 3 for name, value in splits.items()}}
    return {
        split: {"exact_match_greedy": row, "mean_length_greedy": row}
        for split, row in found.items()
        if row
    }


def find(verdict: Verdict, split: str, metric: str = "exact_match_greedy") -> ColumnVerdict:
    return next(c for c in verdict.columns if c.column == Column(split, metric))


@pytest.fixture
def verdict(tmp_path: Path) -> Verdict:
    plan = make_plan(["sft", "gkd", "lucky", "ammd", "ammd_ratio"], [0, 1])
    found = {
        "sft": {0: scores(10.0, 20.0, hard=0.0), 1: scores(12.0, 22.0, hard=0.0)},
        "gkd": {0: scores(30.0, 50.0, hard=10.0), 1: scores(31.0, 53.0, hard=10.0)},
        "lucky": {0: scores(90.0, 99.0, hard=80.0)},
        "ammd": {0: scores(20.0, 30.0, hard=30.0), 1: scores(22.0, 36.0, hard=34.0)},
        "ammd_ratio": {},
    }
    write_trial(tmp_path, plan, found)
    return reach_verdict(read_comparison(tmp_path))


def test_means_and_standard_errors_are_over_seeds(verdict: Verdict) -> None:
    cell = find(verdict, "easy").cells["ammd"]
    # seeds 25 and 29: deviation sqrt(8), over sqrt(2)
    assert cell.per_seed == {0: 25.0, 1: 29.0}
    assert (cell.summary.mean, cell.summary.num_seeds) == (27.0, 2)
    assert cell.summary.stderr == pytest.approx(2.0)


def test_the_average_comes_first_and_weighs_splits_alike(verdict: Verdict) -> None:
    columns = verdict.of_metric("exact_match_greedy")
    assert [column.column.split for column in columns] == ["average", "easy", "hard"]
    # (25 + 30) / 2 and (29 + 34) / 2, though the splits have two and three examples
    assert columns[0].cells["ammd"].per_seed == {0: 27.5, 1: 31.5}
    assert columns[0].references["before"] == pytest.approx(
        (7.5 + 8.5 + 25 + 26 + (94.5 + 80) / 2 + 27.5 + 31.5) / 7
    )


def test_one_lucky_seed_is_not_the_best_baseline(verdict: Verdict) -> None:
    column = find(verdict, "easy")
    assert column.best_baseline == "gkd"
    assert [name for name, cell in column.cells.items() if cell.is_best] == ["lucky"]


def test_ours_is_never_the_best_baseline(verdict: Verdict) -> None:
    column = find(verdict, "hard")
    assert column.cells["ammd"].summary.mean > column.cells["gkd"].summary.mean
    assert column.best_baseline == "gkd"


def test_each_is_compared_with_sft_and_with_the_best_baseline(verdict: Verdict) -> None:
    cells = find(verdict, "easy").cells
    against_sft, against_best = cells["ammd"].against_sft, cells["ammd"].against_best_baseline
    assert against_sft is not None
    assert against_best is not None
    assert (against_sft.difference, against_best.difference) == (11.0, -14.0)
    assert cells["sft"].against_sft is None
    assert cells["gkd"].against_best_baseline is None
    assert cells["lucky"].against_sft is not None
    assert cells["lucky"].against_sft.num_seeds == 1


def test_an_objective_without_a_finished_run_has_no_cell(verdict: Verdict) -> None:
    assert "ammd_ratio" not in find(verdict, "easy").cells
    assert verdict.costs["ammd_ratio"] == {}


def test_lengths_have_no_winner(verdict: Verdict) -> None:
    column = find(verdict, "easy", "mean_length_greedy")
    assert column.best_baseline is None
    assert not any(cell.is_best or cell.against_sft for cell in column.cells.values())


def test_a_comparison_of_accuracy_alone_has_a_best_score_and_significance(tmp_path: Path) -> None:
    """configs/paper/strategyqa.yaml measures nothing else."""
    found = {
        "sft": {
            seed: {"strategyqa": {"accuracy_greedy": [0.0] * 40 + [100.0] * 10}} for seed in (0, 1)
        },
        "ammd": {
            seed: {"strategyqa": {"accuracy_greedy": [0.0] * 10 + [100.0] * 40}} for seed in (0, 1)
        },
    }
    write_trial(tmp_path, make_plan(["sft", "ammd"], [0, 1]), found)
    column = find(reach_verdict(read_comparison(tmp_path)), "strategyqa", "accuracy_greedy")
    assert (column.best_baseline, column.cells["ammd"].is_best) == ("sft", True)
    assert not column.cells["sft"].is_best
    against = column.cells["ammd"].against_sft
    assert against is not None
    assert against.difference == pytest.approx(60.0)
    assert against.is_significant


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        ("rouge_l_stemmed_sampled", Direction.HIGHER),
        ("ended_share_greedy", Direction.NEITHER),
        ("off_policy_distance", Direction.LOWER),
        ("a_score_of_another_version_greedy", Direction.NEITHER),
    ],
)
def test_a_column_is_better_the_way_its_metric_says(metric: str, direction: Direction) -> None:
    assert better_direction(metric) is direction


def test_the_smallest_distance_is_the_best(tmp_path: Path) -> None:
    plan = make_plan(["sft", "ammd"], [0])
    write_trial(tmp_path, plan, {"sft": {0: scores(1.0, 2.0)}})
    write_run(tmp_path, "ammd", 0, scores(1.0, 2.0), distance=0.002)
    column = find(reach_verdict(read_comparison(tmp_path)), "held_out", "on_policy_distance")
    assert column.cells["ammd"].is_best
    assert not column.cells["sft"].is_best


def test_under_a_score_where_less_is_better_the_best_baseline_is_the_smallest(
    tmp_path: Path,
) -> None:
    plan = make_plan(["sft", "gkd", "minillm", "ammd"], [0])
    write_trial(tmp_path, plan, {})
    distances = {"sft": 0.03, "gkd": 0.01, "minillm": 0.02, "ammd": 0.015}
    for objective, distance in distances.items():
        write_run(tmp_path, objective, 0, scores(1.0, 2.0), distance=distance)
    verdict = reach_verdict(read_comparison(tmp_path))
    for metric, scale in (("on_policy_distance", 1.0), ("off_policy_distance", 0.5)):
        column = find(verdict, "held_out", metric)
        assert (column.direction, column.best_baseline) == (-1, "gkd")
        assert [name for name, cell in column.cells.items() if cell.is_best] == ["gkd"]
        against = column.cells["ammd"].against_best_baseline
        assert against is not None
        assert against.difference == pytest.approx(0.005 * scale)


def test_without_sft_there_is_nothing_to_compare_with_it(tmp_path: Path) -> None:
    write_trial(tmp_path, make_plan(["ammd"], [0]), {"ammd": {0: scores(1.0, 2.0)}})
    column = find(reach_verdict(read_comparison(tmp_path)), "easy")
    assert column.best_baseline is None
    assert column.cells["ammd"].against_sft is None


def test_a_curve_is_the_mean_over_the_seeds_that_have_the_step(tmp_path: Path) -> None:
    plan = make_plan(["sft"], [0, 1])
    write_trial(tmp_path, plan, {"sft": {0: scores(1.0, 2.0)}})
    write_run(tmp_path, "sft", 1, scores(1.0, 2.0), distance=0.03, step=40)
    curve = reach_verdict(read_comparison(tmp_path)).curves["held_out/on_policy_distance"]["sft"]
    assert [(point.step, point.summary.num_seeds) for point in curve] == [
        (0, 2),
        (10, 1),
        (20, 2),
        (40, 1),
    ]
    assert curve[0].summary.mean == pytest.approx((0.03 + 0.09) / 2)
    # 0.01 and 0.06 at step 20: half their distance
    assert curve[2].summary.stderr == pytest.approx(0.025)

"""The law of the capacity gap, on scores whose best ratio is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from comparison_runs import make_plan, write_run

from distill_system.comparison import write_comparison, write_plan
from distill_system.comparison.capacity import fit_law

RATIOS = np.array([0.8, 1.5, 2.5, 5.0, 9.0])


def _scores(best: float, noise: float = 0.0, seeds: int = 1, sign: float = 1.0):
    rng = np.random.default_rng(1)
    clean = 30.0 - 4.0 * (np.log(RATIOS) - np.log(best)) ** 2
    return [sign * (each + noise * rng.standard_normal(seeds)) for each in clean.tolist()]


def _fit(scores, direction: int = 1):
    logs = np.repeat(np.log(RATIOS), len(scores[0]))
    return fit_law(logs, np.concatenate(scores), direction=direction)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_best_ratio_of_a_parabola_is_found(sign: int) -> None:
    law = _fit(_scores(2.5, sign=sign), direction=sign)
    assert law.best_ratio == pytest.approx(2.5)
    assert law.interval == pytest.approx((2.5, 2.5))
    assert law.r_squared == pytest.approx(1.0)
    assert law.is_inside
    # by hand: s = 30 - 4 (x - log 2.5)^2
    x = np.log(2.5)
    assert law.coefficients == pytest.approx((sign * (30 - 4 * x * x), sign * 8 * x, sign * -4.0))


def test_scores_that_only_rise_have_their_best_outside_of_what_was_tried() -> None:
    law = _fit(_scores(40.0))
    assert law.best_ratio == pytest.approx(40.0)
    assert not law.is_inside


def test_a_valley_has_no_best_size() -> None:
    law = _fit(_scores(2.5, sign=-1.0), direction=1)
    assert law.best_ratio is None
    assert law.interval is None
    assert law.holds_published is None


def test_three_runs_leave_no_error_to_tell() -> None:
    scores = np.array([1.0, 2.0, 1.5])
    law = fit_law(np.log(RATIOS[1:4]), scores, direction=1)
    assert law.best_ratio is not None
    assert law.interval is None


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_interval_grows_with_the_noise_and_covers_the_truth(seeds: int) -> None:
    widths = []
    for noise in (0.1, 1.0):
        law = _fit(_scores(3.0, noise, seeds))
        assert law.interval is not None
        low, high = law.interval
        assert low < 3.0 < high
        widths.append(high - low)
    assert widths[0] < widths[1] / 3


def test_a_comparison_of_teachers_tells_the_law_and_one_of_objectives_does_not(
    tmp_path: Path,
) -> None:
    names = [f"t{index}" for index in range(len(RATIOS))]
    for kind in ("teachers", "objectives"):
        folder = tmp_path / kind
        plan = make_plan(names, [0, 1], config={"evaluation": {"metrics": ["exact_match"]}})
        if kind == "teachers":
            plan.size_ratios.update(zip(names, RATIOS.tolist(), strict=True))
        write_plan(folder, plan)
        for name, [score] in zip(names, _scores(2.5), strict=True):
            for seed in (0, 1):
                row = {"exact_match_greedy": [score + 0.2 * seed] * 2}
                write_run(folder, name, seed, {"test": row})
        files = write_comparison(folder)
        form = json.loads(files.json_path.read_text())
        told = "parameters over the student" in files.markdown_path.read_text()
        assert told == ("exact_match_greedy" in form["capacity"]) == (kind == "teachers")
    law = json.loads((tmp_path / "teachers/compare.json").read_text())["capacity"]
    assert law["exact_match_greedy"]["best_ratio"] == pytest.approx(2.5)
    assert law["exact_match_greedy"]["holds_published"] is True
    assert "2 seeds" in (tmp_path / "teachers/compare.md").read_text()
    assert "5 teachers" in (tmp_path / "teachers/compare.md").read_text()

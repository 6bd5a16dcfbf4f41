from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from token_rows import make_token_rows

from distill_system.objectives import returns
from distill_system.objectives.returns import compute_baseline, cost_to_go, future_cost_to_go
from distill_system.objectives.rows import pad_rows

LENGTHS = (3, 1, 4)


def _rows():
    count = sum(LENGTHS)
    return make_token_rows(torch.zeros(count, 2), torch.zeros(count, dtype=torch.long), LENGTHS)


COSTS = torch.tensor([1.0, 2.0, 4.0, 8.0, 1.0, 0.0, -1.0, 2.0])


@pytest.mark.parametrize("form", ["in_turn", "doubling"])
@pytest.mark.parametrize("discount", [1.0, 0.5])
def test_cost_to_go_equals_the_sum_written_out(discount, form, monkeypatch):
    monkeypatch.setattr(returns, "_add_later_in_turn", getattr(returns, f"_add_later_{form}"))
    expected, start = [], 0
    for length in LENGTHS:
        costs = COSTS[start : start + length].tolist()
        expected += [
            sum(discount ** (k - t) * costs[k] for k in range(t, length)) for t in range(length)
        ]
        start += length
    assert cost_to_go(COSTS, _rows(), discount=discount).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("longest", [1, 2, 3, 64, 65])
def test_doubling_takes_in_every_later_column_once(longest):
    grid_ST = torch.randn(3, longest, dtype=torch.float64)
    weights_TT = torch.tensor(0.9, dtype=torch.float64) ** (
        torch.arange(longest) - torch.arange(longest)[:, None]
    )
    expected_ST = grid_ST @ weights_TT.triu().T
    torch.testing.assert_close(returns._add_later_doubling(grid_ST, 0.9), expected_ST)


def test_future_cost_leaves_out_the_token_itself_and_divides_by_what_is_left():
    plain = future_cost_to_go(COSTS, _rows(), discount=1.0, normalise=False)
    mean = future_cost_to_go(COSTS, _rows(), discount=1.0, normalise=True)
    assert plain.tolist() == [6.0, 4.0, 0.0, 0.0, 1.0, 1.0, 2.0, 0.0]
    assert mean.tolist() == pytest.approx([3.0, 4.0, 0.0, 0.0, 1 / 3, 0.5, 2.0, 0.0])


def test_leave_one_out_is_the_mean_of_the_others_of_one_other_too_and_zero_without_any():
    baseline = compute_baseline("leave_one_out", COSTS, _rows(), lambda tensor: tensor, longest=6)
    # at each position: 1, 8 and 1; then 2 and 0; then 4 and -1; then 2 alone
    assert baseline.tolist() == pytest.approx([4.5, 0.0, -1.0, 1.0, 4.5, 2.0, 4.0, 0.0])


def test_rows_are_laid_out_a_response_a_line_with_zeros_behind():
    grid = pad_rows(COSTS, _rows())
    assert grid.tolist() == [[1.0, 2.0, 4.0, 0.0], [8.0, 0.0, 0.0, 0.0], [1.0, 0.0, -1.0, 2.0]]
    none = {
        name: getattr(_rows(), name)[:0]
        for name in ("hidden_NH", "token_ids_N", "sequence_ids_N", "positions_N")
    }
    assert pad_rows(COSTS[:0], replace(_rows(), **none)).shape == (0, 0)


def test_baselines_are_zero_the_batch_mean_and_the_mean_at_each_position():
    rows = _rows()

    def baseline(kind):
        return compute_baseline(kind, COSTS, rows, lambda tensor: tensor, longest=6).tolist()

    first, second, third = (1.0 + 8.0 + 1.0) / 3, (2.0 + 0.0) / 2, (4.0 - 1.0) / 2
    assert baseline("none") == [0.0] * 8
    assert baseline("batch") == pytest.approx([float(COSTS.mean())] * 8)
    assert baseline("position") == pytest.approx(
        [first, second, third, first, first, second, third, 2.0]
    )

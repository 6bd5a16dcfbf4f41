"""Stochastic rounding by a GPU's generator; run with `pytest tests/gpu` on a machine with one."""

import pytest
import torch

from distill_system.weights.rounding import round_stochastically

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_it_is_right_on_average_and_the_same_again() -> None:
    numbers = torch.full((1 << 20,), 0.1, device="cuda")
    rounded = round_stochastically(numbers, seed=3)
    assert torch.equal(rounded, round_stochastically(numbers, seed=3))
    spacing = float(rounded.double().max() - rounded.double().min())
    assert spacing == pytest.approx(2.0**-11)
    error = abs(float(rounded.double().mean() - numbers.double().mean()))
    assert error < 4 * 0.5 * spacing / 1024


@pytest.mark.parametrize("cut", [1, 1000, (1 << 22) - 1, (1 << 22) + 5])
def test_rows_that_come_alone_are_rounded_as_within_the_whole(cut: int) -> None:
    """Across the border of two draws, too; a shard's last draw is shorter than the whole's."""
    whole = torch.randn((1 << 22) + 1000, device="cuda")
    parts = [
        round_stochastically(whole[:cut], seed=5),
        round_stochastically(whole[cut:], seed=5, offset=cut),
    ]
    assert torch.equal(torch.cat(parts), round_stochastically(whole, seed=5))

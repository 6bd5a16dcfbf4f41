import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_system.weights.rounding import WireFormat, round_stochastically

BFLOAT16 = WireFormat(dtype=torch.bfloat16, seed=7)


def _neighbours(value: float) -> tuple[float, float]:
    """The largest bfloat16 number at most this large, and the smallest at least so; by search."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = every[every.isfinite()].double()
    return float(finite[finite <= value].max()), float(finite[finite >= value].min())


@settings(max_examples=30)
@given(st.floats(-(2.0**100), 2.0**100, width=32), st.integers(0, 2**31 - 1))
def test_a_number_goes_to_one_of_its_two_neighbours(value: float, seed: int) -> None:
    below, above = _neighbours(value)
    rounded = round_stochastically(torch.full((64,), value), seed=seed)
    assert set(rounded.double().tolist()) <= {below, above}


@pytest.mark.parametrize("value", [0.1, -0.1, 1.0 + 2**-12, -3.14159, 0.99999, 1e-40])
def test_the_mean_is_the_number_itself(value: float) -> None:
    """Across the border of a power of two and among the smallest numbers, too."""
    numbers = torch.full((200_000,), value)
    exact = float(numbers[0].double())
    below, above = _neighbours(exact)
    rounded = round_stochastically(numbers, seed=3).double()
    share = (exact - below) / (above - below)
    standard_error = (above - below) * math.sqrt(share * (1 - share) / len(numbers))
    assert abs(float(rounded.mean()) - exact) < 4 * standard_error


def test_a_number_is_right_on_average_over_versions() -> None:
    weights = torch.randn(500, generator=torch.Generator().manual_seed(0))
    versions = torch.stack(
        [dict(BFLOAT16.convert([("w", weights)], version=v))["w"].double() for v in range(2_000)]
    )
    spacing = weights.abs().double() * 2**-7
    errors = (versions.mean(dim=0) - weights.double()) / spacing
    assert float(errors.abs().max()) < 4.5 * 0.5 / math.sqrt(2_000)


def test_an_update_too_small_for_any_weight_moves_all_of_them_on_average() -> None:
    """What rounding to the nearest loses: weights that bfloat16 has, one step of Adam later."""
    weights = (torch.rand(100_000, generator=torch.Generator().manual_seed(1)) + 0.5).bfloat16()
    updated = weights.float() + 1e-5
    nearest = WireFormat(dtype=torch.bfloat16).convert([("w", updated)], version=1)
    assert torch.equal(next(iter(nearest))[1], weights)
    [(_, rounded)] = BFLOAT16.convert([("w", updated)], version=1)
    moved = (rounded.double() - weights.double()).mean()
    assert float(moved) == pytest.approx(1e-5, rel=0.15)


def test_what_bfloat16_has_stays_and_what_is_no_number_stays_none() -> None:
    own = torch.tensor([0.0, -0.0, 1.5, -(2.0**-130), 3.0e38]).bfloat16()
    assert torch.equal(
        round_stochastically(own.float(), seed=1).view(torch.int16), own.view(torch.int16)
    )
    quiet = torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)
    odd = torch.cat([quiet, torch.tensor([math.inf, -math.inf, 1.0])])
    for seed in range(20):
        rounded = round_stochastically(odd, seed=seed)
        assert rounded[:2].isnan().all()
        assert rounded[2:].tolist() == [math.inf, -math.inf, 1.0]


@settings(max_examples=25)
@given(st.lists(st.integers(1, 199_999), unique=True, max_size=4), st.integers(0, 2**31 - 1))
def test_rows_that_come_alone_are_rounded_as_within_the_whole(cuts: list[int], seed: int) -> None:
    """Ranks that hold a part of a tensor agree with the one that sends all of it."""
    whole = torch.randn(200_000, generator=torch.Generator().manual_seed(seed % 3))
    borders = [0, *sorted(cuts), whole.numel()]
    parts = [
        round_stochastically(whole[start:end], seed=seed, offset=start)
        for start, end in pairwise(borders)
    ]
    assert torch.equal(torch.cat(parts), round_stochastically(whole, seed=seed))


def test_only_seed_version_and_name_decide() -> None:
    weights = torch.randn(64, 3, generator=torch.Generator().manual_seed(2))

    def convert(wire: WireFormat = BFLOAT16, *, version: int = 4, name: str = "w") -> torch.Tensor:
        others = [("before", torch.ones(5)), (name, weights)]
        return dict(wire.convert(others, version=version))[name]

    first = convert()
    assert first.shape == weights.shape
    assert torch.equal(first, convert())
    changed: list[Callable[[], torch.Tensor]] = [
        lambda: convert(version=5),
        lambda: convert(name="v"),
        lambda: convert(WireFormat(dtype=torch.bfloat16, seed=8)),
    ]
    assert not any(torch.equal(first, change()) for change in changed)


def test_a_transposed_tensor_is_rounded_in_the_order_of_its_own_elements() -> None:
    weights = torch.randn(40, 30, generator=torch.Generator().manual_seed(2))
    expected = round_stochastically(weights.T.contiguous(), seed=1)
    assert torch.equal(round_stochastically(weights.T, seed=1), expected)


def test_numbers_of_other_kinds_travel_as_they_are() -> None:
    counts, half = torch.arange(5), torch.ones(3, dtype=torch.float16)
    sent = dict(BFLOAT16.convert([("counts", counts), ("half", half)], version=1))
    assert sent["counts"] is counts
    assert sent["half"] is half
    assert BFLOAT16.sent_dtype(torch.int64) is torch.int64
    assert BFLOAT16.sent_dtype(torch.float32) is torch.bfloat16


def test_float32_weights_are_neither_copied_nor_rounded() -> None:
    weights = torch.randn(4)
    [(_, sent)] = WireFormat(seed=1).convert([("w", weights)], version=1)
    assert sent is weights


def test_a_float16_engines_weights_are_rounded_to_the_nearest() -> None:
    weights = torch.randn(1_000, generator=torch.Generator().manual_seed(0))
    [(_, sent)] = WireFormat(dtype=torch.float16, seed=1).convert([("w", weights)], version=1)
    assert torch.equal(sent, weights.half())

"""Every way in which bytes go wrong on a wire must change the digest."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_system.weights.digest import Digest

ROW = 8192


def _sum(*buffers: torch.Tensor) -> int:
    digest = Digest()
    for buffer in buffers:
        digest.add(buffer)
    return digest.value


def _bytes(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)


def _weights(count: int) -> torch.Tensor:
    """Bytes of float32 numbers of few kinds, where a weak sum is fooled soonest."""
    signs = torch.randint(0, 2, (count // 4,), generator=torch.Generator().manual_seed(1))
    return (signs.float() * 2 - 1).view(torch.uint8)


@settings(max_examples=200)
@given(
    size=st.integers(1, 5 * ROW),
    flips=st.sets(st.integers(0, 8 * 5 * ROW - 1), min_size=1, max_size=3),
)
def test_up_to_three_flipped_bits_are_seen(size: int, flips: set[int]) -> None:
    buffer = _weights(8 * ROW)[:size].clone()
    before = _sum(buffer)
    for bit in {flip % (8 * size) for flip in flips}:
        buffer[bit // 8] ^= 1 << bit % 8
    assert _sum(buffer) != before


@settings(max_examples=200)
@given(first=st.integers(0, 4 * ROW - 1), second=st.integers(0, 4 * ROW - 1))
def test_two_swapped_bytes_are_seen(first: int, second: int) -> None:
    buffer = _weights(4 * ROW)
    swapped = buffer.clone()
    swapped[[first, second]] = buffer[[second, first]]
    assert (_sum(swapped) == _sum(buffer)) is torch.equal(swapped, buffer)


@settings(max_examples=100)
@given(start=st.integers(0, 3 * ROW), length=st.integers(1, ROW), seed=st.integers(0, 9))
def test_garbage_in_a_row_of_bytes_is_seen(start: int, length: int, seed: int) -> None:
    buffer = _weights(5 * ROW)
    broken = buffer.clone()
    broken[start : start + length] = _bytes(length, seed)
    assert (_sum(broken) == _sum(buffer)) is torch.equal(broken, buffer)


@pytest.mark.parametrize("shift", [1, 4, 8, ROW])
def test_bytes_that_moved_or_are_missing_are_seen(shift: int) -> None:
    buffer = _bytes(4 * ROW + 100)
    assert _sum(buffer.roll(shift)) != _sum(buffer)
    assert _sum(buffer[:-shift]) != _sum(buffer)
    assert _sum(torch.zeros(ROW + shift, dtype=torch.uint8)) != _sum(
        torch.zeros(ROW, dtype=torch.uint8)
    )


def test_the_order_of_rows_and_of_buckets_is_seen() -> None:
    first, second, third = _bytes(ROW, 1), _bytes(ROW, 2), _bytes(ROW, 3)
    assert _sum(torch.cat([first, second, third])) != _sum(torch.cat([second, first, third]))
    assert _sum(first, second) != _sum(second, first)


def test_it_fits_a_signed_number_of_64_bits_and_knows_how_much_it_saw() -> None:
    digest = Digest()
    values = set()
    for size in (0, 1, 3, ROW, 3 * ROW + 5):
        digest.add(_bytes(size))
        values.add(digest.value)
    assert digest.num_bytes == 4 * ROW + 9
    assert min(values) >= 0
    assert 2**48 <= max(values) < 2**56, "seven bytes, and all of them used"
    assert len(values) >= 4

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_system.weights.buckets import Buckets, plan_buckets

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.float64)


@dataclass(frozen=True)
class Shape:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def _tensors(specification: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"w{at}": (torch.randn(rows, 3, generator=generator) * 50).to(DTYPES[kind])
        for at, (rows, kind) in enumerate(specification)
    }


def _shapes(tensors: dict[str, torch.Tensor]) -> list[Shape]:
    return [Shape(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


specifications = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=12)


@settings(max_examples=100)
@given(specification=specifications, bucket_bytes=st.integers(1, 300))
def test_what_is_packed_comes_out_as_it_was(
    specification: list[tuple[int, int]], bucket_bytes: int
) -> None:
    tensors = _tensors(specification)
    ends = [Buckets(_shapes(tensors), bucket_bytes=bucket_bytes, device=CPU) for _ in range(2)]
    ends[0].fill(tensors.items())
    for sent, received in zip(ends[0].buffers, ends[1].buffers, strict=True):
        received.copy_(sent)
    seen = [pair for at in range(len(ends[1].buffers)) for pair in ends[1].unpack(at)]
    assert [name for name, _ in seen] == list(tensors)
    for name, tensor in seen:
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])


@settings(max_examples=100)
@given(specification=specifications, bucket_bytes=st.integers(1, 300))
def test_a_bucket_is_no_larger_than_asked_unless_one_tensor_is(
    specification: list[tuple[int, int]], bucket_bytes: int
) -> None:
    plan = plan_buckets(_shapes(_tensors(specification)), bucket_bytes)
    for run in plan:
        size = sum(torch.Size(p.shape).numel() * p.dtype.itemsize for p in run)
        assert run
        assert size <= bucket_bytes or len([p for p in run if p.shape[0]]) == 1


def test_a_column_of_a_matrix_is_packed_in_the_order_of_its_own_elements() -> None:
    whole = torch.arange(12.0).view(3, 4)
    buckets = Buckets([Shape("w", torch.float32, (4, 3))], bucket_bytes=64, device=CPU)
    buckets.fill([("w", whole.T)])
    assert torch.equal(buckets.unpack(0)[0][1], whole.T)


def test_what_is_packed_does_not_change_with_its_source() -> None:
    source = torch.ones(5)
    buckets = Buckets([Shape("w", torch.float32, (5,))], bucket_bytes=64, device=CPU)
    buckets.fill([("w", source)])
    source.zero_()
    assert buckets.unpack(0)[0][1].tolist() == [1.0] * 5


def test_a_source_is_asked_to_its_end_so_that_it_can_say_what_is_wrong() -> None:
    def checked() -> Iterator[tuple[str, torch.Tensor]]:
        yield "w", torch.ones(5)
        raise ValueError("one is missing")

    buckets = Buckets([Shape("w", torch.float32, (5,))], bucket_bytes=64, device=CPU)
    with pytest.raises(ValueError, match="one is missing"):
        buckets.fill(checked())


def test_what_lies_at_its_dtypes_boundary_is_unpacked_without_a_copy() -> None:
    """A model's bytes a third time would be the memory that the cache was to have."""
    tensors = {
        "first": torch.ones(3, dtype=torch.bfloat16),
        "odd": torch.ones(2),  # behind six bytes
        "even": torch.ones(1, 2, dtype=torch.bfloat16),
    }
    buckets = Buckets(_shapes(tensors), bucket_bytes=64, device=CPU)
    buckets.fill(tensors.items())
    begin, end = buckets.buffers[0].data_ptr(), buckets.buffers[0].data_ptr() + 18
    unpacked = {name: tensor.data_ptr() for name, tensor in buckets.unpack(0)}
    assert (unpacked["first"], unpacked["even"]) == (begin, begin + 14)
    assert not begin <= unpacked["odd"] < end

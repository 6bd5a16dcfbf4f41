"""Products with an unembedding, a chunk of tokens at a time: logits out, gradients back in.

Two sizes of slice. A chunk is what one matrix product makes: many rows, so that the product is
fast. A block is what elementwise work sees of a chunk: few rows, so that its many temporaries stay
small (on a CPU in the cache, which makes the work two to three times faster).

Axes: N response tokens, c tokens of a chunk, b tokens of a block, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Float32
from torch import Tensor

CPU_BLOCK_ELEMENTS = 2**20
"""4 MiB of float32. From 32 MiB on every temporary is fresh memory, made page by page."""
GPU_BLOCK_ELEMENTS = 2**24
"""64 MiB of float32: a kernel runs longer than it takes to start the next."""


def chunk_slices(num_tokens: int, chunk_tokens: int, together: int = 1) -> Iterator[slice]:
    """[0, N) in slices of chunk_tokens, rounded to whole multiples of `together`, at least one.

    The last may be shorter.
    """
    step = max(together, chunk_tokens - chunk_tokens % together)
    for start in range(0, num_tokens, step):
        yield slice(start, min(start + step, num_tokens))


def block_slices(chunk_cV: Tensor, together: int = 1) -> Iterator[slice]:
    """[0, c) in slices small enough for elementwise work, rounded like those of chunk_slices."""
    elements = CPU_BLOCK_ELEMENTS if chunk_cV.device.type == "cpu" else GPU_BLOCK_ELEMENTS
    return chunk_slices(chunk_cV.shape[0], elements // chunk_cV.shape[1], together)


def multiplication_dtype(hidden_NH: Tensor) -> torch.dtype:
    """What autocast would multiply in: autocast itself does not reach into our functions."""
    kind = hidden_NH.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_NH.dtype


def probability_dtype(dtype: torch.dtype) -> torch.dtype:
    """What to multiply probabilities in: bfloat16 has float32's range, float16 drops the tail."""
    return torch.bfloat16 if dtype is torch.bfloat16 else torch.float32


def multiply(left: Float[Tensor, "L X"], right: Float[Tensor, "X R"]) -> Float32[Tensor, "L R"]:
    """left @ right in float32; on a GPU not rounded to the factors' lower precision on the way."""
    if _adds_in_float32(left):
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


def _adds_in_float32(factor: Tensor) -> bool:
    """Whether torch multiplies factors like this one into a float32 product."""
    return factor.device.type == "cuda" and factor.dtype in (torch.float16, torch.bfloat16)


def cap_logits(logits_cV: Float32[Tensor, "c V"], cap: float | None) -> Float32[Tensor, "c V"]:
    """cap tanh(z / cap) of logits z, in their own memory; None leaves them as they are."""
    return logits_cV if cap is None else logits_cV.div_(cap).tanh_().mul_(cap)


def uncap_gradient(
    into_cV: Float32[Tensor, "c V"], capped_cV: Float32[Tensor, "c V"], cap: float | None
) -> Float32[Tensor, "c V"]:
    """The gradient of logits before their cap, in the memory of that of the capped ones.

    d cap tanh(z / cap) / dz = 1 - (capped / cap)^2; capped_cV is not changed.
    """
    if cap is None:
        return into_cV
    for block in block_slices(into_cV):
        into_cV[block] *= 1.0 - (capped_cV[block] / cap).square_()
    return into_cV


class UnembeddingGradients:
    """Logits from hidden states, and the gradients of both factors, added up over chunks.

    needs: whether the hidden states and the unembedding need a gradient. cap: of the logits; what
    `add` takes is the gradient of the product before it (uncap_gradient).
    """

    def __init__(
        self,
        hidden_NH: Float[Tensor, "N H"],
        unembedding_VH: Float[Tensor, "V H"],
        *,
        needs: tuple[bool, bool],
        dtype: torch.dtype,
        cap: float | None = None,
    ) -> None:
        self.hidden_NH = hidden_NH.detach()
        self.weight_VH = unembedding_VH.detach().to(dtype)
        self.dtype, self.cap = dtype, cap
        self.unembedding_dtype = unembedding_VH.dtype
        self.into_hidden_NH = torch.zeros_like(self.hidden_NH) if needs[0] else None
        self.into_unembedding_VH = (
            torch.zeros_like(self.weight_VH, dtype=torch.float32) if needs[1] else None
        )

    @property
    def needed(self) -> bool:
        """Whether there is any gradient to make."""
        return self.into_hidden_NH is not None or self.into_unembedding_VH is not None

    def make_logits(self, rows: slice) -> Float32[Tensor, "c V"]:
        """hidden @ unembedding^T of these rows, capped, float32 [c, V]."""
        product_cV = multiply(self.hidden_NH[rows].to(self.dtype), self.weight_VH.T)
        return cap_logits(product_cV, self.cap)

    def add(self, rows: slice, into_logits_cV: Float32[Tensor, "c V"]) -> None:
        """Take in the gradient of these rows' products."""
        into_cV = into_logits_cV.to(self.dtype)  # as autocast would in a backward pass
        if self.into_hidden_NH is not None:
            self.into_hidden_NH[rows] = into_cV @ self.weight_VH
        if self.into_unembedding_VH is not None:
            self._add_product(self.into_unembedding_VH, into_cV.T, rows)

    def _add_product(self, total_VH: Tensor, into_Vc: Tensor, rows: slice) -> None:
        hidden_cH = self.hidden_NH[rows].to(self.dtype)
        if _adds_in_float32(into_Vc):
            torch.addmm(total_VH, into_Vc, hidden_cH, out_dtype=torch.float32, out=total_VH)
        elif self.dtype is torch.float32:
            total_VH.addmm_(into_Vc, hidden_cH)
        else:
            # addmm_ takes one dtype on a CPU: each chunk's product is rounded to bfloat16, the sum
            # over chunks is not.
            total_VH += into_Vc @ hidden_cH

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of hidden states and unembedding, each in its tensor's own dtype."""
        unembedding = self.into_unembedding_VH
        return (
            self.into_hidden_NH,
            None if unembedding is None else unembedding.to(self.unembedding_dtype),
        )

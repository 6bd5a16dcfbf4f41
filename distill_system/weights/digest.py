"""A digest of bytes where they lie: one number for the same bytes on a CPU and on a GPU.

A buffer is read as a matrix of 64-bit words. The sums of its rows and of its columns (modulo 2**64)
are computed on the device that holds it; they alone, in order, go through BLAKE2b, with the few
bytes behind the last whole row. Any change within a run of 8 KiB is seen, since it meets each
column once; so is any change of up to three words anywhere, since some row or column then holds
exactly one. What is swapped, moved or missing changes sums too.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_ROW_WORDS = 1024
_ROW_BYTES = 8 * _ROW_WORDS
_NUM_BYTES = 7
"""Of the digest: it then fits a signed 64-bit number that travels with the weights."""


class Digest:
    """Takes in buffers, one after the other, and holds the digest of all so far."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._digest = hashlib.blake2b(digest_size=_NUM_BYTES)

    def add(self, buffer_B: Tensor) -> None:
        """Take in a uint8 [B] buffer that begins at a multiple of 8 bytes; waits for its device."""
        num_rows = buffer_B.numel() // _ROW_BYTES
        rows_RW = buffer_B[: num_rows * _ROW_BYTES].view(torch.int64).view(num_rows, _ROW_WORDS)
        for part in (rows_RW.sum(0), rows_RW.sum(1), buffer_B[num_rows * _ROW_BYTES :]):
            self._digest.update(part.cpu().numpy().data)
        self.num_bytes += buffer_B.numel()

    @property
    def value(self) -> int:
        """The digest, in [0, 2**56)."""
        return int.from_bytes(self._digest.digest(), "big")

"""A digest of bytes, computed on the device that holds them; equal for a CPU and a GPU.

Copying a model to the CPU to hash it would take longer than sending it. So a buffer is read as a
matrix of 64-bit words, whose row sums and column sums (modulo 2**64) are computed on the device.
Only the sums, and the few bytes after the last whole row, go through BLAKE2b on the CPU.

What it detects: any change within 8 consecutive KiB, because each column then has at most one
changed word; any change of up to three words anywhere, because some row or column then has exactly
one. Swapped, moved or missing blocks change the sums too. It is no defence against an attacker.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_ROW_WORDS = 1024
_ROW_BYTES = 8 * _ROW_WORDS
_NUM_BYTES = 7
"""Length of the digest, so that it fits into the int64 tensor that is sent after the weights."""


class Digest:
    """The digest of all buffers added so far; their order and their boundaries matter."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._digest = hashlib.blake2b(digest_size=_NUM_BYTES)

    def add(self, buffer_B: Tensor) -> None:
        """Add a uint8 [B] buffer whose memory is aligned to 8 bytes; waits for its device."""
        num_rows = buffer_B.numel() // _ROW_BYTES
        rows_RW = buffer_B[: num_rows * _ROW_BYTES].view(torch.int64).view(num_rows, _ROW_WORDS)
        for part in (rows_RW.sum(0), rows_RW.sum(1), buffer_B[num_rows * _ROW_BYTES :]):
            self._digest.update(part.cpu().numpy().data)
        self.num_bytes += buffer_B.numel()

    @property
    def value(self) -> int:
        """The digest, in [0, 2**56)."""
        return int.from_bytes(self._digest.digest(), "big")

"""The most memory that this process has held, for a step's metrics."""

from __future__ import annotations

import resource
import sys

import torch


def read_peak_memory_bytes(device: torch.device) -> int:
    """The most bytes held at once since the process began.

    On a GPU what PyTorch's allocator gave out on that device; elsewhere the whole process as the
    system counts it (resident pages: weights, libraries and Python itself are in it), which a
    process that was forked from a larger one inherits.  So compare figures of the same device and
    the same kind of worker alone.  It costs microseconds: call it every step.

    device: where the worker computes.
    Returns: Bytes.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts in KiB

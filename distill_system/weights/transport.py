"""Buckets over a process group, sealed: the same loop sends them and receives them.

Any communicator with vLLM's `broadcast(tensor, src=...)` will do. One that does not wait for the
transfer hands out an object with `wait()`; on a GPU the order of the stream does.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from distill_system.errors import TransferError
from distill_system.weights.digest import Digest

SENDER = 0
"""The sender's rank in the transfer group."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Seal:
    """What the sender says of what it sent, and a receiver of what it received."""

    num_bytes: int
    digest: int

    def __str__(self) -> str:
        return f"{self.num_bytes} bytes with digest {self.digest:014x}"


def broadcast_buckets(communicator: Any, buffers: Iterable[Tensor]) -> Seal:
    """Send these buckets, or receive into them; each is summed while the next one travels."""
    digest = Digest()
    arrived: Tensor | None = None
    for buffer in buffers:
        travelling = communicator.broadcast(buffer, src=SENDER)
        if arrived is not None:
            digest.add(arrived)
        _wait(travelling)
        arrived = buffer
    if arrived is not None:
        digest.add(arrived)
    return Seal(digest.num_bytes, digest.value)


def send_seal(communicator: Any, seal: Seal, device: torch.device) -> None:
    """End a transfer with what was sent."""
    numbers = torch.tensor([seal.num_bytes, seal.digest], dtype=torch.int64, device=device)
    _wait(communicator.broadcast(numbers, src=SENDER))


def check_seal(communicator: Any, received: Seal, device: torch.device) -> None:
    """Receive the sender's seal.  Raises: TransferError if it is not that of what arrived."""
    numbers = torch.empty(2, dtype=torch.int64, device=device)
    _wait(communicator.broadcast(numbers, src=SENDER))
    sent = Seal(*numbers.tolist())
    if sent != received:
        raise TransferError(
            f"weights did not arrive as they were sent: sent {sent}, received {received}; nothing "
            "was loaded"
        )


def run_in_background(function: Callable[[], Result]) -> Future[Result]:
    """Run in a thread that holds up no exit: what waits for a peer that hangs cannot be ended."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            # What its frames hold would outlive them: a transfer under way keeps connections open.
            traceback.clear_frames(error.__traceback__)
            future.set_exception(error)

    threading.Thread(target=run, name="weight transfer", daemon=True).start()
    return future


def _wait(travelling: Any) -> None:
    if travelling is not None:
        travelling.wait()

"""Broadcasts buckets over a process group, followed by their seal (byte count and digest).

Sending and receiving are the same loop, since a broadcast is the same call on every rank.
communicator: has vLLM's `broadcast(tensor, src=...)`. It returns an object with `wait()` (gloo), or
None where the order of the GPU stream already makes later work wait (NCCL).
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
    """Byte count and digest of one transfer, as the sender or a receiver computes them."""

    num_bytes: int
    digest: int

    def __str__(self) -> str:
        return f"{self.num_bytes} bytes with digest {self.digest:014x}"


def broadcast_buckets(
    communicator: Any,
    buffers: Iterable[Tensor],
    arrived: Callable[[Tensor], None] = lambda buffer: None,
) -> Seal:
    """Send these buckets, or receive into them; returns their seal.

    Each bucket is added to the digest, and handed to `arrived`, while the next one is transferred:
    of buffers that are made as they are asked for, two are held at most.
    """
    digest = Digest()
    complete: Tensor | None = None
    for buffer in buffers:
        transfer = communicator.broadcast(buffer, src=SENDER)
        if complete is not None:
            digest.add(complete)
            arrived(complete)
        _wait(transfer)
        complete = buffer
    if complete is not None:
        digest.add(complete)
        arrived(complete)
    return Seal(digest.num_bytes, digest.value)


def send_seal(communicator: Any, seal: Seal, device: torch.device) -> None:
    """Send the seal, which ends a transfer."""
    numbers = torch.tensor([seal.num_bytes, seal.digest], dtype=torch.int64, device=device)
    _wait(communicator.broadcast(numbers, src=SENDER))


def check_seal(communicator: Any, received: Seal, device: torch.device) -> None:
    """Receive the sender's seal and compare.  Raises: TransferError if the two differ."""
    numbers = torch.empty(2, dtype=torch.int64, device=device)
    _wait(communicator.broadcast(numbers, src=SENDER))
    sent = Seal(*numbers.tolist())
    if sent != received:
        raise TransferError(
            f"weights did not arrive as they were sent: sent {sent}, received {received}; no text "
            "is written with them"
        )


def run_in_background(function: Callable[[], Result]) -> Future[Result]:
    """Run in a daemon thread, so that the process can exit while the function waits for a peer."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            # The future keeps the error, whose traceback keeps the frames' local variables: here
            # they hold a broadcast under way, which would keep the group's connections open.
            traceback.clear_frames(error.__traceback__)
            future.set_exception(error)

    threading.Thread(target=run, name="weight transfer", daemon=True).start()
    return future


def _wait(transfer: Any) -> None:
    if transfer is not None:
        transfer.wait()

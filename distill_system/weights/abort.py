"""A deadline for transfers that have none of their own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from distill_system.errors import DeadlineError


class AbortsTransfers(Protocol):
    """The part of vLLM's PyNcclCommunicator that ends what is under way."""

    def destroy(self) -> Any:
        """Abort, so that whoever waits for a peer returns; nothing is sent or received after it."""


@contextmanager
def aborted_after(seconds: float, communicator: AbortsTransfers) -> Iterator[None]:
    """A block of transfers that is aborted if it takes longer.

    NCCL waits for a peer without end. Another thread aborts the communicator at the deadline: what
    waits on the GPU returns, with memory that holds anything, and later calls do nothing.
    Raises: DeadlineError if the block was aborted, whatever it made of that.
    """
    is_over = threading.Event()

    def abort() -> None:
        is_over.set()
        communicator.destroy()

    timer = threading.Timer(seconds, abort)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception as error:
        if not is_over.is_set():
            raise
        raise _too_late(seconds) from error
    finally:
        timer.cancel()
        timer.join()  # an abort frees its waiters before it ends, and must not meet a second one
    if is_over.is_set():
        raise _too_late(seconds)


def _too_late(seconds: float) -> DeadlineError:
    return DeadlineError(
        f"weights over NCCL: expected all of them within {seconds:g} s, a peer did not take part "
        "(deadlines.publish_seconds). The transfer was aborted"
    )

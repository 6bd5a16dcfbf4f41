"""Buckets over a communicator that only records: order, seals, and the thread that sends."""

import threading
from typing import Any

import pytest
import torch

from distill_system.errors import TransferError
from distill_system.weights.digest import Digest
from distill_system.weights.transport import (
    Seal,
    broadcast_buckets,
    check_seal,
    run_in_background,
    send_seal,
)

CPU = torch.device("cpu")
BUCKETS = [torch.full((size,), size, dtype=torch.uint8) for size in (24, 8, 16)]


class Travelling:
    def __init__(self, log: list[str], index: int) -> None:
        self.log, self.index = log, index

    def wait(self) -> None:
        self.log.append(f"arrived {self.index}")


class Line:
    """Each broadcast is under way until it is waited for."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.sent: list[list[int]] = []

    def broadcast(self, tensor: torch.Tensor, src: int) -> Travelling:
        assert src == 0
        self.log.append(f"leaves {len(self.sent)}")
        self.sent.append(tensor.tolist())
        return Travelling(self.log, len(self.sent) - 1)


def test_a_bucket_is_summed_after_it_arrived_and_while_the_next_one_travels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = Line()
    honest = Digest.add
    sizes = [bucket.numel() for bucket in BUCKETS]

    def add(self: Digest, buffer: torch.Tensor) -> None:
        line.log.append(f"summed {sizes.index(buffer.numel())}")
        honest(self, buffer)

    monkeypatch.setattr(Digest, "add", add)
    seal = broadcast_buckets(line, BUCKETS)
    expected = ["leaves 0", "arrived 0", "leaves 1", "summed 0", "arrived 1"]
    expected += ["leaves 2", "summed 1", "arrived 2", "summed 2"]
    assert line.log == expected
    digest = Digest()
    for bucket in BUCKETS:
        honest(digest, bucket)
    assert seal == Seal(48, digest.value)


def test_the_seal_is_sent_and_waited_for() -> None:
    line = Line()
    send_seal(line, Seal(48, 5), CPU)
    assert line.sent == [[48, 5]]
    assert line.log == ["leaves 0", "arrived 0"]


@pytest.mark.parametrize("told", [Seal(48, 5), Seal(49, 5), Seal(48, 6)])
def test_either_number_of_the_seal_that_differs_is_refused(told: Seal) -> None:
    class Telling:
        def broadcast(self, tensor: torch.Tensor, src: int) -> Any:
            class Arriving:
                def wait(self) -> None:
                    tensor.copy_(torch.tensor([told.num_bytes, told.digest]))

            return Arriving()

    if told == Seal(48, 5):
        check_seal(Telling(), Seal(48, 5), CPU)
        return
    with pytest.raises(TransferError, match=f"sent {told}, received {Seal(48, 5)}"):
        check_seal(Telling(), Seal(48, 5), CPU)


def test_what_runs_in_the_background_holds_up_no_exit_and_hands_over_value_or_error() -> None:
    def fail() -> None:
        raise ConnectionError("gone")

    assert run_in_background(lambda: threading.current_thread().daemon).result(timeout=20) is True
    with pytest.raises(ConnectionError, match="gone"):
        run_in_background(fail).result(timeout=20)

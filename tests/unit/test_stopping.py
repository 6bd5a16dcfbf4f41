"""A wish to end: heard in a block alone, and with a deadline that interrupts."""

from __future__ import annotations

import time

import pytest

from distill_system.stopping import StopRequest


def test_nobody_hears_it_outside_of_a_block() -> None:
    request = StopRequest()
    assert request.make() is None
    assert not request.is_made
    with request.heard(seconds=30.0):
        assert request.make() == 30.0
        assert request.is_made
    assert request.make() is None


def test_what_takes_longer_than_its_deadline_is_interrupted() -> None:
    request = StopRequest()
    with request.heard(seconds=0.05):
        request.make()
        with pytest.raises(KeyboardInterrupt):
            time.sleep(20.0)


def test_the_deadline_ends_with_the_block() -> None:
    request = StopRequest()
    with request.heard(seconds=0.2):
        request.make()
    time.sleep(0.3)

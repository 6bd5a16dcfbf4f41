"""What Ray would print by itself is found in the driver's log, and printed again afterwards."""

from __future__ import annotations

import logging
import os

import pytest
import ray._private.worker as ray_worker

from distill_system.cluster.ray_messages import RayMessages, logged_stderr
from distill_system.logs import LOGGER_NAME


def _lose(node: str) -> None:
    """What Ray does with the end of a node; the same message again it leaves out by itself."""
    lines = [f"The node\n {node} has been marked dead"]
    ray_worker.print_to_stdstream({"lines": lines, "pid": "raylet", "is_err": False}, False)


def _fail_unread() -> None:
    """What Ray does with a call's failure that nobody has waited for."""
    try:
        raise ValueError("connection closed by peer")
    except ValueError as error:
        ray_worker._unhandled_error_handler(error)


def test_messages_are_logged_and_not_printed(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger=LOGGER_NAME)
    messages = RayMessages()
    messages.begin()
    try:
        _lose("first")
        _fail_unread()
    finally:
        messages.end()
    printed = capsys.readouterr()
    assert printed.out + printed.err == ""
    assert "The node first has been marked dead" in caplog.text
    assert "connection closed by peer" in caplog.text


def test_ray_prints_again_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    messages = RayMessages()
    messages.begin()
    messages.end()
    _lose("second")
    assert "second has been marked dead" in capsys.readouterr().out


def test_what_is_written_past_python_is_logged(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger=LOGGER_NAME)

    def fail() -> None:
        with logged_stderr():
            os.write(2, b"E core_worker.cc:1: max_restarts\nE core_worker.cc:2: \xff\n")
            raise ValueError("the block failed")

    with pytest.raises(ValueError, match="the block failed"):
        fail()
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == "afterwards\n"
    assert caplog.messages[0] == "Ray says: E core_worker.cc:1: max_restarts"
    assert caplog.messages[1].startswith("Ray says: E core_worker.cc:2: ")

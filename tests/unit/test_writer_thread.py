"""Work done by another thread: its order, what it costs where it hangs, and that it ends."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from distill_system.writer_thread import WriterThread, is_done


def test_work_is_done_in_order_and_the_thread_ends_with_it():
    thread, done = WriterThread("order"), []
    for number in range(50):
        last = thread.submit(partial(done.append, number))
    assert is_done(last, 10.0)
    assert done == [*range(50)]
    _wait_for_end("order")
    assert thread.offer(lambda: "again").result(0) == "again"


def test_what_fails_is_met_by_who_asked_and_the_rest_is_done():
    thread = WriterThread("failing")
    failing = thread.submit(lambda: 1 // 0)
    assert thread.submit(lambda: 7).result(10.0) == 7
    with pytest.raises(ZeroDivisionError):
        failing.result(0)


def test_the_same_work_waits_once():
    thread, goes_on, done = WriterThread("same"), threading.Event(), []
    thread.submit(goes_on.wait)
    queued = [thread.submit(lambda: done.append("a"), key="a") for _ in range(3)]
    other = thread.submit(lambda: done.append("b"), key="b")
    assert thread.num_waiting == 2
    goes_on.set()
    assert is_done(other, 10.0)
    assert done == ["a", "b"]
    assert queued[0] is queued[2]


def test_nobody_waits_for_a_thread_that_is_known_to_be_slow():
    thread, goes_on = WriterThread("slow"), threading.Event()
    assert not thread.offer(goes_on.wait).done()
    began = time.monotonic()
    offered = [thread.offer(lambda: None) for _ in range(100)]
    assert time.monotonic() - began < 5.0, "patience a hundred times would be 50 s"
    assert thread.busy_seconds > 0
    goes_on.set()
    assert is_done(offered[-1], 10.0)
    assert thread.busy_seconds == 0.0
    assert thread.offer(lambda: None).done(), "it is waited for again"


def test_work_that_hangs_for_ever_keeps_no_process_alive(tmp_path):
    program = f"""
import os
from distill_system.writer_thread import WriterThread
os.mkfifo({str(tmp_path / "fifo")!r})
assert not WriterThread("hangs").offer(lambda: open({str(tmp_path / "fifo")!r}, "w")).done()
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    assert done.returncode == 0


def _wait_for_end(name):
    deadline = time.monotonic() + 10.0
    while any(thread.name == name for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)

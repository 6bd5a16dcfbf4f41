"""The lock of a run's folder, held and fought for by real processes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from distill_system.errors import RunStateError
from distill_system.observe import RunDirectory, run_lock
from distill_system.observe.run_lock import locked

HOLD = """
import sys, time
from distill_system.observe.run_directory import RunDirectory
from distill_system.observe.run_lock import locked
with locked(RunDirectory(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
COUNT = """
import sys
from pathlib import Path
from distill_system.errors import RunStateError
from distill_system.observe.run_directory import RunDirectory
from distill_system.observe.run_lock import locked
counter, won = Path(sys.argv[2]), 0
while won < int(sys.argv[3]):
    try:
        with locked(RunDirectory(sys.argv[1])):
            counter.write_text(str(int(counter.read_text()) + 1))
            won += 1
    except RunStateError:
        pass
"""


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path / "runs/mine")


@contextmanager
def _held_by_another(run):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        yield holder
    finally:
        holder.kill()
        holder.communicate()


def _tree(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _take_and_say(run, **how):
    said = []
    with locked(run, notify=said.append, **how):
        pass
    return said


def test_a_second_process_is_told_who_holds_the_folder_and_changes_nothing(run):
    with _held_by_another(run) as holder:
        before = _tree(run.path)
        with pytest.raises(RunStateError) as caught, locked(run):
            pytest.fail("it is held")
        assert _tree(run.path) == before
    said = str(caught.value)
    assert f"process {holder.pid} on {socket.gethostname()}, since " in said
    assert re.search(r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d \(\d+ s\)", said)
    assert str(run.path / "lock") in said
    assert "another name (name=...)" in said


def test_a_process_that_sleeps_still_holds_it(run):
    with _held_by_another(run) as holder:
        holder.send_signal(signal.SIGSTOP)
        with pytest.raises(RunStateError, match="is in use"), locked(run):
            pytest.fail("it is held")


def test_kill_9_frees_it_at_once(run):
    with _held_by_another(run) as holder:
        holder.kill()
        holder.wait()
        assert run.lock_path.exists(), "nobody could remove it"
        with locked(run):
            assert json.loads(run.lock_path.read_text())["process"] == os.getpid()


def test_one_thread_keeps_another_of_the_same_process_out(run):
    with locked(run), pytest.raises(RunStateError, match=f"process {os.getpid()} "), locked(run):
        pytest.fail("it is held")


def test_it_leaves_no_file_and_no_folder_of_its_own(run, tmp_path):
    with locked(run):
        assert run.lock_path.exists()
    assert list(tmp_path.iterdir()) == []
    with locked(run):
        run.config_path.write_text("{}")
    assert [path.name for path in run.path.iterdir()] == ["config.json"]
    with pytest.raises(ValueError, match="inside"), locked(run):
        raise ValueError("inside")
    assert [path.name for path in run.path.iterdir()] == ["config.json"]


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "a_file").write_text("")
    with (
        pytest.raises(RunStateError, match=r"cannot be written.*another runs_directory"),
        locked(RunDirectory(tmp_path / "a_file/run")),
    ):
        pytest.fail("it has no folder")


def test_processes_that_fight_for_it_are_never_two(run, tmp_path):
    counter, rounds, fighters = tmp_path / "counter", 60, 3
    counter.write_text("0")
    command = [sys.executable, "-c", COUNT, str(run.path), str(counter), str(rounds)]
    processes = [subprocess.Popen(command) for _ in range(fighters)]
    assert [process.wait() for process in processes] == [0] * fighters
    assert int(counter.read_text()) == fighters * rounds


def _named(run, **changes):
    """A lock file as another process left it."""
    with locked(run):
        record = json.loads(run.lock_path.read_text())
    run.path.mkdir(parents=True, exist_ok=True)
    run.lock_path.write_text(json.dumps({**record, **changes}))


@pytest.fixture
def _no_locks_of_the_system(monkeypatch):
    monkeypatch.setattr(run_lock, "try_to_lock", lambda *_: None)


@pytest.mark.usefixtures("_no_locks_of_the_system")
def test_without_locks_of_the_system_a_process_of_this_machine_is_looked_for(run):
    with _held_by_another(run) as holder:
        with pytest.raises(RunStateError, match=f"process {holder.pid} "), locked(run):
            pytest.fail("it is held")
        holder.kill()
        holder.wait()
        [said] = _take_and_say(run)
    assert f"its holder has died (process {holder.pid} on" in said


@pytest.mark.usefixtures("_no_locks_of_the_system")
def test_a_later_process_of_the_same_number_is_another(run):
    _named(run, started=1)
    [said] = _take_and_say(run)
    assert f"its holder has died (process {os.getpid()} on" in said


def test_a_holder_of_another_machine_is_dead_once_it_is_silent(run):
    _named(run, host="far", boot="another", process=7, since=time.time() - 7300)
    looked, taken = _take_and_say(run, watch_seconds=0.2)
    assert "held by process 7 on far" in looked
    assert "(2.0 h)" in looked
    assert "signs of life, 0 s at most" in looked
    assert "its holder has died (process 7 on far" in taken
    assert not run.lock_path.exists()


def test_a_holder_of_another_machine_that_gives_signs_of_life_is_not(run, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
    _named(run, host="far", boot="another", process=7)
    ended = threading.Event()
    beat = threading.Thread(target=run_lock._beat, args=(run.lock_path, ended))
    beat.start()
    try:
        with pytest.raises(RunStateError, match="process 7 on far"):
            _take_and_say(run, watch_seconds=30.0)
    finally:
        ended.set()
        beat.join()
    assert json.loads(run.lock_path.read_text())["process"] == 7


def test_the_holder_gives_signs_of_life(run, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
    with locked(run):
        first = run.lock_path.stat().st_mtime_ns
        deadline = time.monotonic() + 30
        while run.lock_path.stat().st_mtime_ns == first:
            assert time.monotonic() < deadline, "no sign"
            time.sleep(0.02)


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b"[1]", b'{"host": "a"}'])
def test_a_damaged_file_that_nobody_holds_is_taken(run, damage):
    run.path.mkdir(parents=True)
    run.lock_path.write_bytes(damage)
    assert _take_and_say(run) == []

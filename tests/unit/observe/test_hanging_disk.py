"""A run whose disk does not answer: a real file system that is frozen, and thaws again."""

from __future__ import annotations

import logging
import shutil
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fakes.text_saver import TextSaver

from distill_system.errors import RunStateError
from distill_system.logs import LOGGER_NAME, close_log, open_log
from distill_system.observe import LiveView, PromptLog, RunDirectory, RunWrites, Timings
from distill_system.observe import run_writes as module
from distill_system.observe.metrics import read_prompts
from distill_system.observe.timings import read_timings
from distill_system.run.checkpoints import CheckpointStore


class Freezer:
    """A disk of its own; a write to it hangs while it is frozen, reads do not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def freeze(self) -> None:
        subprocess.run(["fsfreeze", "--freeze", self.folder], check=True)

    def thaw(self) -> None:
        subprocess.run(["fsfreeze", "--unfreeze", self.folder], check=True)


@pytest.fixture
def freezer(tmp_path):
    image, folder = tmp_path / "disk", tmp_path / "mounted"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(8 << 20)
    try:
        subprocess.run(["mkfs.ext4", "-q", image], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", image, folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a file system")
    assert shutil.which("fsfreeze")
    yield Freezer(folder)
    with suppress(subprocess.CalledProcessError):  # it is not frozen
        subprocess.run(["fsfreeze", "-u", folder], check=True, capture_output=True)
    _until(lambda: not _has_writer())
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """What hangs is told after a second, and not after half a minute."""
    monkeypatch.setattr(module, "HANG_SECONDS", 1.0)


@pytest.fixture
def said():
    return []


def _until(is_so):
    deadline = time.monotonic() + 20.0
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _has_writer():
    return any(thread.name == "writes" for thread in threading.enumerate())


def _steps(run):
    return [row.step for row in read_prompts(run)]


def test_steps_go_on_while_the_disk_hangs_and_every_row_is_written_once_it_thaws(freezer, said):
    run, writes = RunDirectory(freezer.folder), RunWrites(said.append)
    timings = Timings(run, writes=writes)
    with writes, PromptLog(run, writes=writes) as prompts:
        prompts.log("distill", 0, {"on_policy": ["a"]})
        assert _steps(run) == [0], "a disk that answers has the row when the call returns"
        freezer.freeze()
        began = time.monotonic()
        for step in range(1, 30):
            prompts.log("distill", step, {"on_policy": ["a"]})
            with timings.stage("distill"):
                pass
            time.sleep(0.05)
        assert time.monotonic() - began < 10.0
        assert said == [
            "prompts.jsonl cannot be written (its disk has not answered for 1 s): the run goes "
            "on, and writes it once the disk takes it again"
        ]
        assert writes.num_failed == 1
        freezer.thaw()
        _until(lambda: len(said) == 2)
        assert said[1] == "prompts.jsonl is written again"
    assert _steps(run) == list(range(30))
    assert read_timings(run).seconds.keys() == {"distill"}


def test_the_end_of_a_run_waits_once_and_says_what_is_lost(freezer, said):
    run = RunDirectory(freezer.folder)
    began = time.monotonic()
    with RunWrites(said.append) as writes, PromptLog(run, writes=writes) as prompts:
        freezer.freeze()
        prompts.log("distill", 1, {"on_policy": ["a"]})
        prompts.log("distill", 2, {"on_policy": ["a"]})
        Timings(run, writes=writes).save()
    assert time.monotonic() - began < 10.0
    assert [line.partition(":")[0] for line in said] == [
        "prompts.jsonl cannot be written (its disk has not answered for 1 s)",
        "prompts.jsonl",
        f"{freezer.folder.name}/timings.json is lost",
    ]


def test_a_checkpoint_is_whole_only_after_the_rows_of_its_steps(freezer, said):
    run, writes = RunDirectory(freezer.folder), RunWrites(said.append)
    store = CheckpointStore(freezer.folder / "distill", keep=1, writes=writes)
    learner: Any = TextSaver("one")
    with PromptLog(run, writes=writes) as prompts:
        store.start(1, {}, learner)
        freezer.freeze()
        prompts.log("distill", 1, {"on_policy": ["a"]})
        thaw = threading.Timer(2.0, freezer.thaw)
        thaw.start()
        files = learner.finish_save  # the rank's own file is written once the disk thaws, too
        learner.finish_save = lambda *, wait: thaw.join() or files(wait=wait)
        assert store.finish(learner, wait=True)
        assert _steps(run) == [1]
    latest = store.latest()
    assert latest is not None
    assert latest.step == 1


def test_a_run_that_cannot_write_its_checkpoint_says_which_file_and_ends(freezer, said):
    """In the driver's part, as it begins and as it ends, and in the learner's."""
    store = CheckpointStore(
        freezer.folder / "distill", keep=1, writes=RunWrites(said.append, seconds=2.0)
    )
    learner: Any = TextSaver("one")
    store.start(1, {}, learner)
    assert store.finish(learner, wait=True)
    freezer.freeze()
    with pytest.raises(RunStateError, match=r"step_000002\.partial: its disk has not answered"):
        store.start(2, {}, learner)
    assert said == [
        f"{freezer.folder}/distill/step_000002.partial: its disk has not answered for 1 s; the "
        "run waits for it, 2 s at most"
    ]
    freezer.thaw()
    latest = store.latest()
    assert latest is not None
    assert latest.step == 1

    store.start(3, {}, learner)
    freezer.freeze()
    with pytest.raises(RunStateError, match=r"step_000003\.partial.*go on with --resume"):
        store.finish(_Writing(), wait=True)
    assert store.finish(learner, wait=True), "what failed once is not waited for again"


class _Writing(TextSaver):
    """A rank that answers, and whose write hangs."""

    def finish_save(self, *, wait):
        time.sleep(0.1)


def test_lines_of_a_log_hold_up_nobody(freezer):
    path = freezer.folder / "driver.log"
    handler = open_log(path, level="info", json_lines=False)
    freezer.freeze()
    began = time.monotonic()
    with LiveView("run") as view:
        for number in range(100):
            view.note(f"line {number}")
    close_log(handler)
    logging.getLogger(LOGGER_NAME).info("closed")
    assert time.monotonic() - began < 10.0
    freezer.thaw()
    _until(lambda: path.read_text().count("INFO  line ") == 100)

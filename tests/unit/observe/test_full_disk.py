"""What a run writes down, on a real file system that is full, read-only, and has room again."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from distill_system.errors import RunStateError
from distill_system.observe import (
    LiveView,
    PromptLog,
    RunDirectory,
    RunWrites,
    Timings,
    write_evaluation,
)
from distill_system.observe.json_lines import JsonLinesLog
from distill_system.observe.metrics import TrainedPrompts, read_prompts
from distill_system.observe.summary import read_evaluation
from distill_system.observe.timings import read_timings

LONG = "p" * 700
"""A prompt's id; a row of it is no divisor of a block, so that a full disk takes half rows."""


@pytest.fixture
def writes():
    """Writes that keep what the person is told."""
    said: list[str] = []
    made = RunWrites(said.append)
    made.said = said  # type: ignore[attr-defined]
    return made


def _log(prompts, first, last):
    for step in range(first, last):
        prompts.log("distill", step, {"on_policy": [f"{LONG}{step}"]})


def _steps(run):
    return [row.step for row in read_prompts(run)]


def test_rows_wait_for_room_and_none_is_lost_or_doubled_or_torn(small_disk, writes):
    run = RunDirectory(small_disk.folder / "run")
    with PromptLog(run, writes=writes) as prompts:
        _log(prompts, 0, 8)
        small_disk.fill(leave_bytes=4096)
        _log(prompts, 8, 30)  # some fit, one of them in half
        kept = len(_steps(run))
        assert 8 < kept < 30
        assert _steps(run) == list(range(kept)), "who reads meanwhile finds whole rows"
        small_disk.free()
        _log(prompts, 30, 33)
    assert _steps(run) == list(range(33))
    assert [row.prompt_ids["on_policy"] for row in read_prompts(run)] == [
        [f"{LONG}{step}"] for step in range(33)
    ]
    assert writes.said == [
        "prompts.jsonl cannot be written (No space left on device): the run goes on, and writes "
        "it once the disk takes it again",
        "prompts.jsonl is written again",
    ]
    assert writes.num_failed == 30 - kept


def test_rows_wait_for_a_disk_that_was_made_read_only(small_disk, writes):
    run = RunDirectory(small_disk.folder / "run")
    with PromptLog(run, writes=writes) as prompts:
        _log(prompts, 0, 2)
        small_disk.make_read_only()
        _log(prompts, 2, 5)
        assert _steps(run) == [0, 1]
        small_disk.make_read_only(read_only=False)
    assert _steps(run) == [0, 1, 2, 3, 4], "the end is a last chance"
    assert "Read-only file system" in writes.said[0]


def test_what_is_lost_in_the_end_is_told(small_disk, writes):
    run = RunDirectory(small_disk.folder / "run")
    with PromptLog(run, writes=writes) as prompts:
        _log(prompts, 0, 2)
        small_disk.fill()
        _log(prompts, 2, 20)
    kept = len(_steps(run))
    assert _steps(run) == list(range(kept))
    assert writes.said[1:] == [f"prompts.jsonl: {20 - kept} rows are lost"]


def test_a_log_is_cut_back_on_a_full_disk_if_there_is_nothing_to_cut(small_disk):
    run = RunDirectory(small_disk.folder / "run")
    with PromptLog(run) as prompts:
        _log(prompts, 0, 30)
        small_disk.fill()
        prompts.truncate_after("distill", 29)
        with pytest.raises(RunStateError, match=r"prompts\.jsonl cannot be written: No space left"):
            prompts.truncate_after("distill", 20)
    assert _steps(run) == list(range(30))


def test_timings_and_evaluations_wait_too_the_newest_of_each(small_disk, writes):
    run = RunDirectory(small_disk.folder / "run")
    timings = Timings(run, writes=writes)
    with timings.stage("sft_teacher"):
        pass
    small_disk.fill()
    with timings.stage("distill"):
        for step in (2, 3):
            write_evaluation(
                run,
                "after",
                step=step,
                weight_version=1,
                splits={},
                distances={"cross_entropy": 1.0},
                writes=writes,
            )
    assert read_timings(run).seconds.keys() == {"sft_teacher"}, "the older one stands whole"
    assert read_evaluation(run, "after") is None
    assert len(writes.said) == 2
    small_disk.free()
    writes.close()
    assert read_timings(run).seconds.keys() == {"sft_teacher", "distill"}
    found = read_evaluation(run, "after")
    assert found is not None
    assert found["step"] == 3
    assert [line for line in writes.said if "written again" in line] == [
        "evaluations/after.json is written again",
        "run/timings.json is written again",
    ]
    assert sorted(path.name for path in run.path.iterdir()) == ["evaluations", "timings.json"]


def test_what_a_block_failed_with_is_not_replaced_by_what_the_disk_says(small_disk):
    run = RunDirectory(small_disk.folder / "run")
    run.path.mkdir()
    run.prompts_path.touch()
    small_disk.fill()

    def fail():
        with PromptLog(run) as prompts, Timings(run).stage("distill"):
            _log(prompts, 0, 3)
            raise RunStateError("the good message")

    with pytest.raises(RunStateError, match="the good message"):
        fail()


def test_a_log_that_cannot_be_opened_is_told(tmp_path):
    (tmp_path / "prompts.jsonl").mkdir()
    with pytest.raises(RunStateError, match=r"prompts\.jsonl cannot be written: Is a directory"):
        PromptLog(RunDirectory(tmp_path))


def test_a_limit_on_the_size_of_files_is_a_full_disk_too(tmp_path):
    """Where mounting is not allowed: a process that may write files of 10 kB and no more."""
    program = f"""
import resource, signal
from distill_system.observe.metrics import PromptLog
from distill_system.observe.run_directory import RunDirectory
from distill_system.observe.run_writes import RunWrites
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
said = []
with PromptLog(RunDirectory({str(tmp_path)!r}), writes=RunWrites(said.append)) as prompts:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    for step in range(40):
        prompts.log("distill", step, {{"on_policy": [{LONG!r}]}})
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert "File too large" in said[0], said
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert _steps(RunDirectory(tmp_path)) == list(range(40))


class _Full:
    """A log of the terminal on a full disk."""

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_the_live_view_goes_on_without_its_log():
    console = Console(file=_Full(), force_terminal=False)  # type: ignore[arg-type]
    with LiveView("run", console=console) as view:
        view.note("a note")
        view.start("distill", 3).update(1, {"loss": 1.0})


def test_a_file_that_was_removed_meanwhile_is_begun_anew(tmp_path):
    path = tmp_path / "prompts.jsonl"
    log = JsonLinesLog(path, TrainedPrompts)
    log.append(TrainedPrompts(stage="distill", step=1, prompt_ids={}))
    path.unlink()
    log.append(TrainedPrompts(stage="distill", step=2, prompt_ids={}))
    log.close()
    assert _steps(RunDirectory(Path(tmp_path))) == [2]

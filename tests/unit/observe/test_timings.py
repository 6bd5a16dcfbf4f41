import threading
from pathlib import Path
from typing import Any

import pytest
from fakes.hand_clock import HandClock

from distill_system.errors import RunStateError
from distill_system.observe.run_directory import RunDirectory, read_json, write_json
from distill_system.observe.timings import Timings, read_timings
from distill_system.records import PoolActivity


def test_work_gives_tokens_per_busy_second_of_each_pool(tmp_path: Path) -> None:
    timings = Timings(RunDirectory(tmp_path))
    for tokens in (100, 300):
        timings.add_activity({"student_rollout": _stretch(tokens, 0.5)})
    timings.add_activity({"learner": _stretch(5, 10.0)}, stage="sft_teacher")
    timings.add_activity({"idle": _stretch(0, 0.0)})
    assert timings.tokens_per_second == {"student_rollout": 400.0, "sft_teacher": 0.5}


def _stretch(tokens: int, busy_seconds: float) -> PoolActivity:
    return PoolActivity(num_workers=1, seconds=10.0, busy_seconds=busy_seconds, num_tokens=tokens)


def test_one_steps_phases_are_given_once(tmp_path: Path) -> None:
    clock = HandClock()
    timings = Timings(RunDirectory(tmp_path), clock=clock)
    for phase, seconds in (("learner", 2.0), ("publish", 0.5), ("learner", 3.0)):
        with timings.phase(phase):
            clock.sleep(seconds)
    assert timings.pop_step() == {"learner": 5.0, "publish": 0.5}
    assert timings.pop_step() == {}


def test_a_resumed_run_goes_on_from_what_was_saved(tmp_path: Path) -> None:
    run, clock = RunDirectory(tmp_path), HandClock()
    first = Timings(run, clock=clock)
    with first.stage("distill"):
        with first.phase("learner"):
            clock.sleep(3.0)
        first.add_activity({"learner": _stretch(10, 0.5)})
        first.save()
        clock.sleep(1.0)  # a run killed here keeps the time of the running stage up to its save
        second = Timings(run, clock=clock)
    assert second.seconds == {"distill": 3.0}
    with second.stage("distill"), second.phase("learner"):
        clock.sleep(4.0)
    second.add_activity({"learner": _stretch(20, 0.5)})
    second.save()
    assert second.seconds == {"distill": 7.0}
    assert second.tokens_per_second == {"learner": 30.0}
    form: Any = read_json(run.timings_path)
    assert form["phases"]["distill"] == {"learner": 7.0}


def test_a_stage_that_begins_again_counts_from_zero(tmp_path: Path) -> None:
    run, clock = RunDirectory(tmp_path), HandClock()
    with Timings(run, clock=clock).stage("distill"):
        clock.sleep(200.0)
    again = Timings(run, clock=clock)
    with again.stage("distill"):
        clock.sleep(5.0)
        again.restart("distill")
        clock.sleep(1.5)
    assert again.seconds == {"distill": 1.5}


def test_time_counts_when_the_work_fails(tmp_path: Path) -> None:
    run, clock = RunDirectory(tmp_path), HandClock()
    timings = Timings(run, clock=clock)

    def fail() -> None:
        with timings.stage("distill"), timings.phase("learner"):
            clock.sleep(2.0)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert Timings(run).seconds == {"distill": 2.0}
    assert timings.pop_step() == {"learner": 2.0}


def test_two_stages_at_once_count_each_for_itself(tmp_path: Path) -> None:
    """sft_student begins while sft_teacher is under way, and ends before it."""
    clock, inner_is_done = HandClock(), threading.Event()
    timings = Timings(RunDirectory(tmp_path), clock=clock)

    def work(stage: str, seconds: float) -> None:
        with timings.stage(stage), timings.phase("learner", stage=stage):
            clock.sleep(seconds)

    def work_inside() -> None:
        work("sft_student", 2.0)
        inner_is_done.set()

    with timings.stage("sft_teacher"), timings.phase("learner", stage="sft_teacher"):
        clock.sleep(10.0)
        threading.Thread(target=work_inside).start()
        assert inner_is_done.wait(60.0)
        clock.sleep(3.0)
    assert timings.seconds == {"sft_teacher": 15.0, "sft_student": 2.0}
    assert timings.pop_step("sft_teacher") == {"learner": 15.0}
    assert timings.pop_step("sft_student") == {"learner": 2.0}


def test_a_file_of_another_form_is_refused(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.timings_path.write_text('{"phases": {"distill": [3]}}')
    with pytest.raises(RunStateError, match=r"timings\.json, phases, distill: .*Remove the file"):
        Timings(run)


def test_pools_activity_is_added_up_over_a_resume_and_dropped_with_a_new_start(
    tmp_path: Path,
) -> None:
    run = RunDirectory(tmp_path)
    stretch = PoolActivity(
        num_workers=2, seconds=5.0, busy_seconds=4.0, blocked_seconds=6.0, num_tokens=7
    )
    for _ in range(3):
        timings = Timings(run)
        timings.add_activity({"learner": stretch})
        timings.save()
    pools = read_timings(run).pools["distill"]
    assert (pools["learner"].seconds, pools["learner"].num_tokens) == (15.0, 21)
    assert pools["learner"].busy_share == pytest.approx(0.4)
    timings.restart("sft_teacher")
    timings.save()
    assert read_timings(run).pools["distill"]
    timings.restart("distill")
    timings.save()
    assert read_timings(run).pools["distill"] == {}


def test_timings_from_before_pools_were_counted_are_read(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    write_json(run.timings_path, {"seconds": {"distill": 1.0}, "phases": {"distill": {}}})
    Timings(run).save()
    assert read_json(run.timings_path)["pools"] == {"distill": {}}
    bad = {"distill": {"a": {}}}
    write_json(
        run.timings_path, {"seconds": {"distill": 1.0}, "phases": {"distill": {}}, "pools": bad}
    )
    with pytest.raises(
        RunStateError, match=r"timings\.json, pools, distill, a, num_workers: Field req"
    ):
        Timings(run)

import threading
import time
from pathlib import Path

import pytest

from distill_system.errors import RunStateError
from distill_system.observe.run_directory import RunDirectory, read_json
from distill_system.observe.timings import Timings


def test_a_phase_counts_its_seconds_and_tokens(tmp_path: Path) -> None:
    timings = Timings(RunDirectory(tmp_path))
    for tokens in (100, 300):
        with timings.phase("student_rollout") as phase:
            time.sleep(0.02)
            phase.tokens += tokens
    with timings.phase("learner", stage="sft_teacher") as phase:
        phase.tokens += 5
    rate = timings.tokens_per_second["student_rollout"]
    assert 400 / 0.2 < rate <= 400 / 0.04
    assert set(timings.tokens_per_second) == {"student_rollout", "sft_teacher/learner"}


def test_one_steps_phases_are_given_once(tmp_path: Path) -> None:
    timings = Timings(RunDirectory(tmp_path))
    with timings.phase("learner") as phase:
        time.sleep(0.01)
        phase.tokens += 10
    with timings.phase("publish"):
        pass
    metrics = timings.pop_step_metrics()
    assert set(metrics) == {"seconds/learner", "seconds/publish", "tokens_per_second/learner"}
    assert metrics["seconds/learner"] >= 0.01
    product = metrics["seconds/learner"] * metrics["tokens_per_second/learner"]
    assert product == pytest.approx(10)
    assert timings.pop_step() == {}


def test_a_resumed_run_goes_on_from_what_was_saved(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    first = Timings(run)
    with first.stage("distill"):
        with first.phase("learner") as phase:
            time.sleep(0.03)
            phase.tokens += 10
        first.save()
        saved = read_json(run.timings_path)["seconds"]["distill"]  # type: ignore[index]
        assert saved >= 0.03  # a run killed here keeps the time of the running stage
    second = Timings(run)
    with second.stage("distill"), second.phase("learner") as phase:
        time.sleep(0.03)
        phase.tokens += 10
    assert second.seconds["distill"] >= first.seconds["distill"] + 0.03
    total = read_json(run.timings_path)["phases"]["distill"]["learner"]  # type: ignore[index]
    assert total["tokens"] == 20
    assert 0.06 <= total["seconds"] < 1.0


def test_a_stage_that_begins_again_counts_from_zero(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with Timings(run).stage("distill"):
        time.sleep(0.2)
    again = Timings(run)
    with again.stage("distill"):
        again.restart("distill")
        with again.phase("learner") as phase:
            phase.tokens += 1
    assert 0 < again.seconds["distill"] < 0.2


def test_time_counts_when_the_work_fails(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    timings = Timings(run)

    def fail() -> None:
        with timings.stage("distill"), timings.phase("learner"):
            time.sleep(0.02)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert Timings(run).seconds["distill"] >= 0.02
    assert timings.pop_step()["learner"] >= 0.02


def test_two_stages_at_once_count_each_for_itself(tmp_path: Path) -> None:
    timings = Timings(RunDirectory(tmp_path))

    def work(stage: str, seconds: float) -> None:
        with timings.stage(stage), timings.phase("learner", stage=stage):
            time.sleep(seconds)

    threads = [
        threading.Thread(target=work, args=("sft_teacher", 0.15)),
        threading.Thread(target=work, args=("sft_student", 0.02)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert timings.seconds["sft_teacher"] >= 0.15 > timings.seconds["sft_student"]
    assert set(timings.pop_step("sft_teacher")) == {"learner"}


def test_a_file_of_another_form_is_refused(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.timings_path.write_text('{"phases": {"distill": {}}}')
    with pytest.raises(RunStateError, match=r"timings\.json"):
        Timings(run)

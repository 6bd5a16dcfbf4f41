import threading
import time
from pathlib import Path

import pytest

from distill_system.errors import RunStateError
from distill_system.observe.run_directory import RunDirectory, read_json, write_json
from distill_system.observe.timings import Timings, read_pools
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
    timings = Timings(RunDirectory(tmp_path))
    for _ in range(2):
        with timings.phase("learner"):
            time.sleep(0.01)
    with timings.phase("publish"):
        pass
    step = timings.pop_step()
    assert set(step) == {"learner", "publish"}
    assert step["learner"] >= 0.02 > step["publish"]
    assert timings.pop_step() == {}


def test_a_resumed_run_goes_on_from_what_was_saved(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    first = Timings(run)
    with first.stage("distill"):
        with first.phase("learner"):
            time.sleep(0.03)
        first.add_activity({"learner": _stretch(10, 0.5)})
        first.save()
        saved = read_json(run.timings_path)["seconds"]["distill"]  # type: ignore[index]
        assert saved >= 0.03  # a run killed here keeps the time of the running stage
    second = Timings(run)
    with second.stage("distill"), second.phase("learner"):
        time.sleep(0.03)
    second.add_activity({"learner": _stretch(20, 0.5)})
    second.save()
    assert second.seconds["distill"] >= first.seconds["distill"] + 0.03
    assert second.tokens_per_second == {"learner": 30.0}
    assert 0.06 <= read_json(run.timings_path)["phases"]["distill"]["learner"] < 1.0  # type: ignore[index]


def test_a_stage_that_begins_again_counts_from_zero(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with Timings(run).stage("distill"):
        time.sleep(0.2)
    again = Timings(run)
    with again.stage("distill"):
        again.restart("distill")
        with again.phase("learner"):
            pass
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
    pools = read_pools(read_json(run.timings_path))
    assert (pools["learner"].seconds, pools["learner"].num_tokens) == (15.0, 21)
    assert pools["learner"].busy_share == pytest.approx(0.4)
    timings.restart("sft_teacher")
    timings.save()
    assert read_pools(read_json(run.timings_path))
    timings.restart("distill")
    timings.save()
    assert read_pools(read_json(run.timings_path)) == {}


def test_timings_from_before_pools_were_counted_are_read(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    write_json(run.timings_path, {"seconds": {"distill": 1.0}, "phases": {"distill": {}}})
    Timings(run).save()
    assert read_json(run.timings_path)["pools"] == {"distill": {}}
    bad = {"distill": {"a": {}}}
    write_json(
        run.timings_path, {"seconds": {"distill": 1.0}, "phases": {"distill": {}}, "pools": bad}
    )
    with pytest.raises(RunStateError, match=r"timings\.json: expected pools"):
        Timings(run)

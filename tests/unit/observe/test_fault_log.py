"""What was lost and what was done: written a line an event, told a line a loss."""

from __future__ import annotations

from distill_system.observe import FaultLog, RunDirectory, write_report
from distill_system.observe.fault_log import read_faults, tell_faults


def test_losses_are_counted_by_pool_and_told_with_what_followed(tmp_path):
    run = RunDirectory(tmp_path)
    with FaultLog(run, "distill", ["student_rollout", "teacher_scoring", "learner"]) as log:
        assert log.metrics() == {
            "faults/student_rollout": 0.0,
            "faults/teacher_scoring": 0.0,
            "faults/learner": 0.0,
        }
        log.step = 7
        log.lose("student_rollout-0", "it died <b>of\na long traceback")
        log.lose("learner-1", "it hangs")
        log.replace("student_rollout-0", "student_rollout-2", 12.34)
        log.restart("learner-0", 5.0, first=4)
        log.step = 9
        log.lose("student_rollout-2", "again")
        assert log.metrics()["faults/student_rollout"] == 2.0
        assert log.metrics()["faults/teacher_scoring"] == 0.0
    told = tell_faults(read_faults(run))
    assert [(each.step, each.worker, each.cause, each.done) for each in told] == [
        (7, "student_rollout-0", "it died <b>of", "replaced by student_rollout-2 after 12.3 s"),
        (7, "learner-1", "it hangs", "all ranks anew after 5.0 s, 3 steps made again"),
        (9, "student_rollout-2", "again", ""),
    ]
    write_report(run)
    page = run.report_path.read_text()
    assert "it died &lt;b&gt;of" in page
    assert "nothing before the run ended" in page


def test_a_run_without_losses_has_no_table_of_them(tmp_path):
    run = RunDirectory(tmp_path)
    assert read_faults(run) == []
    write_report(run)
    assert "Faults" not in run.report_path.read_text()

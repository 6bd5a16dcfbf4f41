"""The judge of broken runs finds what it is asked for; so does the reader of what was survived."""

from __future__ import annotations

import json

import pytest
from faults import Fault, Way, plan_faults, read_outcomes
from run_comparison import judge

from distill_system.observe import RunDirectory

STEPS = 3


@pytest.fixture
def make(tmp_path):
    """Writes a run's folder; `fed` and `losses` replace a step's own."""

    def write(name, *, fed=None, losses=None, weights=b"weights", score=0.5, seconds=1.0):
        run = RunDirectory(tmp_path / name)
        (run.path / "student").mkdir(parents=True)
        (run.path / "student/model.safetensors").write_bytes(weights)
        metrics, prompts = [], []
        for step in range(1, STEPS + 1):
            values = {
                "learner/loss": (losses or {}).get(step, float(step)),
                "seconds/step": seconds,
            }
            metrics.append({"time": 0.0, "stage": "distill", "step": step, "metrics": values})
            ids = (fed or {}).get(step, [f"p{step}", "q"])
            prompts.append({"stage": "distill", "step": step, "prompt_ids": {"on_policy": ids}})
        run.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in metrics))
        run.prompts_path.write_text("".join(json.dumps(row) + "\n" for row in prompts))
        run.evaluation_path("after").parent.mkdir()
        run.evaluation_path("after").write_text(json.dumps({"splits": {"test": score}}))
        return run

    return write


def test_runs_that_differ_by_the_clock_alone_are_the_same(make):
    assert judge(make("one"), make("other", seconds=9.0)).is_the_same


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"fed": {2: ["p2"]}}, {"lost_prompts": 1, "doubled_prompts": 0}),
        ({"fed": {2: ["p2", "q", "q"]}}, {"lost_prompts": 0, "doubled_prompts": 1}),
        # in another step than its own it is both
        ({"fed": {2: ["p3", "q"]}}, {"lost_prompts": 1, "doubled_prompts": 1}),
        ({"fed": {2: ["q", "p2"]}}, {"lost_prompts": 0, "equal_order": False}),
        ({"losses": {3: 3.0000001}}, {"equal_bytes": True}),
        ({"weights": b"other"}, {"equal_bytes": False}),
        ({"score": 0.4}, {"differing_evaluations": ["after"]}),
    ],
)
def test_what_a_fault_has_changed_is_found(make, change, found):
    verdict = judge(make("broken", **change), make("unbroken"))
    assert not verdict.is_the_same
    assert {name: getattr(verdict, name) for name in found} == found


def test_a_step_that_is_missing_or_stands_twice_is_found(make):
    broken, unbroken = make("broken"), make("unbroken")
    first, second, third = broken.metrics_path.read_text().splitlines(keepends=True)
    broken.metrics_path.write_text(first + third + third)
    assert judge(broken, unbroken).missing_steps == [2, 3]
    broken.metrics_path.write_text(first + second + third)
    assert judge(broken, unbroken).is_the_same


def _fault(*workers, way=Way.KILL):
    return Fault(way=way, pool=workers[0].rpartition("-")[0], workers=workers, step=4, time=100.0)


def _write_faults(run, *rows):
    names = ("time", "worker", "event", "seconds", "steps_again")
    fixed = {"stage": "distill", "step": 4, "cause": "a test"}
    lines = [json.dumps(fixed | dict(zip(names, row, strict=True))) for row in rows]
    run.faults_path.write_text("".join(line + "\n" for line in lines))


def test_seconds_count_from_the_fault_until_all_that_it_cost_is_replaced(make):
    run = make("run")
    _write_faults(
        run,
        (90.0, "teacher_rollout-0", "lost", None, 0),  # of a fault before
        (103.0, "teacher_rollout-1", "lost", None, 0),
        (104.0, "learner-0", "lost", None, 0),
        (110.0, "teacher_rollout-1", "replaced", 7.0, 0),
        (125.0, "learner-0", "restarted", 21.0, 3),
    )
    killed, cut, silent = read_outcomes(
        [
            _fault("teacher_rollout-1"),
            _fault("learner-1", "teacher_rollout-1", way=Way.CUT),  # all ranks stand for one
            _fault("student_rollout-0"),
        ],
        run,
    )
    assert (killed.noticed_after, killed.back_after, killed.steps_again) == (3.0, 10.0, 0)
    assert (cut.noticed_after, cut.back_after, cut.steps_again) == (3.0, 25.0, 3)
    assert (silent.noticed_after, silent.back_after) == (None, None)


def test_no_kind_of_fault_comes_again_before_all_others():
    pools, ways = ["student_rollout", "learner", "evaluation"], [Way.KILL, Way.STOP]
    planned = plan_faults(14, steps=60, pools=pools, ways=ways, seed=3)
    assert [each.step for each in planned] == sorted(each.step for each in planned)
    assert planned == plan_faults(14, steps=60, pools=pools, ways=ways, seed=3)
    kinds = [(each.pool, each.way) for each in planned]
    assert len(set(kinds[:6])) == len(set(kinds[6:12])) == 6
    assert all(0 < each.step < 59 for each in planned)

"""Equal budgets from what pilots cost, and runs in processes of their own that may fail."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import pytest
from tiny_families import save_family
from typer.testing import CliRunner

from distill_system.cli import app
from distill_system.config import dump_config, load_config
from distill_system.config.model import ModelConfig
from distill_system.config.recipes import recipe_path
from distill_system.errors import ConfigError, DataError, ModelError, RunStateError
from distill_system.observe import RunDirectory
from distill_system.observe.run_directory import write_json, write_text
from distill_system.stages.compare import (
    ComparisonRequest,
    _load_objectives,
    _load_teachers,
    _size_ratios,
    compare,
)
from distill_system.stages.pilot import PILOT_STEPS, plan_steps
from distill_system.stages.processes import TRAIN, Job, run_jobs

BROKEN = "data.held_out={type: jsonl, path: /no/where.jsonl}"
QUICKSTART = str(Path(__file__).parents[3] / "configs/quickstart.yaml")


def _config(tmp_path, name="ammd", *overrides):
    return load_config([QUICKSTART, recipe_path(name)], [f"runs_directory={tmp_path}", *overrides])


def _finish(run, **step_metrics):
    """A run that is done, each of its steps with these metrics; the first three are slow."""
    write_json(run.summary_path, {})
    write_json(run.evaluation_path("after"), {})
    first = {"held_out/cross_entropy": 1.0}
    lines = [{"time": 0.0, "stage": "distill", "step": 0, "metrics": first}]
    for step in range(1, PILOT_STEPS + 1):
        slow = 100.0 if step <= 3 else 1.0
        metrics = {name: value * slow for name, value in step_metrics.items()}
        lines.append({"time": 0.0, "stage": "distill", "step": step, "metrics": metrics})
    write_text(run.metrics_path, "".join(f"{json.dumps(line)}\n" for line in lines))


def _pilots(tmp_path):
    costs = {
        "ammd": (0.5, 600.0, 400.0),
        "reverse_kl_on_policy": (0.25, 500.0, 0.0),
        "sft": (0.1, 0.0, 0.0),
    }
    for name, (seconds, student, teacher) in costs.items():
        _finish(
            RunDirectory(tmp_path / "pilot" / name),
            **{
                "seconds/step": seconds,
                "sampled_tokens/student": student,
                "sampled_tokens/teacher": teacher,
            },
        )
    return {name: _config(tmp_path, name, "distill.steps=100") for name in costs}


def _plan(tmp_path, budget, value=None):
    configs = _pilots(tmp_path)
    steps, total, failed = plan_steps(configs, tmp_path, budget=budget, value=value, notify=print)
    assert failed == {}
    return steps, total


def test_equal_updates_are_the_same_steps_for_all(tmp_path):
    steps, value = _plan(tmp_path, "updates")
    assert set(steps.values()) == {100}
    assert value == 100.0
    assert set(_plan(tmp_path, "updates", 40)[0].values()) == {40}


def test_equal_seconds_give_the_cheap_objective_more_steps(tmp_path):
    steps, value = _plan(tmp_path, "seconds")
    assert steps == {"ammd": 100, "reverse_kl_on_policy": 200, "sft": 500}
    assert value == pytest.approx(50.0)


def test_equal_tokens_leave_what_samples_nothing_with_its_own_steps(tmp_path):
    steps, _ = _plan(tmp_path, "sampled_tokens", 30_000)
    assert steps == {"ammd": 30, "reverse_kl_on_policy": 60, "sft": 100}


def test_a_budget_of_less_than_a_step_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"expected enough for one step .* got 0\.2 seconds"):
        _plan(tmp_path, "seconds", 0.2)


def test_names_are_checked_before_anything_runs(tmp_path):
    for names, said in ((["ammd", "amd"], "did you mean"), (["sft", "sft"], "differ from one")):
        request = ComparisonRequest(
            paths=[QUICKSTART], overrides=[f"runs_directory={tmp_path}"], objectives=names
        )
        with pytest.raises(ConfigError, match=said):
            compare(request, notify=print)
    assert list(tmp_path.iterdir()) == []


def test_no_run_of_a_comparison_is_pushed_to_the_hub(tmp_path):
    request = ComparisonRequest(
        paths=[QUICKSTART], overrides=["hub={repository: a/b}"], objectives=["sft", "gkd"]
    )
    assert [config.hub for config in _load_objectives(request).values()] == [None, None]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--objectives", ""), "--objectives: expected names of methods"),
        (("--objectives", " , "), "--objectives: expected names of methods"),
        (("--objectives", "ammd", "--budget-value", "0"), "above 0 and at most 1e+12, got 0"),
        (("--objectives", "ammd", "--budget-value", "-3"), "above 0 and at most 1e+12, got -3"),
        (("--objectives", "ammd", "--budget-value", "inf"), "above 0 and at most 1e+12, got inf"),
        (("--objectives", "ammd", "--budget-value", "nan"), "above 0 and at most 1e+12, got nan"),
        (("--objectives", "ammd", "--budget-value", "1e300"), "at most 1e+12, got 1e+300"),
        (("--objectives", "ammd", "--budget-value", "0.5"), "a whole number of updates, got 0.5"),
    ],
)
def test_a_budget_or_a_list_of_nothing_is_refused_at_once(tmp_path, options, said):
    done = CliRunner().invoke(app, ["compare", QUICKSTART, f"runs_directory={tmp_path}", *options])
    assert done.exit_code == 1
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_of_which_every_run_failed_writes_its_tables_and_is_no_success(
    tmp_path, monkeypatch
):
    failed = {"sft/seed_0": "exit code 1; x.log ends with:\nDataError: no rows"}
    monkeypatch.setattr("distill_system.stages.compare.run_jobs", lambda *_, **__: failed)
    start = RunDirectory(tmp_path / "shared")
    monkeypatch.setattr("distill_system.stages.compare.train", lambda *_, **__: start)
    request = ComparisonRequest(
        paths=[QUICKSTART],
        overrides=[f"runs_directory={tmp_path}", "name=all"],
        objectives=["sft"],
        seeds=1,
    )
    with pytest.raises(
        RunStateError, match=r"all 1 runs failed, the first, sft/seed_0, with: Data"
    ):
        compare(request, notify=print)
    assert "DataError: no rows" in (tmp_path / "all/compare.md").read_text()


FAILING = """
import json, pathlib, sys
path, *resume = sys.argv[1:]
held_out = json.loads(pathlib.Path(path).read_text())["data"]["held_out"]["path"]
print("begun with", *resume, flush=True)
sys.exit(f"DataError: {held_out}: no such file")
"""


def _command(program):
    """In place of the train command, whose imports take seconds; without site-packages."""
    return [sys.executable, "-I", "-S", "-c", program]


def test_a_run_that_fails_is_told_and_what_is_done_is_skipped(tmp_path):
    missing = _config(tmp_path, "ammd", "name=broken", BROKEN)
    done = _config(tmp_path, "ammd", "name=done")
    _finish(RunDirectory(tmp_path / "done"))
    said = []
    jobs = [Job(key="a/done", config=done), Job(key="a/broken", config=missing)]
    failures = run_jobs(jobs, at_once=2, notify=said.append, command=_command(FAILING))
    assert said[0] == "2 runs, 1 of them done"
    assert said[1] == "[1/1] a/broken: failed: DataError: /no/where.jsonl: no such file"
    log = tmp_path / "broken.log"
    lines = ["begun with --resume auto", "DataError: /no/where.jsonl: no such file"]
    assert log.read_text().splitlines() == lines
    told = "\n".join([f"exit code 1; {log} ends with:", *lines])
    assert failures == {"a/broken": told}
    assert load_config([tmp_path / "broken.json"]) == missing


def test_a_teachers_evaluation_is_taken_from_a_run_of_the_same_seed(tmp_path):
    twin = RunDirectory(tmp_path / "twin")
    write_json(twin.evaluation_path("teacher"), {"measured": True})
    broken = _config(tmp_path, "ammd", "name=taker", BROKEN)
    job = Job(key="a/taker", config=broken, same_teacher=(tmp_path / "none", twin.path))
    run_jobs([job], at_once=1, notify=print, command=_command("raise SystemExit(0)"))
    assert json.loads(job.run.evaluation_path("teacher").read_text()) == {"measured": True}


def test_the_command_of_a_run_is_one_that_the_command_line_knows(tmp_path):
    assert TRAIN[1:3] == ("-m", "distill_system")
    said = CliRunner().invoke(app, [TRAIN[3], str(tmp_path / "none.json"), "--resume", "auto"])
    assert said.exit_code == 1
    assert "none.json" in said.output


def test_all_runs_tell_chats_the_day_on_which_the_comparison_began(tmp_path, monkeypatch):
    jobs: list[Job] = []

    def interrupted(asked, **how):
        jobs[:] = asked
        raise RunStateError("as by Ctrl-C")

    monkeypatch.setattr(
        "distill_system.stages.compare.train", lambda *_, **how: RunDirectory(tmp_path)
    )
    monkeypatch.setattr("distill_system.stages.compare.run_jobs", interrupted)
    request = ComparisonRequest(
        paths=[QUICKSTART], overrides=[f"runs_directory={tmp_path}"], objectives=["ammd"], seeds=2
    )
    with pytest.raises(RunStateError):
        compare(request, notify=print)
    assert [job.config.data.chat_date for job in jobs] == [date.today()] * 2
    plan = tmp_path / "quickstart/plan.json"
    written = json.loads(plan.read_text())
    written["config"]["data"]["chat_date"] = "2001-02-03"  # as if it had begun then
    plan.write_text(json.dumps(written))
    with pytest.raises(RunStateError):
        compare(request, notify=print)
    assert [job.config.data.chat_date for job in jobs] == [date(2001, 2, 3)] * 2
    plan.write_text("{")
    with pytest.raises(RunStateError, match=r"plan\.json is not JSON.*Remove it"):
        compare(request, notify=print)


def test_what_the_runs_will_read_is_read_before_they_are_given_a_start(tmp_path, monkeypatch):
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("a cluster was asked for"))
    request = ComparisonRequest(
        paths=(QUICKSTART,),
        overrides=(f"runs_directory={tmp_path}", BROKEN),
        objectives=("ammd",),
        seeds=1,
    )
    with pytest.raises(DataError, match=r"data\.held_out\.path='/no/where\.jsonl'"):
        compare(request, notify=print)


PARENT = """
import json, sys
from distill_system.config import load_config
from distill_system.stages.processes import Job, run_jobs
command = [sys.executable, "-I", "-S", "-c", sys.argv[2]]
job = Job(key="a/b", config=load_config([sys.argv[1]]))
run_jobs([job], at_once=1, notify=print, command=command)
"""
CHILD = """
import pathlib, signal, sys, time
mark = pathlib.Path(sys.argv[1])
def end(*_):
    mark.with_suffix(".ended").write_text("as if it had written a checkpoint")
    sys.exit()
signal.signal(signal.SIGTERM, end)
mark.with_suffix(".begun").write_text("")
time.sleep(120)
"""


def test_kill_9_of_a_comparison_lets_its_runs_end_as_by_a_signal_of_their_own(tmp_path):
    config = tmp_path / "given.json"
    config.write_text(dump_config(_config(tmp_path, "ammd", "name=child")))
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(config), CHILD])
    _wait_for(tmp_path / "child.begun")
    parent.kill()
    parent.wait()
    _wait_for(tmp_path / "child.ended")


def _wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.02)


def test_teachers_are_compared_under_one_objective(tmp_path):
    paths = [str(save_family(tmp_path / name, "llama")) for name in ("small", "large")]
    request = ComparisonRequest(
        paths=[QUICKSTART],
        overrides=["tokenizer={type: pretrained}"],
        objectives=["gkd"],
        teachers=paths,
    )
    configs = _load_teachers(request)
    assert [c.teacher.path for c in configs.values()] == paths
    assert list(configs) == ["small", "large"]
    assert all(c.teacher.sft is None and c.teacher.architecture is None for c in configs.values())
    assert len({c.distill.objective.type for c in configs.values()}) == 1
    student = {"student": ModelConfig(path=paths[0])}
    ratios = _size_ratios({name: c.model_copy(update=student) for name, c in configs.items()})
    assert ratios == {"small": 1.0, "large": 1.0}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"teachers": ["a/t", "b/t"]}, "last names differ"),
        ({"teachers": ["a/shared"]}, "from 'shared' and 'pilot'"),
        ({"teachers": ["a"], "objectives": ["gkd", "ammd"]}, "under one objective, got 2"),
    ],
)
def test_teachers_that_cannot_be_told_apart_are_refused(tmp_path, asked, said):
    request = ComparisonRequest(
        paths=[QUICKSTART], overrides=[f"runs_directory={tmp_path}"], **asked
    )
    with pytest.raises(ConfigError, match=said):
        compare(request, notify=print)
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_that_is_not_there_is_told_before_anything_starts(tmp_path):
    request = ComparisonRequest(
        paths=[QUICKSTART],
        overrides=[f"runs_directory={tmp_path}/runs", "tokenizer={type: pretrained}"],
        teachers=[str(tmp_path / "nowhere")],
    )
    with pytest.raises(ModelError, match="nowhere"):
        _load_teachers(request)

"""What `train` refuses or skips before it asks for any worker: no cluster stands in these tests."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import ray
from typer.testing import CliRunner

from distill_system.cli import app
from distill_system.config import dump_config, load_config
from distill_system.errors import DataError, DistillError, RunStateError
from distill_system.learner import describe_file
from distill_system.observe import RunDirectory
from distill_system.observe.run_lock import locked
from distill_system.offline.generate import GenerateRequest, generate
from distill_system.stages.compare import ComparisonRequest, compare
from distill_system.stages.train import STAGES, train

SFT = "{steps: 1, optimizer: {learning_rate: 0.1}}"
ROWS = "{type: jsonl, path: rows.jsonl}"


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    def refuse(*_, **__):
        pytest.fail("a cluster was asked for")

    monkeypatch.setattr(ray, "init", refuse)


def _made(config, *names):
    run = RunDirectory(f"{config.runs_directory}/{config.name}")
    for name in names:
        (run.path / name).mkdir(parents=True)
    return run


def test_distillation_alone_says_which_stage_comes_first(configure):
    config = configure(f"data.student_sft={ROWS}", f"student.sft={SFT}")
    with pytest.raises(RunStateError, match=r"run/student_sft, which does not exist.*system sft`"):
        train(config, stages=("distill",))


def test_evaluation_alone_says_which_stage_comes_first(configure):
    with pytest.raises(RunStateError, match=r"run/student, which does not exist.*system distill`"):
        train(configure(), stages=("evaluate", "report"))


def test_a_report_of_nothing_is_refused_and_makes_no_folder(configure, tmp_path):
    with pytest.raises(RunStateError, match=r"holds no run to report on: check name"):
        train(configure(), stages=("report",))
    assert not (tmp_path / "runs").exists()


def test_a_checkpoint_that_nobody_wants_to_resume_is_told_at_once(configure):
    config = configure()
    step = _made(config, "checkpoints/distill/step_000005").path / "checkpoints/distill/step_000005"
    (step / "state.json").write_text('{"step": 5, "state": {}, "metrics": {}}')
    files = {"state.json": describe_file(step / "state.json")._asdict()}
    (step / "manifest.json").write_text(json.dumps({"files": files}))
    with pytest.raises(RunStateError, match=r"distill has a checkpoint at step 5 .*--resume"):
        train(config)


@pytest.mark.parametrize("key", ["prompts", "held_out", "evaluation.test"])
def test_data_of_every_later_stage_is_read_before_the_first_one_starts(configure, tmp_path, key):
    (tmp_path / "empty.jsonl").write_text("")
    config = configure(
        f"data.student_sft={ROWS}",
        f"student.sft={SFT}",
        f"data.{key}={{type: jsonl, path: empty.jsonl}}",
    )
    with pytest.raises(DataError, match=rf"data\.{key}: the data set is empty"):
        train(config)


def test_the_sft_stage_alone_does_not_read_the_prompts(configure, tmp_path):
    """They may be written by then: only what a stage needs must exist."""
    config = configure(
        f"data.student_sft={ROWS}",
        f"student.sft={SFT}",
        "data.prompts={type: jsonl, path: not_yet.jsonl}",
    )
    with pytest.raises(pytest.fail.Exception, match="a cluster was asked for"):
        train(config, stages=("sft",))
    with pytest.raises(DataError, match=r"data\.prompts\.path='not_yet\.jsonl'"):
        train(config, stages=STAGES)


def test_fine_tuning_that_other_runs_follow_reads_what_they_will_read(configure):
    """A comparison of runs whose prompts are refused must not spend an hour on their start."""
    config = configure(
        f"data.student_sft={ROWS}",
        f"student.sft={SFT}",
        "data.prompts={type: jsonl, path: not_there.jsonl}",
    )
    with pytest.raises(DataError, match=r"data\.prompts\.path='not_there\.jsonl'"):
        train(config, stages=("sft",), followed_by=("distill", "evaluate"))


def test_a_finished_run_asks_for_no_worker_and_writes_its_report_anew(configure):
    config = configure()
    run = _made(config, "student", "evaluations")
    run.config_path.write_text(json.dumps(config.model_dump(mode="json")))
    assert load_config([run.config_path]) == config
    for label in ("before", "after"):
        form = {"label": label, "step": 3, "splits": {}, "distances": None}
        run.evaluation_path(label).write_text(json.dumps(form))
    before = run.config_path.stat().st_mtime_ns
    assert train(config).path == run.path
    assert run.report_path.exists()
    assert json.loads(run.summary_path.read_text())["step"] == 3
    assert run.config_path.stat().st_mtime_ns == before
    assert not run.environment_path.exists(), "what ran is not what reports"


SMALL = [
    f"pools.{pool}.cpus=0.1"
    for pool in ("learner", "student_rollout", "teacher_rollout", "teacher_scoring")
]


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        ("student.path=runs/of/nobody", "no such folder"),
        ("teacher.path=nowhere.gguf", "found none"),
        ("data.prompts={type: jsonl, path: nowhere.jsonl}", r"nowhere\.jsonl"),
        ("data.max_prompt_tokens=100000", "reads at most 128 tokens"),
        ("pools.learner.cpus=100000", "pools ask for"),
    ],
)
def test_whatever_is_refused_before_the_cluster_leaves_nothing(configure, tmp_path, mistake, told):
    with pytest.raises(DistillError, match=told):
        train(configure(*SMALL, mistake))
    assert not (tmp_path / "runs").exists()


def test_so_does_a_generation_that_is_refused(configure, tmp_path):
    config = configure("data.prompts={type: jsonl, path: nowhere.jsonl}")
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        generate(GenerateRequest(config=config, out=tmp_path / "store"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "runs/run/metrics.jsonl"),
        PermissionError(errno.EACCES, "Permission denied", "rows.jsonl"),
    ],
)
def test_an_error_of_the_file_system_is_one_message(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("distill_system.config.load_config", fail)
    answer = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml")])
    assert answer.exit_code == 1
    assert "Traceback" not in answer.output
    assert type(error).__name__ in answer.stderr
    assert f"{error.strerror}: {error.filename!r}. Make room" in answer.stderr


def _compare(config):
    request = ComparisonRequest(paths=[json.loads(dump_config(config))], objectives=["gkd"])
    compare(request, notify=print)


@pytest.mark.parametrize(
    "command",
    [
        train,
        lambda config: train(config, resume=True),
        lambda config: train(config, stages=("report",)),
        lambda config: train(config, stages=("evaluate", "report")),
        lambda config: generate(GenerateRequest(config=config, out=Path("store"))),
        _compare,
    ],
)
def test_no_command_changes_a_folder_in_which_another_writes(configure, command):
    config = configure()
    run = _made(config, "tokenizer")
    run.config_path.write_text("{}")
    run.metrics_path.write_text('{"a row": "of the run that goes on"}\nhalf')
    with locked(run):
        before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
        with pytest.raises(RunStateError, match=r"runs/run is in use: process .*Nothing was chang"):
            command(config)
        assert before == {path: path.read_bytes() for path in before}
        assert {*run.path.rglob("*")} == {*before, run.tokenizer_directory}


def test_the_folder_is_held_until_the_command_ends(configure, monkeypatch):
    config = configure()
    run = _made(config, "student", "evaluations")
    held = []

    def look(_):
        with pytest.raises(RunStateError, match="is in use"):
            train(config, stages=("report",))
        held.append(True)

    run.config_path.write_text(dump_config(config))
    monkeypatch.setattr("distill_system.stages.train.write_report", look)
    train(config, stages=("report",))
    assert held == [True]
    assert not run.lock_path.exists()

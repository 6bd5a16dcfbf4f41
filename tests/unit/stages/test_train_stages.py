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
from distill_system.errors import DataError, DistillError, ResourceError, RunStateError
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
        if name == "student":
            (run.path / name / "config.json").write_text("{}")
            (run.path / name / "model.safetensors").write_text("")
    run.path.mkdir(parents=True, exist_ok=True)
    run.config_path.write_text(dump_config(config))
    return run


def _write_checkpoint(run, name, **state):
    """A checkpoint of distillation as far as it is looked at before workers start."""
    step = run.checkpoints_directory / "distill" / name
    (step / "model").mkdir(parents=True)
    (step / "model/weights").write_text("weights")
    (step / "state.json").write_text(json.dumps({"state": {}, "metrics": {}, **state}))
    names = ("state.json", "model/weights")
    files = {name: describe_file(step / name)._asdict() for name in names}
    (step / "manifest.json").write_text(json.dumps({"files": files}))
    return step


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
    _write_checkpoint(_made(config), "step_000002", step=2)
    with pytest.raises(RunStateError, match=r"distill has a checkpoint at step 2 .*--resume"):
        train(config)


def _walk(**position):
    walk = {"epoch": 0, "position": 2, "num_prompts": 12, **position}
    return {"sources": {"prompts": walk}, "returned": []}


@pytest.mark.parametrize(
    ("name", "state", "said"),
    [
        ("step_000003", {"step": 2}, r"step_000003/state\.json is of step 2: the folder has an"),
        ("step_000002", {"step": -2}, r"step: Input should be greater than or equal to 0"),
        ("step_000002", {"step": "2"}, r"state\.json, step: .* valid integer, got '2'"),
        (
            "step_000002",
            {"step": 2, "metrics": [1]},
            r"state\.json, metrics: .* be an object, got \[1\]",
        ),
        ("step_000400", {"step": 400}, r"step_000400 is not of this run: distill has 3 steps"),
        ("step_abc", {"step": 2}, r"step_abc: expected a folder of a checkpoint such as step_"),
        (
            "step_000002",
            {"step": 2, "state": {"streams": {"student": _walk(position=-1)}}},
            r"state\.json: no position in the walk .*prompts\.position: .*got -1",
        ),
        (
            "step_000002",
            {"step": 2, "state": {"streams": {"teacher": _walk(position=13)}}},
            r"no position in the walk over the prompts: beyond the last of 12",
        ),
    ],
)
def test_a_checkpoint_that_is_not_this_runs_is_refused_before_any_worker(
    configure, name, state, said
):
    config = configure()
    _write_checkpoint(_made(config), name, **state)
    with pytest.raises(RunStateError, match=said):
        train(config, resume=True)


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        (b"\xff\xfe", "manifest.json is not JSON"),
        (b'{"files": []}', "manifest.json, files: Input should be an object"),
        (b'{"files": {"state.json": {"num_bytes": 3}}}', "crc32: Field required"),
        (b'{"files": {"state.json": {"num_bytes": 3, "crc32": 1}}}', "does not name state.json"),
        (
            b'{"files": {"../config.json": {"num_bytes": 3, "crc32": 1}}}',
            r"a file outside of its folder, '\.\./config\.json'",
        ),
    ],
)
def test_a_manifest_of_another_form_is_refused_before_any_worker(configure, manifest, said):
    config = configure()
    step = _write_checkpoint(_made(config), "step_000002", step=2)
    (step / "manifest.json").write_bytes(manifest)
    with pytest.raises(RunStateError, match=rf"step_000002 is damaged: .*{said}"):
        train(config, resume=True)


@pytest.mark.parametrize("name", ["student", "checkpoints"])
def test_work_without_a_configuration_is_not_gone_on_with(configure, name):
    config = configure()
    run = _made(config, name)
    run.config_path.unlink()
    with pytest.raises(RunStateError, match=rf"holds work \({name}\) and no config\.json"):
        train(config, resume=True)
    assert not run.config_path.exists()


def test_a_teachers_evaluation_that_a_comparison_has_copied_is_no_work(configure):
    config = configure("pools.learner.cpus=4000")
    run = _made(config, "evaluations")
    run.config_path.unlink()
    run.evaluation_path("teacher").write_text("{}")
    with pytest.raises(RunStateError, match=r"evaluations/teacher\.json, step: Field required"):
        train(config)


@pytest.mark.parametrize("made", [[], ["config.json"], ["model.safetensors"]])
def test_a_folder_without_a_model_is_no_finished_run(configure, made):
    config = configure()
    run = _made(config)
    run.student_directory.mkdir()
    for name in made:
        (run.student_directory / name).write_text("{}")
    with pytest.raises(RunStateError, match=r"run/student: expected a model that this run expor"):
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

    monkeypatch.setattr("distill_system.stages.train.write_report", look)
    train(config, stages=("report",))
    assert held == [True]
    assert not run.lock_path.exists()


def test_a_cluster_that_is_not_there_is_told_before_data_are_read(configure, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    config = configure("data.prompts.path=gone.jsonl")
    with pytest.raises(ResourceError, match=r"no Ray cluster answers at RAY_ADDRESS=127\.0"):
        train(config)


def test_resume_is_refused_where_there_is_no_run_and_auto_goes_on(configure, tmp_path):
    config = configure("data.prompts.path=gone.jsonl")
    with pytest.raises(RunStateError, match=r"nothing to go on from, .*/run holds no run.*auto"):
        train(config, resume=True)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        train(config, resume="auto")


def test_resume_says_which_stage_has_no_checkpoint(configure):
    config = configure("data.prompts.path=gone.jsonl")
    _made(config, "tokenizer").config_path.write_text(dump_config(config))
    said: list[str] = []
    with pytest.raises(DistillError):
        train(config, resume=True, notify=said.append)
    assert [line for line in said if "checkpoint" in line] == [
        f"distill: no checkpoint in {config.runs_directory}/run/checkpoints/distill, it begins anew"
    ]
    said.clear()
    with pytest.raises(DistillError):
        train(config, resume="auto", notify=said.append)
    assert not any("checkpoint" in line for line in said)

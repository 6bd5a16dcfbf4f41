"""A curriculum before any worker starts, and its report from what its stages have written."""

from __future__ import annotations

import json

import pytest
import ray
from typer.testing import CliRunner

from distill_system.cli import app
from distill_system.config import load_stages
from distill_system.errors import ConfigError, DataError, RunStateError
from distill_system.observe import RunDirectory, write_curriculum
from distill_system.observe.run_directory import write_json, write_text
from distill_system.stages import curriculum as module
from distill_system.stages.curriculum import train_all
from distill_system.stages.train import STAGES

POOLS = ("student_rollout", "teacher_rollout", "teacher_scoring", "learner")
FEW_CPUS = f"pools={{{', '.join(f'{name}: {{cpus: 0.2}}' for name in POOLS)}}}"


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    def refuse(*_, **__):
        pytest.fail("a cluster was asked for")

    monkeypatch.setattr(ray, "init", refuse)


def test_data_of_a_later_stage_is_looked_at_before_the_first_starts(configure, tmp_path):
    config = configure(
        "curriculum=[{name: a}, {name: b, data: {prompts: {type: jsonl, path: none.jsonl}}}]"
    )
    with pytest.raises(DataError, match=r"curriculum, stage 'b': .*none\.jsonl"):
        train_all(config)
    assert not (tmp_path / "runs").exists(), "a refusal leaves nothing"


def test_stages_are_trained_in_order_each_resumed_where_it_stands(configure, monkeypatch):
    config = configure("curriculum=[{name: a}, {name: b, teacher: previous}]", FEW_CPUS)
    called = []

    def train(given, *, resume, stages, **_):
        called.append((given.name, resume, stages))
        run = RunDirectory(f"{given.runs_directory}/{given.name}")
        write_text(run.config_path, "{}")
        return run

    monkeypatch.setattr(module, "train", train)
    last = train_all(config, resume="auto")
    assert last.path.name == "2_b"
    assert called == [("1_a", "auto", STAGES), ("2_b", "auto", STAGES)]
    assert (last.path.parent / "report.html").exists()


def test_going_on_with_nothing_is_refused(configure):
    with pytest.raises(RunStateError, match="nothing to go on from"):
        train_all(configure("curriculum=[{name: a}]"), resume=True)


@pytest.mark.parametrize(
    "command",
    ["sft", "distill", "generate", "select", "compare", "manifests"],
)
def test_commands_for_one_run_say_what_they_take_instead(tmp_path, configure, command):
    configure()
    options = {
        "compare": ["--objectives", "gkd"],
        "manifests": ["--image", "i", "--storage-claim", "c"],
        "generate": ["--out", str(tmp_path / "store")],
        "select": ["--reference", "r", "--out", str(tmp_path), "--set", "student_sft"],
    }.get(command, [])
    given = ["curriculum=[{name: a}]", "data.student_sft={type: jsonl, path: rows.jsonl}"]
    result = CliRunner().invoke(app, [command, str(tmp_path / "run.yaml"), *given, *options])
    assert result.exit_code == 1
    assert "is for one run. Give curriculum=[], or the configuration of one" in result.output


def test_plan_looks_at_every_stage(tmp_path, configure):
    configure()
    stages = "curriculum=[{name: a}, {name: b, teacher: previous, distill: {steps: 1}}]"
    result = CliRunner().invoke(app, ["plan", str(tmp_path / "run.yaml"), stages, FEW_CPUS])
    assert result.exit_code == 0, result.output
    assert "1_a" in result.output
    assert "2_b" in result.output
    wrong = "curriculum=[{name: a}, {name: b, data: {held_out: {type: jsonl, path: no.jsonl}}}]"
    result = CliRunner().invoke(app, ["plan", str(tmp_path / "run.yaml"), wrong, FEW_CPUS])
    assert result.exit_code == 1
    assert "no.jsonl" in result.output


def _evaluate(run, label, step, means):
    scores = {"exact_match_greedy": {"mean": sum(means) / len(means), "stderr": 1.0}}
    split = {
        "num_examples": len(means),
        "prompt_ids": [f"test:{at}" for at in range(len(means))],
        "scores": scores,
        "per_example": {"exact_match_greedy": means},
        "shown": [],
        "bootstrap": {},
    }
    distances = {"cross_entropy": 2.0 - 0.1 * step, "on_policy": 1.0, "off_policy": 1.0}
    form = {"label": label, "step": step, "time": 0.0, "weight_version": step}
    write_json(
        run.evaluation_path(label), {**form, "distances": distances, "splits": {"test": split}}
    )


def test_one_report_has_the_scores_after_every_stage(configure, tmp_path):
    config = configure("curriculum=[{name: a}, {name: b, teacher: previous}, {name: later}]")
    stages = {
        each.name: RunDirectory(f"{each.config.runs_directory}/{each.config.name}")
        for each in load_stages(config)
    }
    for each, before, after in zip(
        load_stages(config), ([0, 0], [0, 100]), ([0, 100], [100, 100]), strict=False
    ):
        write_text(stages[each.name].config_path, each.config.model_dump_json())
        _evaluate(stages[each.name], "before", 0, before)
        _evaluate(stages[each.name], "after", 3, after)
    run = RunDirectory(tmp_path / "runs" / "run")
    write_curriculum(run, stages)
    summary = json.loads(run.summary_path.read_text())
    assert [stage["stage"] for stage in summary["stages"]] == ["a", "b"]
    scores = [stage["scores"]["test"]["exact_match_greedy"] for stage in summary["stages"]]
    assert [(score["before"], score["after"]) for score in scores] == [(0, 50), (50, 100)]
    page = run.report_path.read_text()
    assert "3 stages, 2 of them begun" in page
    assert 'href="2_b/report.html"' in page
    assert "1_a/student" in page, "the teacher of the second stage"


def test_a_stage_cannot_be_the_folder_of_a_model(configure):
    """Names of folders are numbered: a stage may be called like a file of a run."""
    names = [each.config.name for each in load_stages(configure("curriculum=[{name: student}]"))]
    assert names == ["1_student"]
    with pytest.raises(ConfigError):
        configure("curriculum=[{name: a}, {name: a}]")

from __future__ import annotations

import json

import pytest

from distill_system.errors import RunStateError
from distill_system.observe import PromptLog, RunDirectory
from distill_system.observe.metrics import read_prompts


def _fill(run, steps):
    with PromptLog(run) as log:
        for step in steps:
            log.log("distill", step, {"on_policy": [f"prompts:{step}", "prompts:x"]})


def test_each_step_is_one_line_with_the_prompts_of_each_stream(tmp_path):
    run = RunDirectory(tmp_path / "run")
    assert read_prompts(run) == []
    with PromptLog(run) as log:
        log.log("sft_student", 0, {"off_policy": ["rows:3", "rows:1"]})
        log.log("distill", 1, {"on_policy": ["prompts.ä:0"], "off_policy": []})
        lines = [json.loads(line) for line in run.prompts_path.read_text().splitlines()]
    assert lines == [
        {"stage": "sft_student", "step": 0, "prompt_ids": {"off_policy": ["rows:3", "rows:1"]}},
        {"stage": "distill", "step": 1, "prompt_ids": {"on_policy": ["prompts.ä:0"]}},
    ]


def test_a_resume_takes_back_what_came_after_the_checkpoint_of_its_own_stage(tmp_path):
    run = RunDirectory(tmp_path)
    _fill(run, range(5))
    with PromptLog(run) as log:
        log.log("sft_student", 9, {"off_policy": ["rows:1"]})
        log.truncate_after("distill", 2)
        log.log("distill", 3, {"on_policy": ["again"]})
    assert [(row.stage, row.step) for row in read_prompts(run)] == [
        ("distill", 0),
        ("distill", 1),
        ("distill", 2),
        ("sft_student", 9),
        ("distill", 3),
    ]
    assert read_prompts(run)[-1].prompt_ids == {"on_policy": ["again"]}


def test_a_half_written_line_goes_when_the_log_is_opened_again(tmp_path):
    run = RunDirectory(tmp_path)
    _fill(run, range(2))
    whole = run.prompts_path.read_text()
    run.prompts_path.write_text(whole + '{"stage": "distill", "st')
    assert len(read_prompts(run)) == 2
    with PromptLog(run):
        assert run.prompts_path.read_text() == whole


def test_a_line_of_something_else_is_named(tmp_path):
    run = RunDirectory(tmp_path)
    run.prompts_path.write_text('{"stage": "distill"}\n')
    with pytest.raises(
        RunStateError, match=r"prompts\.jsonl, line 1, step: Field requi.*delete that"
    ):
        read_prompts(run)

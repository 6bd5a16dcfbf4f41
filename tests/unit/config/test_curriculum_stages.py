"""Stages of a curriculum as ordinary runs: what each starts from, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from distill_system.config import RunConfig, dump_config, load_config, load_stages, planned_runs
from distill_system.config.data import PretrainedTokenizer
from distill_system.errors import ConfigError
from distill_system.observe import RunDirectory

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
KL = {"type": "forward_kl"}
SFT = {"steps": 3, "optimizer": {"learning_rate": 1e-3}}


def _load(tmp_path: Path, *stages: dict[str, Any], **keys: Any) -> RunConfig:
    layer = {"curriculum": list(stages), "runs_directory": str(tmp_path), "name": "all", **keys}
    return load_config([QUICKSTART, layer])


def _runs(tmp_path: Path, *stages: dict[str, Any], **keys: Any) -> list[RunConfig]:
    return [stage.config for stage in load_stages(_load(tmp_path, *stages, **keys))]


def _folder(run: RunConfig) -> RunDirectory:
    return RunDirectory(Path(run.runs_directory) / run.name)


def test_a_stage_starts_from_the_student_and_the_teacher_of_the_one_before(tmp_path):
    first, second, third = _runs(
        tmp_path, {"name": "a"}, {"name": "b"}, {"name": "c", "distill": {"steps": 7}}
    )
    assert [run.name for run in (first, second, third)] == ["1_a", "2_b", "3_c"]
    assert first.student == load_config([QUICKSTART]).student
    for run, before in ((second, first), (third, second)):
        assert run.student.path == str(_folder(before).student_directory)
        assert run.teacher.path == str(_folder(first).teacher_directory), "tuned once"
        assert run.student.sft is run.teacher.sft is None
        assert isinstance(run.tokenizer, PretrainedTokenizer)
        assert run.tokenizer.path == str(_folder(first).tokenizer_directory)
    assert [run.distill.steps for run in (first, second, third)] == [220, 220, 7]
    assert [run.seed for run in (first, second, third)] == [0, 1, 2], "other prompts come first"


def test_a_stage_that_fine_tunes_goes_on_from_what_it_was_left(tmp_path):
    first, second, third = _runs(
        tmp_path,
        {"name": "a"},
        {"name": "b", "teacher": {"sft": SFT}, "student": {"sft": SFT}},
        {"name": "c"},
    )
    assert second.teacher.path == str(_folder(first).teacher_directory)
    assert second.student.path == str(_folder(first).student_directory)
    assert second.teacher.sft is not None
    assert third.teacher.path == str(_folder(second).teacher_directory)
    assert third.student.path == str(_folder(second).student_directory)


def test_models_may_be_those_that_an_earlier_stage_left(tmp_path):
    *_, third, fourth = _runs(
        tmp_path,
        {"name": "a"},
        {"name": "b", "teacher": "previous", "student": "initial"},
        {"name": "c", "teacher": "previous"},
        {"name": "d", "teacher": "a", "student": "b"},
    )
    folders = [RunDirectory(tmp_path / "all" / name) for name in ("1_a", "2_b", "3_c")]
    second = _runs(tmp_path, {"name": "a"}, {"name": "b", "student": "initial"})[1]
    assert second.student.path == str(folders[0].student_sft_directory)
    assert third.teacher.path == third.student.path == str(folders[1].student_directory)
    assert fourth.teacher.path == str(folders[0].student_directory)
    assert fourth.student.path == str(folders[1].student_directory)


def test_a_model_that_is_written_out_replaces_the_one_that_was_left(tmp_path):
    second = _runs(tmp_path, {"name": "a"}, {"name": "b", "teacher": {"path": "some/other"}})[1]
    assert second.teacher.model_dump(exclude_defaults=True) == {"path": "some/other"}


def test_weights_are_rounded_and_pushed_at_the_end_alone(tmp_path):
    first, last = _runs(
        tmp_path,
        {"name": "a"},
        {"name": "b"},
        export={"dtype": "bfloat16"},
        hub={"repository": "me/mine"},
    )
    assert (first.export_dtype, last.export_dtype) == ("float32", "bfloat16")
    assert first.hub is None
    assert last.hub is not None


def test_what_is_planned_has_the_shapes_of_what_will_be_there(tmp_path):
    base = load_config([QUICKSTART])
    config = _load(tmp_path, {"name": "a"}, {"name": "b"}, {"name": "c", "teacher": "previous"})
    first, second, third = planned_runs(config)
    assert first.teacher == base.teacher
    assert second.teacher == base.teacher.model_copy(update={"sft": None})
    assert third.teacher == base.student.model_copy(update={"sft": None})
    assert {run.tokenizer.type for run in (first, second, third)} == {"embedded"}
    assert planned_runs(base) == [base]


def test_the_resolved_configuration_has_the_same_stages(tmp_path):
    config = _load(
        tmp_path,
        {"name": "a", "distill": {"objective": {"type": "token_matching", "off_policy": KL}}},
        {"name": "b", "teacher": {"sft": SFT}, "data": {"prompts": {"num_examples": 9}}},
    )
    again = tmp_path / "config.json"
    again.write_text(dump_config(config))
    assert load_stages(load_config([again])) == load_stages(config)


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([{"name": "b", "distill": {"stepz": 1}}], r"stage 'b': .*\n.*distill\.stepz .*'steps'"),
        ([{"name": "b", "distill": {"steps": 0}}], r"stage 'b': .*\n.*distill\.steps .*got 0"),
        (
            [{"name": "b", "teacher": "z"}],
            r"stage 'b': teacher .*\(initial, a, previous\), got 'z'",
        ),
        ([{"name": "b", "tokenizer": {"type": "embedded"}}], r"stage 'b': tokenizer .*the whole"),
        ([{"name": "a"}], r"curriculum .*each stage needs a name of its own"),
        ([{"distill": {"steps": 1}}], r"curriculum .*each stage needs a name of its own"),
        ([{"name": "previous"}], r"curriculum .*other than previous and initial"),
        ([{"name": "../b"}], r"curriculum .*letters, digits"),
    ],
)
def test_a_wrong_stage_is_refused_with_its_name_and_its_key(tmp_path, stages, said):
    with pytest.raises(ConfigError, match=said):
        _load(tmp_path, {"name": "a"}, *stages)


def test_the_message_says_in_which_line_of_the_file(tmp_path):
    file = tmp_path / "stages.yaml"
    file.write_text(yaml.safe_dump({"curriculum": [{"name": "a"}, {"name": "b", "seed": -1}]}))
    with pytest.raises(ConfigError, match=r"stage 'b'.*\n.*seed \(.*stages\.yaml:4\)"):
        load_config([QUICKSTART, file])


def test_the_first_stage_has_no_previous_student(tmp_path):
    with pytest.raises(ConfigError, match=r"'a': teacher .*none, it is the first stage"):
        _load(tmp_path, {"name": "a", "teacher": "previous"})

from __future__ import annotations

import json
import shutil
from datetime import date
from pathlib import Path

import pytest

from distill_system.config import load_config
from distill_system.errors import ModelError, RunStateError
from distill_system.run.preparation import (
    open_run,
    prepare_tokenizer,
    record_start,
    refusal_leaves_nothing,
    with_chat_date,
)

QUICKSTART = Path(__file__).parents[3] / "configs/quickstart.yaml"


def _config(tmp_path, *overrides):
    return load_config([QUICKSTART], [f"runs_directory={tmp_path}", *overrides])


def _start(tmp_path, *overrides):
    config = _config(tmp_path, *overrides)
    run = open_run(config)
    record_start(config, run)
    return run


def test_what_runs_is_written_down_before_anything_is_made(tmp_path):
    run = _start(tmp_path, "seed=4")
    assert run.path == tmp_path / "quickstart"
    assert json.loads(run.config_path.read_text())["seed"] == 4
    environment = json.loads(run.environment_path.read_text())
    assert environment["seeds"] == {"seed": 4}
    assert environment["versions"]["torch"].startswith("2.13")


def test_work_of_another_configuration_is_not_gone_on_with(tmp_path):
    run = _start(tmp_path)
    run.teacher_directory.mkdir()
    with pytest.raises(RunStateError) as caught:
        open_run(_config(tmp_path, "seed=1", "distill.objective.on_policy_weight=0.25"))
    said = str(caught.value)
    assert "seed: 0 -> 1" in said
    assert "distill.objective.on_policy_weight: 0.5 -> 0.25" in said
    assert "name=" in said


@pytest.mark.parametrize("made", ["student_sft", "student", "checkpoints", "evaluations"])
def test_whatever_was_learned_or_measured_is_work(tmp_path, made):
    (_start(tmp_path).path / made).mkdir()
    with pytest.raises(RunStateError, match="seed: 0 -> 1"):
        open_run(_config(tmp_path, "seed=1"))


def test_what_changes_nothing_learned_may_change(tmp_path):
    run = _start(tmp_path)
    run.teacher_directory.mkdir()
    changed = ("pools.learner.count=2", "deadlines.call_seconds=9", "distill.keep_checkpoints=5")
    assert open_run(_config(tmp_path, *changed)).path == run.path


@pytest.mark.parametrize(
    "change",
    [
        "deadlines.call_seconds=9",
        "pools.student_rollout.cpus=0.5",
        "scaling.look_every_seconds=77",
        "cluster.dashboard=true",
        "data.cache_directory=elsewhere",
        "data.max_memory_mebibytes=7",
        "evaluation.num_examples_during=7",
        "learner.activation_checkpointing=true",
        "learner.max_tokens_per_microbatch=500",
        "learner.offload=true",
        "learner.shard_ranks=all",
        "distill.measure_every=10",
        "distill.evaluate_every=40",
        "distill.checkpoint_every=3",
        "distill.keep_checkpoints=5",
        "distill.keep_best={metric: held_out/cross_entropy, mode: min}",
    ],
)
def test_where_and_how_often_may_change_in_a_run_that_has_work(tmp_path, change):
    run = _start(tmp_path)
    run.teacher_directory.mkdir()
    assert open_run(_config(tmp_path, change)).path == run.path
    assert run.teacher_directory.exists()


@pytest.mark.parametrize(
    "change",
    [
        "learner.compute_dtype=bfloat16",
        "distill.steps=221",
        "rollout.sampling.temperature=0.5",
        "distill.optimizer.learning_rate=1.0",
        "data.max_prompt_tokens=50",
    ],
)
def test_what_is_learned_may_not_change_in_a_run_that_has_work(tmp_path, change):
    run = _start(tmp_path)
    run.teacher_directory.mkdir()
    key, _, value = change.partition("=")
    with pytest.raises(RunStateError, match=rf"another configuration: {key}: .* -> .*{value}"):
        open_run(_config(tmp_path, change))


def test_a_run_that_was_moved_with_its_folder_goes_on(tmp_path):
    run = _start(tmp_path / "first")
    run.teacher_directory.mkdir()
    (tmp_path / "first").rename(tmp_path / "second")
    assert open_run(_config(tmp_path / "second")).teacher_directory.exists()


def test_an_empty_folder_takes_any_configuration(tmp_path):
    _start(tmp_path)
    assert open_run(_config(tmp_path, "seed=9")).path == tmp_path / "quickstart"


def test_the_tokenizer_is_made_once(tmp_path):
    config = _config(tmp_path)
    run = _start(tmp_path)
    first = prepare_tokenizer(config, run)
    written = (run.tokenizer_directory / "tokenizer.json").stat().st_mtime_ns
    second = prepare_tokenizer(config, run)
    assert first.get_vocab() == second.get_vocab()
    assert (run.tokenizer_directory / "tokenizer.json").stat().st_mtime_ns == written


def test_a_tokenizer_that_served_nothing_goes_with_its_configuration(tmp_path):
    prepare_tokenizer(_config(tmp_path), _start(tmp_path))
    run = open_run(_config(tmp_path, "data.max_prompt_tokens=50"))
    assert not run.tokenizer_directory.exists()


def test_a_look_at_a_run_makes_no_folder(tmp_path):
    assert not open_run(_config(tmp_path)).path.exists()


def test_a_damaged_configuration_is_told(tmp_path):
    _start(tmp_path).config_path.write_text('{"name"')
    with pytest.raises(RunStateError, match=r"config\.json is not JSON"):
        open_run(_config(tmp_path))


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "a_file").write_text("")
    with pytest.raises(RunStateError, match=r"cannot be written.*another runs_directory"):
        _start(tmp_path, f"runs_directory={tmp_path / 'a_file'}")


def test_a_key_that_has_come_since_then_does_not_part_a_run_from_its_configuration(tmp_path):
    run = _start(tmp_path)
    run.teacher_directory.mkdir()
    recorded = json.loads(run.config_path.read_text())
    del recorded["distill"]["replay"], recorded["distill"]["objective"]["discount"]
    run.config_path.write_text(json.dumps(recorded))
    assert open_run(_config(tmp_path)).path == run.path
    with pytest.raises(RunStateError, match=r"discount: 1\.0 -> 0\.9"):
        open_run(_config(tmp_path, "distill.objective.discount=0.9"))


def test_a_record_that_todays_models_refuse_is_compared_as_it_stands(tmp_path):
    run = _start(tmp_path)
    run.teacher_directory.mkdir()
    recorded = json.loads(run.config_path.read_text())
    recorded["distill"]["a_key_of_old"] = 3
    run.config_path.write_text(json.dumps(recorded))
    with pytest.raises(RunStateError, match="a_key_of_old: 3 -> None"):
        open_run(_config(tmp_path))


def test_a_key_that_a_refused_record_lacks_is_told_too(tmp_path):
    run = _start(tmp_path)
    run.teacher_directory.mkdir()
    recorded = json.loads(run.config_path.read_text())
    recorded["distill"]["a_key_of_old"] = 3
    del recorded["distill"]["optimizer"]["weight_decay"]
    run.config_path.write_text(json.dumps(recorded))
    with pytest.raises(
        RunStateError, match=r"a_key_of_old.*optimizer\.weight_decay: None -> 0\.01"
    ):
        open_run(_config(tmp_path))


def test_a_folder_that_is_not_there_is_told_before_a_tokenizer_is_made(configure):
    config = configure("teacher.path=runs/of/nobody")
    run = open_run(config)
    with pytest.raises(ModelError, match=r"teacher\.path='runs/of/nobody': .* no such folder"):
        prepare_tokenizer(config, run)
    assert not run.path.exists()


def test_models_must_fit_the_tokenizer_each_time_it_is_prepared(configure, tiny_model_folder):
    short = tiny_model_folder(seed=3, max_position_embeddings=8)
    good, bad = configure(), configure(f"student.path={short}")
    run = open_run(good)
    with pytest.raises(ModelError, match="reads at most 8 tokens"):
        prepare_tokenizer(bad, run)
    assert not run.tokenizer_directory.exists()
    prepare_tokenizer(good, run)
    assert run.tokenizer_directory.exists()
    with pytest.raises(ModelError, match="reads at most 8 tokens"):
        prepare_tokenizer(bad, run)


def _tree(folder):
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def _refused(config, run, *, begun=False):
    def start():
        with refusal_leaves_nothing(run) as begin:
            record_start(config, run)
            run.models_directory.mkdir()
            run.metrics_path.write_text("")
            if begun:
                begin()
            raise ModelError("refused")

    with pytest.raises(ModelError, match="refused"):
        start()


def test_a_refused_run_leaves_nothing(tmp_path):
    (tmp_path / "mine").mkdir()
    config = _config(tmp_path, f"runs_directory={tmp_path / 'mine/deep/runs'}")
    _refused(config, open_run(config))
    assert _tree(tmp_path) == {Path("mine"): None}


def test_what_others_have_beside_it_stays(tmp_path):
    (tmp_path / "another").mkdir()
    config = _config(tmp_path)
    _refused(config, open_run(config))
    assert _tree(tmp_path) == {Path("another"): None}


def test_a_run_that_was_there_is_left_as_it_was(tmp_path):
    run = _start(tmp_path)
    run.student_directory.mkdir()
    (run.student_directory / "config.json").write_text("{}")
    before = _tree(tmp_path)
    config = _config(tmp_path, "pools.learner.count=2")
    _refused(config, open_run(config))
    assert _tree(tmp_path) == before


def test_a_run_whose_workers_may_have_started_keeps_everything(tmp_path):
    config = _config(tmp_path)
    run = open_run(config)
    _refused(config, run, begun=True)
    assert run.config_path.exists()
    assert run.metrics_path.exists()


def test_a_run_that_is_not_refused_keeps_everything(tmp_path):
    config = _config(tmp_path)
    run = open_run(config)
    with refusal_leaves_nothing(run):
        record_start(config, run)
    assert run.config_path.exists()


@pytest.mark.parametrize("damage", ["{}", "no json", None])
def test_a_broken_tokenizer_of_the_run_is_told_with_the_way_out(tmp_path, damage):
    config, run = _config(tmp_path), _start(tmp_path)
    prepare_tokenizer(config, run)
    file = run.tokenizer_directory / "tokenizer.json"
    file.unlink() if damage is None else file.write_text(damage)
    with pytest.raises(RunStateError, match=r"tokenizer .* cannot be read: .*Remove that folder"):
        prepare_tokenizer(config, run)
    shutil.rmtree(run.tokenizer_directory)
    prepare_tokenizer(config, run)
    assert file.exists()


CODE = """
from transformers import PreTrainedTokenizerFast


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def test_a_tokenizer_with_code_of_its_own_is_loaded_each_time(
    configure, tiny_model_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("sys.stdin", None)  # nobody answers a question
    folders = [tmp_path / "teacher_of_code", tmp_path / "student_of_code"]
    for seed, folder in enumerate(folders):
        shutil.copytree(tiny_model_folder(seed=seed), folder)
        (folder / "own_tokenizer.py").write_text(CODE)
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        settings["auto_map"] = {"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]}
        path.write_text(json.dumps({**settings, "tokenizer_class": "OwnTokenizer"}))
    paths = [f"{role}.path={f}" for role, f in zip(("teacher", "student"), folders, strict=True)]
    trusting = [f"{role}.trust_remote_code=true" for role in ("teacher", "student")]
    config = configure(*paths, *trusting)
    run = open_run(config)
    first = prepare_tokenizer(config, run)
    assert type(first).__name__ == "OwnTokenizer"
    assert type(prepare_tokenizer(config, run)).__name__ == "OwnTokenizer"
    with pytest.raises(ModelError, match="trust_remote_code"):
        prepare_tokenizer(configure(*paths), open_run(configure(*paths, "name=other")))


def test_the_day_that_chats_are_told_is_that_of_the_runs_beginning(tmp_path):
    config = _config(tmp_path)
    run = open_run(config)
    begun = with_chat_date(config, run)
    assert begun.data.chat_date == date.today()
    record_start(begun, run)
    recorded = json.loads(run.config_path.read_text())
    recorded["data"]["chat_date"] = "2001-02-03"  # as if it had begun then
    run.config_path.write_text(json.dumps(recorded))
    (run.path / "checkpoints").mkdir()
    resumed = with_chat_date(config, open_run(config))
    assert resumed.data.chat_date == date(2001, 2, 3)
    assert open_run(resumed).path == run.path
    with pytest.raises(RunStateError, match=r"data\.chat_date: '2001-02-03' -> '2020-01-01'"):
        open_run(_config(tmp_path, "data.chat_date=2020-01-01"))


def test_a_day_that_is_given_is_the_runs(tmp_path):
    config = _config(tmp_path, "data.chat_date=2020-01-01")
    assert with_chat_date(config, open_run(config)).data.chat_date == date(2020, 1, 1)


def test_a_mended_template_replaces_the_one_that_a_run_failed_to_start_with(tmp_path):
    file = tmp_path / "mine.jinja"
    changes = (f"data.chat_template={file}", "data.use_chat_template=true")
    run = _start(tmp_path, *changes)
    for written in ("{{ broken(", "{{ messages[0].content }}"):
        file.write_text(written)
        assert prepare_tokenizer(_config(tmp_path, *changes), run).chat_template == written
    (run.path / "checkpoints").mkdir()
    file.write_text("another")
    assert prepare_tokenizer(_config(tmp_path, *changes), run).chat_template == written

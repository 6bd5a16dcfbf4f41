"""What a generation is to write, in which batches; what a run says of a store before it starts."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow
import pytest
from rich.console import Console
from trajectories import SAMPLE_ORIGIN, make_trajectories
from transformers import AutoTokenizer

from distill_system.data import TrajectoryStore, read_trajectories
from distill_system.data.stored_rows import make_rows
from distill_system.errors import ConfigError, DataError, RunStateError
from distill_system.observe import LiveView, RunDirectory
from distill_system.offline import samples as offline_samples
from distill_system.offline.generate import GenerateRequest, generate
from distill_system.offline.samples import SampleKeeper, cut_batches, plan_samples
from distill_system.records import Author, Prompt
from distill_system.run.sample_origin import sample_origin
from distill_system.stages.train import open_context

ORIGIN = replace(SAMPLE_ORIGIN, max_response_tokens=16, stop_token_ids=(2,))


def prompts(count, first=0):
    ids = [np.array([4, 5 + i], np.int32) for i in range(first, first + count)]
    return [
        Prompt(prompt_id=f"prompts:{first + i}", token_ids=token_ids, text=f"text {i}")
        for i, token_ids in enumerate(ids)
    ]


def plan(rows, num_prompts=None, samples=1, origin=ORIGIN):
    return plan_samples(rows, origin, num_prompts=num_prompts, samples_per_prompt=samples)


def test_more_prompts_and_samples_ask_for_the_same_and_more():
    few, many = plan(prompts(20), 5, 2), plan(prompts(20), 9, 3)
    assert (few.num_rows, many.num_rows) == (10, 27)
    assert set(few["key"].to_pylist()) < set(many["key"].to_pylist())
    assert len(set(many["key"].to_pylist())) == 27
    chosen = few["prompt_id"].to_pylist()[:5]
    assert chosen != [f"prompts:{i}" for i in range(5)], "a part is drawn from all of them"
    assert few["prompt_id"].to_pylist() == chosen * 2, "first samples come before second ones"


def test_a_prompt_that_stands_there_twice_is_asked_once():
    twin = replace(prompts(1)[0], prompt_id="prompts:99")
    for rows in ([*prompts(4), twin], [twin, *prompts(4)]):
        assert plan(rows).num_rows == 4


def test_labels_tell_models_and_samplings_apart():
    others: list[dict[str, Any]] = [
        {"seed": 1},
        {"model_fingerprint": "g"},
        {"top_p": 0.5},
        {"max_response_tokens": 9},
    ]
    labels = {plan(prompts(1), origin=replace(ORIGIN, **o))["label"][0].as_py() for o in others}
    assert len(labels) == len(others)


@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("num_rows", [1, 7, 1000])
def test_batches_hold_every_row_once_and_keep_every_worker_busy(num_workers, num_rows):
    rows = pyarrow.table({"key": [str(i) for i in range(num_rows)]})
    batches = cut_batches(rows, num_workers=num_workers, most_rows=50)
    assert pyarrow.concat_tables(batches)["key"].to_pylist() == rows["key"].to_pylist()
    assert max(batch.num_rows for batch in batches) <= 50
    assert len(batches) >= min(num_rows, num_workers * 4)


@pytest.fixture
def keeper(tmp_path, tiny_model_folder):
    view = LiveView("run", console=Console(file=io.StringIO()))
    store = TrajectoryStore(tmp_path / "store", "t")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder())
    return SampleKeeper(store, tokenizer, view.start("generate", 40)), store


def rows_of(count, first):
    made = make_trajectories(count, Author.TEACHER, first)
    return make_rows(made, ORIGIN, label="a")


def test_what_was_finished_is_kept_when_the_work_ends_early(keeper, monkeypatch):
    keep, store = keeper
    monkeypatch.setattr(offline_samples, "PART_SHARE", 2.0)

    def broken():
        yield rows_of(10, 0)
        yield rows_of(10, 10)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keep.keep(broken())
    assert len(read_trajectories(store.folder, "t")) == 20


def test_parts_are_written_while_the_work_goes_on(keeper, monkeypatch):
    keep, store = keeper
    monkeypatch.setattr(offline_samples, "PART_ROWS", 15)
    monkeypatch.setattr(offline_samples, "PART_SHARE", 2.0)
    seen = []

    def finished():
        for first in (0, 10, 20, 30):
            yield rows_of(10, first)
            parts = (store.folder / "trajectories").glob("part-*")
            seen.append(sum(pyarrow.parquet.read_metadata(part).num_rows for part in parts))

    keep.keep(finished())
    assert seen == [0, 20, 20, 40]


def test_responses_are_kept_as_text_too(keeper):
    keep, store = keeper
    keep.keep([rows_of(5, 0)])
    stored = store.folder / "trajectories"
    row = pyarrow.parquet.read_table(stored).to_pylist()[2]
    words = [f"w{i}" for i in row["token_ids"][row["num_prompt_tokens"] :]]
    assert row["response_text"].split() == words


STORED = ("data.trajectory_store=store", "distill.off_policy_source=store")


def open_run_of(config, tmp_path):
    run = RunDirectory(tmp_path / "run")
    with open_context(config, run, resume=False, sets=("stored", "held_out", "evaluation")):
        raise AssertionError("a cluster was started")


def test_a_run_without_its_store_ends_before_a_cluster(configure, tmp_path):
    with pytest.raises(DataError, match=r"does not exist\. Fill it with"):
        open_run_of(configure(*STORED), tmp_path)


def test_a_store_of_another_teacher_ends_the_run_before_a_cluster(configure, tmp_path):
    config = configure(*STORED)
    tokenizer = AutoTokenizer.from_pretrained(config.teacher.path)
    run = RunDirectory(tmp_path / "run")
    student = sample_origin(config, run, tokenizer, Author.STUDENT)
    store = TrajectoryStore(tmp_path / "store", student.tokenizer_fingerprint)
    store.append(make_rows(make_trajectories(3), student, label="a"))
    with pytest.raises(DataError) as told:
        open_run_of(config, tmp_path)
    assert f"expected samples of author teacher, model {config.teacher.path}" in str(told.value)
    assert f"holds 3 of author student, model {config.student.path}" in str(told.value)


def test_a_teacher_that_is_still_to_be_fine_tuned_has_no_samples(configure, tmp_path):
    tuned = "{steps: 1, optimizer: {learning_rate: 1e-3}}"
    rows = "{type: jsonl, path: rows.jsonl}"
    config = configure(*STORED, f"teacher.sft={tuned}", f"data.teacher_sft={rows}")
    with pytest.raises(RunStateError, match="run `distill-system sft` with the same"):
        generate(GenerateRequest(config=config))


def test_a_generation_needs_a_folder(configure):
    with pytest.raises(ConfigError, match=r"give data\.trajectory_store, .* or --out"):
        generate(GenerateRequest(config=configure()))


def test_a_store_that_holds_everything_starts_no_cluster(configure, tmp_path, monkeypatch):
    config = configure(*STORED)
    monkeypatch.setattr("distill_system.offline.generate.ClusterSession", None)
    asked = []

    def has(_, keys):
        asked.append(len(keys))
        return np.ones(len(keys), bool)

    monkeypatch.setattr(TrajectoryStore, "has", has)
    assert generate(GenerateRequest(config=config)) == tmp_path / "store"
    assert asked == [12]

"""The samples of a trajectory store as one of a run's sets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from trajectories import SAMPLE_ORIGIN

from distill_system.data import (
    TrajectoryStore,
    build_tokenizer,
    fingerprint_tokenizer,
    load_run_data,
)
from distill_system.data.stored_rows import make_rows
from distill_system.errors import DataError
from distill_system.records import Author, Finish, Trajectory


@pytest.fixture
def config(build_config, tmp_path):
    return build_config(
        data={"trajectory_store": "store", "directory": str(tmp_path), "max_prompt_tokens": 40}
    )


@pytest.fixture
def tokenizer(config):
    return build_tokenizer(config, None)


@pytest.fixture
def origin(tokenizer):
    return replace(SAMPLE_ORIGIN, tokenizer_fingerprint=fingerprint_tokenizer(tokenizer))


def sample(prompt, num_response=3):
    response = np.full(num_response, 5, np.int32)
    return Trajectory(
        trajectory_id=f"offline/teacher/{prompt.prompt_id}",
        prompt_id=prompt.prompt_id,
        author=Author.TEACHER,
        token_ids=np.concatenate([prompt.token_ids, response]),
        num_prompt_tokens=prompt.token_ids.size,
        behaviour_logprobs=np.zeros(num_response, np.float32),
        temperature=1.0,
        finish=Finish.LENGTH,
    )


def test_stored_samples_are_a_set_of_the_run(config, tokenizer, origin, tmp_path):
    data = load_run_data(config, tokenizer)
    measured = [*data.held_out[:3], *data.evaluation["paraphrase"][:2]]
    longest = max(data.prompts, key=lambda prompt: prompt.token_ids.size)
    short = [prompt for prompt in data.prompts if prompt is not longest]
    store = TrajectoryStore(tmp_path / "store", origin.tokenizer_fingerprint)
    store.append(make_rows([sample(p) for p in [*short, *measured]], origin, label="a"))
    store.append(make_rows([sample(p, 25) for p in short[:4]], origin, label="b"))
    other = replace(origin, model_fingerprint="g")
    store.append(make_rows([sample(p) for p in short[:6]], other, label="a"))

    stored_by = replace(origin, seed=9, max_response_tokens=24)
    read = load_run_data(config, tokenizer, ["stored", "prompts"], stored_by=stored_by)
    assert {t.prompt_id for t in read.stored} == {p.prompt_id for p in short}
    assert len(read.stored) == len(short)
    assert read.num_removed["trajectory_store"] == len(measured)
    assert read.num_out_of_bounds == {"trajectory_store": 4}
    assert read.num_foreign == 6
    assert data.stored == ()


def test_a_store_of_another_tokenizer_or_teacher_is_refused(config, tokenizer, origin, tmp_path):
    prompts = load_run_data(config, tokenizer, ["prompts"]).prompts
    other = replace(origin, tokenizer_fingerprint="x")
    rows = make_rows([sample(prompts[0])], other, label="a")
    TrajectoryStore(tmp_path / "store", "x").append(rows)
    with pytest.raises(DataError, match="of the tokenizer x, the run's tokenizer is"):
        load_run_data(config, tokenizer, ["stored"], stored_by=origin)
    [part] = (tmp_path / "store" / "trajectories").iterdir()
    part.unlink()
    with pytest.raises(DataError, match=r"data\.trajectory_store: .* has no samples"):
        load_run_data(config, tokenizer, ["stored"], stored_by=origin)
    store = TrajectoryStore(tmp_path / "store", origin.tokenizer_fingerprint)
    store.append(make_rows([sample(prompts[0])], replace(origin, model_fingerprint="g"), label="a"))
    with pytest.raises(DataError, match="expected samples of author teacher, model teacher, model"):
        load_run_data(config, tokenizer, ["stored"], stored_by=origin)

"""Prompts of encoder-decoders end as their tokenizer ends a text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_families import save_tokenizer
from transformers import AutoTokenizer

from distill_system.data import RunData, end_prompts
from distill_system.errors import DataError
from distill_system.records import Author, Finish, Prompt, Trajectory


def _tokenizer(folder: Path, *, ends_texts: bool):
    save_tokenizer(folder, 64, ends_texts=ends_texts)
    return AutoTokenizer.from_pretrained(folder)


def _prompt(name: str, *token_ids: int) -> Prompt:
    return Prompt(prompt_id=name, token_ids=np.array(token_ids, np.int32), text=name)


DATA = RunData(
    student_sft=(
        Trajectory(
            trajectory_id="r",
            prompt_id="r",
            author=Author.DATASET,
            token_ids=np.array([5, 6, 7, 2], np.int32),
            num_prompt_tokens=2,
            behaviour_logprobs=np.empty(0, np.float32),
            temperature=1.0,
            finish=Finish.STOP,
            teacher_prompt_ids=np.array([9, 5, 6], np.int32),
        ),
    ),
    prompts=(
        replace(_prompt("a", 5, 6), teacher_ids=np.array([9, 9, 5, 6], np.int32)),
        _prompt("b", 7),
    ),
    held_out=(_prompt("c", 8),),
    evaluation={"test": (_prompt("d", 9),)},
)


def test_every_set_is_read_as_the_tokenizer_writes_it(tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path, ends_texts=True)
    ended = end_prompts(DATA, tokenizer, most_tokens=3)
    for prompt, words in zip(ended.prompts, ("w5 w6", "w7"), strict=True):
        assert prompt.token_ids.tolist() == tokenizer(words)["input_ids"]
        assert prompt.token_ids.dtype == np.int32
    assert ended.held_out[0].token_ids.tolist() == [8, 2]
    assert ended.evaluation["test"][0].token_ids.tolist() == [9, 2]
    assert ended.prompts[0].teacher_ids.tolist() == tokenizer("w9 w9 w5 w6")["input_ids"]
    assert ended.prompts[1].teacher_ids is None
    [row] = ended.student_sft
    assert row.teacher_prompt_ids.tolist() == [9, 5, 6, 2]
    assert row.token_ids.tolist() == [5, 6, 2, 7, 2]
    assert (row.num_prompt_tokens, row.response_ids.tolist()) == (3, [7, 2])


def test_where_no_text_is_ended_nothing_changes(tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path, ends_texts=False)
    assert end_prompts(DATA, tokenizer, most_tokens=2) is DATA


def test_a_prompt_that_is_too_long_with_its_end_is_named(tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path, ends_texts=True)
    with pytest.raises(DataError, match=r"'a' has 2 tokens.*'<eos>'.*max_prompt_tokens=2 with it"):
        end_prompts(DATA, tokenizer, most_tokens=2)

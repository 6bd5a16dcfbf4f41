"""Figures of texts against plain counting."""

from dataclasses import replace

import numpy as np
import pytest
from trajectories import make_trajectory

from distill_system.observe import text_metrics
from distill_system.records import Author, Finish


def _text(index, tokens, author=Author.STUDENT, logprob=-1.5, finish=Finish.STOP):
    made = make_trajectory(index, 2, len(tokens), author)
    ids = np.concatenate([made.token_ids[:2], np.array(tokens, np.int32)])
    known = np.full(len(made.behaviour_logprobs), logprob, np.float32)
    return replace(made, token_ids=ids, behaviour_logprobs=known, finish=finish)


def _distinct(texts):
    grams = [
        tuple(ids[at : at + 3])
        for ids in (text.response_ids.tolist() for text in texts)
        for at in range(len(ids) - 2)
    ]
    return len(set(grams)) / len(grams)


def test_trigrams_are_counted_within_responses_and_over_all_of_them():
    rng = np.random.default_rng(0)
    texts = [_text(n, rng.integers(0, 4, rng.integers(1, 40))) for n in range(12)]
    found = text_metrics(texts)["student_text/distinct_trigrams"]
    assert found == pytest.approx(_distinct(texts), abs=0)
    assert 0.1 < found < 0.9  # the case says something


def test_token_ids_of_any_vocabulary_are_told_apart():
    high = 2**21 - 1
    texts = [_text(0, [0, high, 1, 0]), _text(1, [high, 0, 1, high]), _text(2, [0, high, 1])]
    assert text_metrics(texts)["student_text/distinct_trigrams"] == 4 / 5


def test_one_text_again_and_again_and_a_loop_are_seen():
    many = [_text(n, range(40 * n, 40 * n + 40)) for n in range(8)]
    same = [_text(n, range(40)) for n in range(8)]
    loop = [_text(n, [7, 8] * 20) for n in range(8)]
    shares = [text_metrics(texts)["student_text/distinct_trigrams"] for texts in (many, same, loop)]
    assert shares == pytest.approx([1.0, 1 / 8, 2 / (8 * 38)])


def test_each_author_is_described_and_rows_of_data_are_not():
    texts = [
        _text(0, [5] * 4, logprob=-1.0),
        _text(1, [6] * 12, logprob=-2.0),
        _text(2, [7] * 3, Author.TEACHER, logprob=-0.5),
        _text(3, [8] * 5, Author.TEACHER, logprob=-0.5, finish=Finish.LENGTH),
        _text(4, [9] * 50, Author.DATASET),
    ]
    found = text_metrics(texts)
    assert found["student_text/entropy"] == pytest.approx((4 * 1.0 + 12 * 2.0) / 16)
    assert found["teacher_text/entropy"] == pytest.approx(0.5)
    assert found["teacher_text/mean_tokens"] == 4
    assert found["teacher_text/ended_share"] == 0.5
    assert {name.split("/")[0] for name in found} == {"student_text", "teacher_text"}


def test_what_was_not_written_has_no_figures():
    assert text_metrics([]) == {}
    short = text_metrics([_text(0, [5, 6])])
    assert "student_text/entropy" in short
    assert "student_text/distinct_trigrams" not in short

"""Rows that are chosen by two models' log-probabilities, against plain transformers row by row."""

from __future__ import annotations

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill_system.config.data import JsonlSource
from distill_system.data import load_examples
from distill_system.errors import ConfigError, ModelError
from distill_system.offline import cached_targets
from distill_system.offline.select import RowScore, SelectRequest, choose, describe, select

SFT = "data.student_sft={type: jsonl, path: rows.jsonl}"
TEXT = "data.plain_text={type: jsonl, path: texts.jsonl}"


@pytest.fixture
def calls(monkeypatch):
    """Batches that workers of this process were given; the number after which they die, if any."""
    seen = []

    def infer(batches, worker_class, arguments, **_):
        worker = worker_class(**arguments)
        for batch in batches:
            if len(seen) == die_after[0]:
                raise KeyboardInterrupt
            seen.append(batch.num_rows)
            yield worker(batch)

    die_after = [-1]
    monkeypatch.setattr(cached_targets, "infer_batches", infer)
    monkeypatch.setattr(
        "distill_system.offline.select.ClusterSession", lambda *_, **__: nullcontext()
    )
    return seen, die_after


@pytest.fixture
def reference(tiny_model_folder):
    return str(tiny_model_folder(seed=3, num_layers=1))


def _mean_logprob(folder, ids, num_prompt):
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor(ids)
    with torch.no_grad():
        logprobs = model(ids[None]).logits[0].log_softmax(-1)
    return float(logprobs[:-1].gather(1, ids[1:, None])[num_prompt - 1 :].mean())


def _kept(selection):
    return [json.loads(line) for line in selection.path.read_text().splitlines()]


def _request(config, reference, tmp_path, **how):
    return SelectRequest(config=config, reference=reference, out=tmp_path / "selected", **how)


def test_scores_are_differences_of_mean_log_probabilities_and_the_better_half_is_kept(
    configure, reference, tmp_path, calls
):
    config = configure(SFT)
    selection = select(_request(config, reference, tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(config.teacher.path)
    words = [f"w{at}" for at in range(4, 16)]
    expected = []
    for word in words:
        prompt = tokenizer(f"{word} w5")["input_ids"]
        answer = tokenizer("w6", add_special_tokens=False)["input_ids"]
        ids = [*prompt, *answer, tokenizer.eos_token_id]
        said = [_mean_logprob(path, ids, len(prompt)) for path in (config.teacher.path, reference)]
        expected.append(said[0] - said[1])
    scores = [each.score for each in selection.scores]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    best = sorted(np.argsort(expected)[-6:])
    rows = _kept(selection)
    assert [row["prompt"] for row in rows] == [f"{words[at]} w5" for at in best], "in their order"
    np.testing.assert_allclose([row["score"] for row in rows], np.take(expected, best), atol=1e-5)
    for row in rows:
        assert row["score"] == row["teacher_logprob"] - row["reference_logprob"]
    source = JsonlSource(type="jsonl", path=str(selection.path))
    again = load_examples(source, config.data)
    assert [example.answer for example in again] == ["w6"] * 6, "a run reads them without fields"
    page = describe(selection)
    assert "6 of 12 rows kept" in page
    bins = [line for line in page.splitlines() if " to " in line]
    assert sum(int(line.split()[-1]) for line in bins) == 12
    top, bottom = words[int(np.argmax(expected))], words[int(np.argmin(expected))]
    assert f"{top} w5" in page.partition("best:")[2].splitlines()[1]
    assert f"{bottom} w5" in page.partition("worst:")[2].splitlines()[1]


def test_a_command_that_was_killed_goes_on_and_another_share_reads_nothing_anew(
    configure, reference, tmp_path, calls
):
    seen, die_after = calls
    request = _request(configure(SFT), reference, tmp_path)
    die_after[0] = 3
    with pytest.raises(KeyboardInterrupt):
        select(request)
    before = sum(seen)
    die_after[0] = -1
    whole = select(request)
    assert 0 < before < 24
    assert sum(seen) == 24, "each model reads each row once"
    fewer = select(_request(request.config, reference, tmp_path, keep=0.25))
    assert sum(seen) == 24
    assert len(fewer.kept) == 3
    assert fewer.kept < whole.kept
    assert fewer.scores == whole.scores


def test_a_long_text_is_one_row_and_rows_of_chats_come_back_as_they_were(
    configure, reference, tmp_path, calls
):
    texts = ["w4 " * 40, "w9 w10", "w4 " * 40]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    config = configure(TEXT)
    selection = select(_request(config, reference, tmp_path, at_least=-100.0))
    assert [each.row_id for each in selection.scores] == [f"plain_text:{at}" for at in range(3)]
    assert selection.scores[0].score == selection.scores[2].score
    assert [row["text"] for row in _kept(selection)] == texts
    assert selection.scores[0].teacher < 0.0
    with pytest.raises(ConfigError, match=r"--at-least 99.*no row of data.plain_text .* the best"):
        select(_request(config, reference, tmp_path, at_least=99.0))


@pytest.mark.parametrize(
    ("keep", "expected"), [(0.5, "bd"), (0.1, "b"), (1.0, "abcd"), (0.75, "abd")]
)
def test_of_equal_rows_the_earlier_one_is_kept(keep, expected):
    values = {"a": 0.0, "b": 2.0, "c": 0.0, "d": 1.0}
    scores = [RowScore(name, value, 0.0) for name, value in values.items()]
    assert choose(scores, keep=keep) == set(expected)


def test_what_cannot_be_compared_is_refused_before_a_worker(
    configure, reference, tmp_path, tiny_model_folder
):
    with pytest.raises(ConfigError, match=r"no rows to choose from, give data\.student_sft"):
        select(_request(configure(), reference, tmp_path))
    with pytest.raises(ConfigError, match=r"expected scoring.shard_ranks=1, got 2"):
        select(_request(configure(SFT, "scoring.shard_ranks=2"), reference, tmp_path))
    with pytest.raises(ModelError, match=r"--reference.*nowhere"):
        select(_request(configure(SFT), str(tmp_path / "nowhere"), tmp_path))
    few = str(tiny_model_folder(seed=3, vocab_size=40))
    with pytest.raises(ModelError, match="--reference"):
        select(_request(configure(SFT), few, tmp_path))
    assert not (tmp_path / "runs").exists()

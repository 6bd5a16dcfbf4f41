"""Texts that are learned from as they are: no template, whole or in pieces, each token once."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from distill_system.data import build_tokenizer, load_run_data, tokenizer_texts
from distill_system.errors import DataError
from distill_system.records import Author, Finish

CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TEXTS = ["A short one.", "zq " * 400, "held out", "Ends with more than one line.\n\n"]


@pytest.fixture
def load(build_config, write_jsonl):
    """The plain text of rows, with its tokenizer; prompts of 40 and responses of 24 tokens."""

    def load(rows, **data):
        rows = {"type": "jsonl", "path": str(write_jsonl("texts.jsonl", rows))}
        held = write_jsonl("held_out.jsonl", [{"prompt": "held out"}])
        sets = {
            "plain_text": rows,
            "held_out": {"type": "jsonl", "path": str(held)},
            "max_prompt_tokens": 300,
            "chat_date": "2026-03-01",
        }
        config = build_config(
            tokenizer={"type": "train_bpe", "vocab_size": 300},
            data={**sets, "prompt_template": "{prompt}", **data},
        )
        tokenizer = build_tokenizer(config, tokenizer_texts(config))
        tokenizer.chat_template = CHAT_TEMPLATE
        return config, tokenizer, load_run_data(config, tokenizer, ["plain_text"])

    return load


def test_every_token_of_a_text_but_the_first_is_learned_once(load):
    config, tokenizer, data = load([{"text": text} for text in TEXTS])
    most = config.max_model_length
    assert data.num_removed == {"plain_text": 1}, "a text that is measured on is none to learn from"
    kept = {f"plain_text:{at}": text for at, text in enumerate(TEXTS) if text != "held out"}
    for name, text in kept.items():
        pieces = [piece for piece in data.plain_text if piece.prompt_id == name]
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert np.concatenate([piece.response_ids for piece in pieces]).tolist() == ids[1:]
        for piece, following in pairwise(pieces):
            assert piece.token_ids.size == most
            assert piece.token_ids[-1] == following.token_ids[0]
            assert piece.finish is Finish.LENGTH
        assert pieces[0].token_ids[0] == ids[0]
        assert pieces[-1].finish is Finish.STOP
        assert {piece.author for piece in pieces} == {Author.DATASET}
    assert {piece.prompt_id for piece in data.plain_text} == kept.keys()
    names = [piece.trajectory_id for piece in data.plain_text]
    assert len(names) == len({*names}) > 3
    assert "plain_text:1.piece_2" in names


@pytest.mark.parametrize("chat", [False, True])
def test_no_template_is_put_around_a_text(load, chat):
    around = {"prompt_template": "Q: {prompt} A:", "use_chat_template": chat}
    _, tokenizer, data = load([{"text": "Just this."}], **around)
    [piece] = data.plain_text
    assert tokenizer.decode(piece.token_ids) == "Just this." + tokenizer.eos_token


def test_a_chat_is_no_plain_text(load):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    with pytest.raises(DataError, match=r"texts.jsonl:1: expected a plain text, got a chat"):
        load([{"messages": chat}])


def test_a_long_text_is_cut_whatever_becomes_of_long_prompts(load):
    _, _, data = load([{"text": TEXTS[1]}], too_long_prompts="leave_out", max_prompt_tokens=100)
    assert len(data.plain_text) > 1
    assert data.notes == ()

"""Prompts that are too long, and words that no tokenizer knows."""

from __future__ import annotations

import time

import pytest
from chat_templates import TEMPLATES, TOKENIZERS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill_system.data import load_run_data
from distill_system.data.run_data import SetName
from distill_system.errors import DataError

WORDS = " ".join(f"cat{n}" for n in range(300))
PLAIN = {"format": "prompt_response", "response": None}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.fixture
def load(build_long_config, write_jsonl):
    def load(tokenizer, rows, *, fields=PLAIN, template="zephyr", source=None, **data):
        tokenizer.chat_template = TEMPLATES[template]
        path = write_jsonl("rows.jsonl", rows)
        rows_of = {"type": "jsonl", "path": str(path), "fields": fields, **(source or {})}
        config = build_long_config(
            **{"prompts": rows_of, "prompt_template": "<s>Q: {prompt}\nA:", **data}
        )
        sets: list[SetName] = ["prompts", "student_sft"] if "student_sft" in data else ["prompts"]
        return load_run_data(config, tokenizer, sets)

    return load


@pytest.mark.parametrize("side", ["cut_left", "cut_right"])
def test_a_plain_prompt_is_cut_in_its_own_text(tokenizer, load, side):
    rows = [{"prompt": WORDS}, {"prompt": "the cat"}]
    data = load(tokenizer, rows, max_prompt_tokens=200, too_long_prompts=side)
    long, short = data.prompts
    assert 190 <= long.token_ids.size <= 200
    kept = tokenizer.decode(long.token_ids).removeprefix("<s>Q: ").removesuffix("\nA:")
    kept = kept.removeprefix(" ") if side == "cut_right" else kept
    assert (WORDS.startswith if side == "cut_right" else WORDS.endswith)(kept)
    assert len(kept) > 20
    assert tokenizer.decode(short.token_ids) == "<s>Q: the cat\nA:"
    where = "beginning" if side == "cut_left" else "end"
    assert f"data.prompts: 1 prompts of more than 200 tokens cut at the {where}" in data.notes


def test_a_prompt_is_left_out_where_that_is_asked_for(load):
    tokenizer = TOKENIZERS["bytes"]()
    rows = [{"prompt": WORDS}, {"prompt": "the cat"}]
    data = load(tokenizer, rows, max_prompt_tokens=200, too_long_prompts="leave_out")
    assert [prompt.prompt_id for prompt in data.prompts] == ["prompts:1"]
    assert data.notes == ("data.prompts: 1 rows left out, their prompts have more than 200 tokens",)
    with pytest.raises(DataError, match=r"data\.prompts: each of its 1 prompts has more than"):
        load(tokenizer, rows[:1], max_prompt_tokens=200, too_long_prompts="leave_out")
    with pytest.raises(DataError, match=r"'prompts:0'.*data\.too_long_prompts"):
        load(tokenizer, rows, max_prompt_tokens=200)


def test_the_longest_text_of_a_row_is_cut(load):
    tokenizer = TOKENIZERS["bytes"]()
    fields = {"format": "template", "prompt": "{text} Is it so? {question}[INST]"}
    rows = [{"text": WORDS, "question": "the cat?"}]
    [prompt] = load(
        tokenizer, rows, fields=fields, max_prompt_tokens=120, too_long_prompts="cut_right"
    ).prompts
    text = tokenizer.decode(prompt.token_ids)
    assert text.startswith("<s>Q: cat0 cat1")
    assert text.endswith(" Is it so? the cat?[INST]\nA:")
    assert prompt.token_ids.size <= 120


def chat(*turns):
    roles = ["system", *(["user", "assistant"] * 9)]
    return [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]


def test_a_chat_cut_at_its_beginning_loses_its_oldest_turns(load):
    tokenizer = TOKENIZERS["bytes"]()
    fields = {"format": "messages"}
    whole = chat("be kind", "first", WORDS, "second", "no", "what is it?")
    rows = [{"messages": whole}]
    [prompt] = load(
        tokenizer, rows, fields=fields, max_prompt_tokens=200, too_long_prompts="cut_left"
    ).prompts
    kept = [whole[0], *whole[3:]]
    assert prompt.token_ids.tolist() == tokenizer.apply_chat_template(
        kept, add_generation_prompt=True, tokenize=True, return_dict=False
    )


@pytest.mark.parametrize("side", ["cut_left", "cut_right"])
def test_the_last_message_of_a_chat_is_cut_and_its_turns_are_whole(tokenizer, load, side):
    rows = [{"messages": chat("be kind", WORDS)}]
    data = load(
        tokenizer,
        rows,
        fields={"format": "messages"},
        template="qwen",
        max_prompt_tokens=200,
        too_long_prompts=side,
    )
    text = tokenizer.decode(data.prompts[0].token_ids)
    before, after = "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n"
    assert text.startswith(before)
    kept, _, opened = text.removeprefix(before).partition(after)
    assert (WORDS.endswith if side == "cut_left" else WORDS.startswith)(kept)
    assert opened == "<|im_start|>assistant\n"
    assert 190 <= data.prompts[0].token_ids.size <= 200


def test_a_supervised_chat_is_learned_after_its_cut_prompt(load, write_jsonl):
    tokenizer = TOKENIZERS["bytes"]()
    rows = write_jsonl("sft.jsonl", [{"messages": chat("be kind", WORDS, "The cat")}])
    supervised = {"type": "jsonl", "path": str(rows), "fields": {"format": "messages"}}
    data = load(
        tokenizer,
        [{"prompt": "the cat"}],
        student_sft=supervised,
        max_prompt_tokens=200,
        too_long_prompts="cut_right",
    )
    [row] = data.student_sft
    assert row.num_prompt_tokens <= 200
    assert tokenizer.decode(row.response_ids) == "The cat</s>"
    assert tokenizer.decode(row.token_ids).startswith("<|system|>\nbe kind</s>\n<|user|>\ncat0")


def test_what_templates_write_is_not_cut(load):
    tokenizer = TOKENIZERS["bytes"]()
    template = f"{WORDS} {{prompt}}"
    with pytest.raises(DataError, match=r"data\.\S+: .* cannot be cut: without the text"):
        load(
            tokenizer,
            [{"prompt": WORDS}],
            prompt_template=template,
            max_prompt_tokens=200,
            too_long_prompts="cut_right",
        )


HUGE = "ab" * 2_500_000


@pytest.mark.parametrize(
    ("source", "data", "kept"),
    [
        ({"max_prompt_tokens": 400}, {}, 1),
        ({}, {"too_long_prompts": "leave_out"}, 1),
        ({}, {"too_long_prompts": "cut_left"}, 2),
        ({}, {"too_long_prompts": "cut_right"}, 2),
    ],
)
def test_a_word_of_five_megabytes_is_not_tokenised(load, source, data, kept):
    tokenizer = TOKENIZERS["bytes"]()
    rows = [{"prompt": HUGE}, {"prompt": "the cat"}]
    began = time.process_time()
    prompts = load(tokenizer, rows, source=source, max_prompt_tokens=400, **data).prompts
    assert len(prompts) == kept
    assert max(prompt.token_ids.size for prompt in prompts) <= 400
    assert time.process_time() - began < 20  # it takes one or two


@pytest.mark.parametrize("fields", [PLAIN, {"format": "messages"}])
def test_a_word_of_five_megabytes_is_refused_at_once(load, fields):
    tokenizer = TOKENIZERS["bytes"]()
    row = {"prompt": HUGE, "messages": [{"role": "user", "content": HUGE}]}
    with pytest.raises(DataError, match=r"'prompts:0' \(rows\.jsonl:1\) holds a text of 50\d+ ch"):
        load(tokenizer, [row], fields=fields)


@pytest.fixture
def word_tokenizer():
    words = ["<unk>", "</s>", "the", "cat", "Q", "A", ":", *"abcdefghijklmnopqrstuvwxyz"]
    raw = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


def test_prompts_of_words_that_the_tokenizer_does_not_know_are_told(load, word_tokenizer):
    rows = [{"prompt": "猫 坐 在"}, {"prompt": "the 猫"}, {"prompt": "Катя"}]
    notes = load(word_tokenizer, rows).notes
    assert "data.prompts: the tokenizer knows no word of 2 prompts" in notes
    with pytest.raises(DataError, match=r"data\.prompts: the tokenizer knows no word of any of"):
        load(word_tokenizer, rows[::2])

"""Rows of preferences as pairs of trajectories: the preferred answer, then the rejected one."""

from __future__ import annotations

import json

import pytest

from distill_system.data import build_tokenizer, load_run_data
from distill_system.errors import DataError

PAIRS = "data.preferences={type: jsonl, path: pairs.jsonl"
ASK, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("user", "w4"), ("assistant", "w5"), ("assistant", "w6"))
)


@pytest.fixture
def load(configure, tmp_path):
    def load(*rows, more="", template=None):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "pairs.jsonl").write_text(lines)
        config = configure(f"{PAIRS}{more}}}")
        tokenizer = build_tokenizer(config, None)
        tokenizer.chat_template = template
        data = load_run_data(config, tokenizer, ["preferences"])
        said = [
            tokenizer.decode(t.response_ids, skip_special_tokens=True) for t in data.preferences
        ]
        return data, [text.strip() for text in said]

    return load


def _rows(count):
    return [
        {"prompt": f"w{4 + at}", "chosen": "w7 w8", "rejected": f"w{9 + at}"} for at in range(count)
    ]


def test_each_preferred_answer_is_followed_by_the_rejected_one_to_the_same_prompt(load):
    data, said = load(*_rows(3))
    assert said == ["w7 w8", "w9", "w7 w8", "w10", "w7 w8", "w11"]
    ids = [(t.prompt_id, t.trajectory_id) for t in data.preferences]
    assert ids[2:4] == [
        ("preferences:1", "preferences:1"),
        ("preferences:1", "preferences.rejected:1"),
    ]
    for one, other in zip(data.preferences[::2], data.preferences[1::2], strict=True):
        prompts = [t.token_ids[: t.num_prompt_tokens].tolist() for t in (one, other)]
        assert prompts[0] == prompts[1]


def test_a_pair_of_which_one_half_is_out_of_bounds_is_left_out(load):
    rows = _rows(3)
    rows[1]["rejected"] = "w5 w6 w7 w8 w9"
    _, said = load(*rows, more=", max_response_tokens: 4")
    assert said == ["w7 w8", "w9", "w7 w8", "w11"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    ],
)
def test_chats_are_pairs_too(load, row):
    template = (
        "{% for m in messages %}w30 {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}w30 {% endif %}"
    )
    _, said = load(row, template=template)
    assert said == ["w5", "w6"]


def test_other_columns_are_named_and_rows_without_a_rejected_answer_are_refused(load):
    row = {"q": "w4", "good": "w5", "bad": "w6"}
    fields = "{format: preference, prompt: q, chosen: good, rejected: bad}"
    _, said = load(row, more=f", fields: {fields}")
    assert said == ["w5", "w6"]
    with pytest.raises(
        DataError, match=r"expected rows with a preferred and a rejected answer, got"
    ):
        load({"prompt": "w4", "response": "w5"})
    with pytest.raises(DataError, match=r"no field 'rejected'"):
        load({"prompt": "w4", "chosen": "w5"}, more=", fields: {format: preference}")

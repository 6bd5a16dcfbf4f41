"""Rows as the data sets of the field hold them: which columns are found, and what is refused."""

import json

import pytest
from pydantic import TypeAdapter

from distill_system.config.data import DataConfig, Source
from distill_system.data.sources import SourceReport, load_examples, read_examples
from distill_system.errors import DataError

HI, HO = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
SYSTEM = {"role": "system", "content": "be kind"}
PLAIN = ("hi", "ho")
CHAT = ((HI,), "ho")


@pytest.fixture
def read(tmp_path):
    def read_rows(*rows, with_answers=True, **values):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = TypeAdapter(Source).validate_python(
            {"type": "files", "path": "rows.jsonl"} | values
        )
        data = DataConfig(
            directory=str(tmp_path), prompts=source, held_out=source, evaluation={"test": source}
        )
        report = SourceReport()
        examples = [
            *read_examples(source, data, key="data.x", with_answers=with_answers, report=report)
        ]
        assert len(load_examples(source, data, with_answers=with_answers)) == len(examples)
        return [(each.prompt, each.answer) for each in examples], report

    return read_rows


@pytest.mark.parametrize(
    ("row", "expected", "told"),
    [
        ({"prompt": "hi", "response": "ho"}, PLAIN, "prompt -> response"),
        ({"prompt": "hi", "completion": "ho"}, PLAIN, "prompt -> completion"),
        ({"question": "hi", "answer": "ho", "id": 7}, PLAIN, "question -> answer"),
        ({"Question": "hi", "Answer": "ho"}, PLAIN, "Question -> Answer"),
        ({"query": "hi", "response": "ho"}, PLAIN, "query -> response"),
        ({"problem": "hi", "solution": "ho"}, PLAIN, "problem -> solution"),
        ({"inputs": "hi", "targets": "ho"}, PLAIN, "inputs -> targets"),
        ({"input": "hi", "output": "ho"}, PLAIN, "input -> output"),
        ({"question": "hi", "answers": ["ho", "hu"]}, PLAIN, "question -> answers"),
        ({"instruction": "hi", "output": "ho"}, PLAIN, "instruction -> output"),
        (  # Alpaca, with the column of the whole text that the hub's copy has
            {"instruction": "hi", "input": "7", "output": "ho", "text": "hi 7 ho"},
            ("hi\n\n7", "ho"),
            "instruction + input -> output",
        ),
        (  # Dolly
            {"instruction": "hi", "context": "", "response": "ho", "category": "qa"},
            PLAIN,
            "instruction + context -> response",
        ),
        ({"messages": [HI, HO]}, CHAT, "the chat messages"),
        ({"messages": [SYSTEM, HI, HO], "source": "x"}, ((SYSTEM, HI), "ho"), "the chat messages"),
        ({"conversations": [HI, HO]}, CHAT, "the chat conversations"),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
            CHAT,
            "the ShareGPT chat conversations",
        ),
        (
            {
                "id": "identity_0",
                "conversations": [
                    {"from": "system", "value": "be kind"},
                    {"from": "human", "value": "hi"},
                    {"from": "gpt", "value": "ho"},
                ],
            },
            ((SYSTEM, HI), "ho"),
            "the ShareGPT chat conversations",
        ),
        ({"prompt": [HI], "completion": [HO]}, CHAT, "prompt -> completion"),
        (
            {"prompt": [SYSTEM, HI], "completion": "ho"},
            ((SYSTEM, HI), "ho"),
            "prompt -> completion",
        ),
        ({"prompt": "hi", "chosen": "ho", "rejected": "no"}, PLAIN, "prompt -> chosen"),
        ({"question": "hi", "chosen": "ho", "rejected": "no"}, PLAIN, "question -> chosen"),
        ({"prompt": [HI], "chosen": [HO], "rejected": [HO]}, CHAT, "prompt -> chosen"),
        ({"prompt": "hi", "chosen": [HO], "rejected": [HO]}, CHAT, "prompt -> chosen"),
        (  # UltraFeedback: the preferred chat holds the prompt once more
            {"prompt": "hi", "chosen": [HI, HO], "rejected": [HI, HO], "score": 1.0},
            CHAT,
            "prompt -> chosen",
        ),
        (
            {"chosen": [HI, HO], "rejected": [HI, HO]},
            CHAT,
            "the beginning of chosen -> chosen",
        ),
    ],
)
def test_a_layout_is_found_by_its_usual_columns(read, row, expected, told):
    examples, report = read(row, row)
    assert examples == [expected, expected]
    assert report.layout == told
    assert report.describe().startswith(f"rows.jsonl: {told}; ")
    assert "2 of 2 rows" in report.describe()


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "hi"}, "hi"),
        ({"text": "hi"}, "hi"),
        ({"question": "hi", "answer": "ho", "solution": "hu"}, "hi"),
        ({"prompt": [HI]}, (HI,)),
        ({"messages": [HI]}, (HI,)),
        ({"instruction": "hi"}, "hi"),
    ],
)
def test_prompts_alone_need_no_answer(read, row, prompt):
    examples, _ = read(row, with_answers=False)
    assert [each[0] for each in examples] == [prompt]


def test_columns_that_nobody_reads_are_told(read):
    _, report = read({"question": "hi", "context": "x", "answer": "ho", "id": 1})
    assert report.unread == ("context", "id")
    assert "not read: context, id" in report.describe()


@pytest.mark.parametrize(
    ("row", "readings"),
    [
        (
            {"question": "a", "answer": "b", "solution": "c"},
            ["question -> answer (", "-> solution"],
        ),
        ({"messages": [HI, HO], "conversations": [HI, HO]}, ["messages", "conversations"]),
        (
            {"prompt": "hi", "messages": [HI, HO]},
            ["the chat messages", "{format: prompt_response, "],
        ),
        (
            {"prompt": "hi", "chosen": [HI, HO], "rejected": [HI, HO], "messages": [HI, HO]},
            ["the chat messages ({format: messages})", "prompt -> chosen ({format: preference})"],
        ),
        ({"question": "a", "query": "b", "answer": "c"}, ["question -> answer", "query -> answer"]),
    ],
)
def test_two_readings_are_refused_with_both_and_their_keys(read, row, readings):
    with pytest.raises(
        DataError, match=r"^rows\.jsonl: .* in 2 ways: .* or .* by data\.x\.fields$"
    ) as info:
        read(row)
    assert all(reading in str(info.value) for reading in readings)


def test_what_a_refusal_proposes_is_read_as_written(read):
    """The key in the message is YAML that the source takes."""
    import re

    import yaml

    row = {"question": "a", "answer": "b", "solution": "c"}
    with pytest.raises(DataError) as info:
        read(row)
    proposed = [yaml.safe_load(text) for text in re.findall(r"\((\{.*?\})\)", str(info.value))]
    assert [read(row, fields=fields)[0] for fields in proposed] == [[("a", "b")], [("a", "c")]]


def test_the_house_s_own_names_come_first_and_a_key_before_everything(read):
    row = {"prompt": "hi", "response": "ho", "answer": "no", "messages": [HI], "question": "no"}
    assert read(row)[0] == [PLAIN]
    fields = {"format": "prompt_response", "prompt": "question", "response": "answer"}
    assert read(row, fields=fields)[0] == [("no", "no")]


def test_an_answer_that_is_needed_and_not_there_is_refused_with_the_way_out(read):
    message = (
        r"text is a prompt, and none of the columns \['text'\] holds texts under .* completion,"
    )
    with pytest.raises(DataError, match=message) as info:
        read({"text": "hi"})
    assert "data.x.fields={format: prompt_response, prompt: text, response: null}" in str(
        info.value
    )


def test_unknown_columns_are_refused_with_the_nearest_usual_one(read):
    with pytest.raises(
        DataError, match=r"did you mean 'promt' for 'prompt'\? Say which .*data\.x\.fields"
    ):
        read({"promt": "hi", "n": 1})


def test_a_first_row_without_an_answer_does_not_hide_the_column(read):
    rows = [{"question": "a", "answer": None}, {"question": "b", "answer": "c"}]
    assert read(*rows)[0] == [("a", None), ("b", "c")]
    with pytest.raises(DataError, match=r"rows\.jsonl:2: no field 'answer'"):
        read({"question": "b", "answer": "c"}, {"question": "b"})


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        (
            {"conversations": "hi"},
            {"format": "sharegpt"},
            r"a list of messages \{from, value\}, got",
        ),
        (
            {"conversations": [{"from": "human"}]},
            {"format": "sharegpt"},
            r"rows\.jsonl:1: field 'conversations'\[0\] must be \{from, value\}",
        ),
        (
            {"conversations": [{"from": "narrator", "value": "x"}]},
            None,
            r"\[0\] is from 'narrator'; expected one of human, user",
        ),
        ({"chosen": "ho", "rejected": "no"}, None, "must be a chat that begins with its prompt"),
        ({"chosen": [HO], "rejected": [HO]}, None, "holds answers alone; name the field"),
        (
            {"prompt": [HI], "response": 7},
            {"format": "prompt_response"},
            "answer to a chat must be",
        ),
        ({"prompt": 7, "response": "a"}, None, "field 'prompt' must be a text, got int 7"),
    ],
)
def test_a_row_of_another_form_is_named(read, row, fields, message):
    with pytest.raises(DataError, match=message):
        read(row, fields=fields)


def test_every_layout_can_be_named_by_key(read):
    share = [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "ho"}]
    row = {"talk": share, "q": "hi", "good": "ho"}
    assert read(row, fields={"format": "sharegpt", "conversations": "talk"})[0] == [CHAT]
    preference = {"format": "preference", "prompt": "q", "chosen": "good"}
    assert read(row, fields=preference)[0] == [PLAIN]

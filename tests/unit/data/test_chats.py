"""What is learned of a chat is what transformers renders of it."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest
from chat_templates import END_OF_TURN, TEMPLATES, TOKENIZERS

from distill_system.data import build_tokenizer, load_run_data
from distill_system.errors import DataError


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


SHORT = [user("what is it?"), assistant("The cat")]
LONG = [
    system("Be kind."),
    user("the cat sat\non the mat"),
    assistant("What did it say? It said: no. é"),
    user("12 + 30?"),
    assistant("42\n\nIs it?"),
]
THOUGHT = [
    user("3?"),
    assistant("<think>\nit is\n</think>\n\nThree", reasoning_content=None),
    user("4?"),
    assistant("Four", reasoning_content="it is 4"),
]
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {}}}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Of a city.", "parameters": {"type": "object"}},
}


def call(arguments):
    return [{**CALL, "function": {"name": "weather", "arguments": arguments}}]


@pytest.fixture(scope="module", params=TOKENIZERS)
def any_tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="module")
def bytes_tokenizer():
    return TOKENIZERS["bytes"]()


@pytest.fixture
def read(build_long_config, write_jsonl):
    """Rows as supervised trajectories."""

    def load(tokenizer, rows, *, template=None, fields=None, source=None, stops=(), **data):
        if template is not None:
            tokenizer.chat_template = template
        path = write_jsonl("rows.jsonl", rows)
        fields = {"format": "messages", **(fields or {})}
        rows_of = {"type": "jsonl", "path": str(path), "fields": fields, **(source or {})}
        config = build_long_config(student_sft=rows_of, **data)
        return load_run_data(config, tokenizer, ["student_sft"], stop_token_ids=stops).student_sft

    return load


@pytest.fixture
def ask(build_long_config, write_jsonl):
    """Rows as prompts for rollouts."""

    def load(tokenizer, rows, *, template=None, fields=None, **data):
        if template is not None:
            tokenizer.chat_template = template
        path = write_jsonl("rows.jsonl", rows)
        fields = {"format": "messages", **(fields or {})}
        rows_of = {"type": "jsonl", "path": str(path), "fields": fields}
        config = build_long_config(prompts=rows_of, **data)
        return load_run_data(config, tokenizer, ["prompts"]).prompts

    return load


def by_transformers(tokenizer, messages, *, ask, **values):
    """Token ids as transformers makes them, on the day of these tests."""
    return tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=ask,
        tokenize=True,
        return_dict=False,
        strftime_now=lambda form: form.replace("%d %b %Y", "01 Mar 2026"),
        **values,
    )


def check_row(tokenizer, row, messages, family, **values):
    """The row is the rendered conversation up to the end of its last turn, split at its prompt."""
    whole = by_transformers(tokenizer, messages, ask=False, **values)
    prompt = by_transformers(tokenizer, messages[:-1], ask=True, **values)
    ids = row.token_ids.tolist()
    assert ids[: row.num_prompt_tokens] == prompt
    assert whole[: len(ids)] == ids
    assert tokenizer.decode(whole[len(ids) :]).strip() == ""
    assert tokenizer.decode([ids[-1]]) == END_OF_TURN[family]
    end = ids[-1]
    assert end not in row.response_ids.tolist()[:-1]


@pytest.mark.parametrize("messages", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("family", TEMPLATES)
def test_a_chat_is_learned_as_transformers_renders_it(any_tokenizer, read, family, messages):
    end = any_tokenizer.convert_tokens_to_ids(END_OF_TURN[family])
    [row] = read(any_tokenizer, [{"messages": messages}], template=TEMPLATES[family], stops=[end])
    check_row(any_tokenizer, row, messages, family)


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_rollout_is_asked_what_transformers_renders(any_tokenizer, ask, family):
    rows = [{"messages": LONG}, {"messages": LONG[:-1]}, {"messages": LONG[:2]}]
    prompts = ask(any_tokenizer, rows, template=TEMPLATES[family])
    wanted = [by_transformers(any_tokenizer, m, ask=True) for m in (LONG[:-1], LONG[:-1], LONG[:2])]
    assert [prompt.token_ids.tolist() for prompt in prompts] == wanted


def test_plain_rows_are_chats_of_one_question_where_that_is_asked_for(any_tokenizer, read):
    rows = [{"prompt": "what is it?", "response": "The cat"}]
    fields = {"format": "prompt_response"}
    [plain] = read(
        any_tokenizer, rows, template=TEMPLATES["mistral"], fields=fields, use_chat_template=True
    )
    [chat] = read(any_tokenizer, [{"messages": SHORT}])
    assert plain.token_ids.tolist() == chat.token_ids.tolist()
    assert plain.num_prompt_tokens == chat.num_prompt_tokens


def test_the_answer_begins_with_no_mark_that_the_template_does_not_hold(read):
    tokenizer = TOKENIZERS["metaspace"]()
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    [row] = read(tokenizer, [{"messages": [user("a"), assistant("that")]}], template=template)
    assert not tokenizer.convert_ids_to_tokens(int(row.response_ids[0])).startswith("▁")
    assert tokenizer("that")["input_ids"][0] != row.response_ids[0]  # alone it begins with a mark


def test_the_end_of_a_turn_ends_the_answer_only_where_the_run_stops_at_it(bytes_tokenizer, read):
    rows = [{"messages": SHORT}]
    end = bytes_tokenizer.convert_tokens_to_ids("<end_of_turn>")
    [stops] = read(bytes_tokenizer, rows, template=TEMPLATES["gemma"], stops=[end])
    assert bytes_tokenizer.decode(stops.response_ids) == "The cat<end_of_turn>"
    [goes_on] = read(bytes_tokenizer, rows)
    assert bytes_tokenizer.decode(goes_on.response_ids) == "The cat<end_of_turn>\n</s>"


def test_a_second_end_behind_the_turn_is_not_learned(bytes_tokenizer, read):
    template = TEMPLATES["qwen"] + "{%- if not add_generation_prompt %}{{- eos_token }}{%- endif %}"
    end = bytes_tokenizer.convert_tokens_to_ids("<|im_end|>")
    [row] = read(bytes_tokenizer, [{"messages": SHORT}], template=template, stops=[end])
    assert bytes_tokenizer.decode(row.response_ids) == "<think>\n\n</think>\n\nThe cat<|im_end|>"


# Thoughts


def test_thoughts_are_shown_and_stripped_as_the_template_does(any_tokenizer, read):
    end = any_tokenizer.convert_tokens_to_ids("<|im_end|>")
    [row] = read(any_tokenizer, [{"messages": THOUGHT}], template=TEMPLATES["qwen"], stops=[end])
    check_row(any_tokenizer, row, THOUGHT, "qwen")
    assert any_tokenizer.decode(row.response_ids) == (
        "<think>\nit is 4\n</think>\n\nFour<|im_end|>"
    )
    think = any_tokenizer.convert_tokens_to_ids("<think>")
    assert row.token_ids.tolist().count(think) == 1  # the first turn's are gone


def test_thoughts_spelled_in_the_answer_are_tokens(bytes_tokenizer, read):
    chat = [user("3?"), assistant("<think>\nit is\n</think>\n\nThree")]
    end = bytes_tokenizer.convert_tokens_to_ids("<|im_end|>")
    [row] = read(bytes_tokenizer, [{"messages": chat}], template=TEMPLATES["qwen"], stops=[end])
    check_row(bytes_tokenizer, row, chat, "qwen")
    assert bytes_tokenizer.convert_tokens_to_ids("<think>") == row.response_ids[0]


@pytest.mark.parametrize("thinks", [True, False])
def test_values_for_the_template_are_given_to_every_rendering(bytes_tokenizer, read, ask, thinks):
    values = {"enable_thinking": thinks}
    [prompt] = ask(
        bytes_tokenizer,
        [{"messages": SHORT}],
        template=TEMPLATES["qwen"],
        chat_template_kwargs=values,
    )
    assert prompt.token_ids.tolist() == by_transformers(
        bytes_tokenizer, SHORT[:-1], ask=True, **values
    )
    assert bytes_tokenizer.decode(prompt.token_ids).endswith("</think>\n\n") != thinks
    [row] = read(bytes_tokenizer, [{"messages": SHORT}], chat_template_kwargs=values)
    assert row.token_ids[: row.num_prompt_tokens].tolist() == prompt.token_ids.tolist()
    assert bytes_tokenizer.decode(row.response_ids).startswith("The cat") != thinks


def test_a_prompt_that_opens_the_answer_otherwise_is_left_where_both_part(bytes_tokenizer, read):
    """The prompt closes an empty block of thoughts, the conversation has thoughts in it."""
    chat = [user("4?"), assistant("Four", reasoning_content="it is 4")]
    values = {"enable_thinking": False}
    [row] = read(
        bytes_tokenizer,
        [{"messages": chat}],
        template=TEMPLATES["qwen"],
        chat_template_kwargs=values,
    )
    prompt = bytes_tokenizer.decode(row.token_ids[: row.num_prompt_tokens])
    assert prompt == "<|im_start|>user\n4?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert bytes_tokenizer.decode(row.response_ids).startswith("it is 4\n</think>\n\nFour")
    whole = by_transformers(bytes_tokenizer, chat, ask=False)
    assert row.token_ids.tolist()[: len(whole)] == whole


def test_an_answer_that_begins_like_the_prompts_opening_is_not_cut_into(bytes_tokenizer, read):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
    )
    chat = [user("4?"), assistant("<thin air")]
    [row] = read(bytes_tokenizer, [{"messages": chat}], template=template)
    assert bytes_tokenizer.decode(row.response_ids).startswith("<thin air<|im_end|>")


def test_a_context_that_changes_with_the_answer_is_refused(bytes_tokenizer, read):
    template = (
        "{{ messages | length }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .* otherwise once the answer is there"):
        read(bytes_tokenizer, [{"messages": SHORT}], template=template)


# Tools

TALK = [
    user("Oslo?"),
    {"role": "assistant", "content": "", "tool_calls": call({"city": "Oslo", "days": 3})},
    {"role": "tool", "content": "Rain", "tool_call_id": "call00001", "name": "weather"},
    assistant("Rain today."),
]


@pytest.mark.parametrize("family", ["qwen", "llama", "mistral"])
@pytest.mark.parametrize("form", ["mapping", "text"])
def test_calls_and_tools_are_learned_as_the_template_renders_them(
    any_tokenizer, read, family, form
):
    arguments = {"city": "Oslo", "days": 3}
    given = arguments if form == "mapping" else json.dumps(arguments)
    asked = [TALK[0], {**TALK[1], "tool_calls": call(given)}]
    rows = [
        {"messages": [*asked, *TALK[2:]], "tools": [TOOL]},
        {"messages": asked, "tools": [TOOL]},
    ]
    end = any_tokenizer.convert_tokens_to_ids(END_OF_TURN[family])
    [told, called] = read(any_tokenizer, rows, template=TEMPLATES[family], stops=[end])
    check_row(any_tokenizer, told, TALK, family, tools=[TOOL])
    check_row(any_tokenizer, called, TALK[:2], family, tools=[TOOL])
    assert json.dumps(arguments) in any_tokenizer.decode(called.response_ids)
    assert '"Of a city."' in any_tokenizer.decode(called.token_ids[: called.num_prompt_tokens])


def test_arguments_are_given_as_a_text_to_a_template_that_writes_them_as_they_are(
    bytes_tokenizer, read
):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls "
        "or [] %}{{ c.function.name }}({{ c.function.arguments }}){% endfor %}<|im_end|>"
        "{% endfor %}"
    )
    rows = [{"messages": [TALK[0], {**TALK[1], "tool_calls": call(a)}]} for a in ({"é": 1}, "{}")]
    first, second = read(bytes_tokenizer, rows, template=template)
    assert 'weather({"é": 1})' in bytes_tokenizer.decode(first.response_ids)
    assert "weather({})" in bytes_tokenizer.decode(second.response_ids)


def test_no_content_is_no_text_that_says_none(bytes_tokenizer, read):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls "
        "or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>{% endfor %}"
    )
    rows = [{"messages": [TALK[0], {**TALK[1], "content": None}]}]
    [row] = read(bytes_tokenizer, rows, template=template)
    assert "None" not in bytes_tokenizer.decode(row.token_ids)
    assert '{"name": "weather"' in bytes_tokenizer.decode(row.response_ids)


@pytest.mark.parametrize(
    ("row", "lost"),
    [
        ({"messages": TALK}, "does not show the call of the tool 'weather'"),
        ({"messages": SHORT, "tools": [TOOL]}, r"the tool 'weather' \(fields.tools=null leaves"),
        (
            {"messages": [user("4?"), assistant("4", reasoning_content="it is")]},
            "does not show the answer's reasoning_content",
        ),
    ],
)
def test_what_a_template_does_not_render_is_refused(bytes_tokenizer, read, row, lost):
    with pytest.raises(DataError, match=f"data.student_sft: rows.jsonl:1: .* loses .*{lost}"):
        read(bytes_tokenizer, [row], template=TEMPLATES["zephyr"])


def test_tools_can_be_left_out(bytes_tokenizer, read):
    rows = [{"messages": SHORT, "tools": [TOOL]}]
    [row] = read(bytes_tokenizer, rows, template=TEMPLATES["zephyr"], fields={"tools": None})
    check_row(bytes_tokenizer, row, SHORT, "zephyr")


def test_tools_as_json_text_are_tools(bytes_tokenizer, read):
    rows = [{"messages": SHORT, "tools": tools} for tools in ([TOOL], json.dumps([TOOL]))]
    one, other = read(bytes_tokenizer, rows, template=TEMPLATES["qwen"])
    assert one.token_ids.tolist() == other.token_ids.tolist()


# Content as parts


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(("family", "between"), [("gemma", ""), ("zephyr", "\n"), ("qwen", "\n")])
def test_parts_are_joined_by_the_template_or_by_a_line_end(bytes_tokenizer, read, family, between):
    """Gemma's template writes parts, Zephyr's would write Python, Qwen's nothing at all."""
    rows = [{"messages": [user(parts("what", "is it?")), assistant(parts("The cat"))]}]
    end = bytes_tokenizer.convert_tokens_to_ids(END_OF_TURN[family])
    [row] = read(bytes_tokenizer, rows, template=TEMPLATES[family], stops=[end])
    check_row(bytes_tokenizer, row, [user(f"what{between}is it?"), SHORT[1]], family)


@pytest.mark.parametrize(
    "content", [[{"type": "image", "image": "x.png"}], ["text"], [{"type": "text", "text": 3}]]
)
def test_parts_that_are_no_text_are_refused(bytes_tokenizer, read, content):
    with pytest.raises(DataError, match=r"rows\.jsonl:1: field 'messages'\[0\] .*text parts"):
        read(bytes_tokenizer, [{"messages": [user(content), SHORT[1]]}], template="")


# Several assistant turns


@pytest.mark.parametrize("family", TEMPLATES)
def test_every_turn_is_learned_after_the_conversation_up_to_it(any_tokenizer, read, family):
    end = any_tokenizer.convert_tokens_to_ids(END_OF_TURN[family])
    rows = read(
        any_tokenizer,
        [{"messages": LONG}, {"messages": SHORT}],
        template=TEMPLATES[family],
        fields={"assistant_turns": "all"},
        stops=[end],
    )
    assert [row.trajectory_id for row in rows] == [
        "student_sft:0.turn_1",
        "student_sft:0",
        "student_sft:1",
    ]
    for row, messages in zip(rows, (LONG[:3], LONG, SHORT), strict=True):
        check_row(any_tokenizer, row, messages, family)


@pytest.mark.parametrize("name", ["bytes", "metaspace"])
def test_turns_are_what_the_assistant_mask_of_transformers_marks(read, name):
    """Unigram takes unknown characters in a row for one, of which the mask marks all or none."""
    tokenizer = TOKENIZERS[name]()
    template = (
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content }}{{ eos_token }}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    rows = read(
        tokenizer,
        [{"messages": LONG}],
        template=template,
        fields={"assistant_turns": "all"},
    )
    marked = tokenizer.apply_chat_template(
        LONG, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = marked["input_ids"], marked["assistant_masks"]
    learned = [0] * len(ids)
    for row in rows:
        assert ids[: row.token_ids.size] == row.token_ids.tolist()
        learned[row.num_prompt_tokens : row.token_ids.size] = [1] * row.num_response_tokens
    assert learned == mask


def test_the_mask_says_that_what_opens_an_answer_is_not_learned(bytes_tokenizer, read):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}Answer: "
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    end = bytes_tokenizer.convert_tokens_to_ids("<|im_end|>")
    [row] = read(bytes_tokenizer, [{"messages": SHORT}], template=template, stops=[end])
    assert bytes_tokenizer.decode(row.response_ids) in ("The cat<|im_end|>", " The cat<|im_end|>")


def test_a_chat_that_ends_with_a_question_is_learned_up_to_its_last_answer(bytes_tokenizer, read):
    rows = [{"messages": LONG[:-1]}]
    fields = {"assistant_turns": "all"}
    [row] = read(bytes_tokenizer, rows, template=TEMPLATES["zephyr"], fields=fields)
    check_row(bytes_tokenizer, row, LONG[:3], "zephyr")
    with pytest.raises(DataError, match="a supervised row needs an answer"):
        read(bytes_tokenizer, rows)


# The day, and templates of one's own


def test_the_day_is_the_runs_and_not_todays(bytes_tokenizer, ask):
    [prompt] = ask(
        bytes_tokenizer, [{"messages": SHORT}], template=TEMPLATES["llama"], chat_date="1999-12-31"
    )
    assert "Today: 31 Dec 1999" in bytes_tokenizer.decode(prompt.token_ids)


def test_a_template_of_ones_own_is_text_or_a_file(build_long_config, tmp_path):
    (tmp_path / "mine.jinja").write_text(TEMPLATES["zephyr"])
    for given in ("mine.jinja", TEMPLATES["zephyr"]):
        config = build_long_config(chat_template=given, directory=str(tmp_path))
        assert build_tokenizer(config, ["a"]).chat_template == TEMPLATES["zephyr"]
    config = build_long_config(chat_template="other.jinja")
    with pytest.raises(DataError, match=r"data\.chat_template='other\.jinja': expected Jinja text"):
        build_tokenizer(config, ["a"])


def test_one_of_several_templates_is_chosen_by_its_name(bytes_tokenizer, ask):
    rows = [{"messages": SHORT}]
    named = {"one": TEMPLATES["zephyr"], "other": TEMPLATES["qwen"]}
    with pytest.raises(DataError, match=r"several .*\['one', 'other'\].*data\.chat_template_name"):
        ask(bytes_tokenizer, rows, template=named)
    [prompt] = ask(bytes_tokenizer, rows, chat_template_name="other")
    assert prompt.token_ids.tolist() == by_transformers(
        bytes_tokenizer, SHORT[:1], ask=True, chat_template="other"
    )
    with pytest.raises(DataError, match=r"chat_template_name='third'.* has \['one', 'other'\]"):
        ask(bytes_tokenizer, rows, chat_template_name="third")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{{ messages | nothing }}", "No filter named 'nothing'"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
    ],
)
def test_whatever_a_template_raises_names_the_row(bytes_tokenizer, read, template, said):
    with pytest.raises(DataError, match=f"data.student_sft: rows.jsonl:1: .*{said}"):
        read(bytes_tokenizer, [{"messages": SHORT}], template=template)


# Rows that say nothing


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"prompt": "q", "response": ""}, {"format": "prompt_response"}),
        ({"prompt": "q", "response": ["", "x"]}, {"format": "prompt_response"}),
        ({"prompt": "q", "response": " \n"}, {"format": "prompt_response"}),
        ({"messages": [user("q"), assistant("")]}, None),
        ({"messages": [user("q"), assistant(" ", tool_calls=[])]}, None),
        ({"messages": [user(""), assistant("a")]}, None),
        ({"messages": [user(parts("", " ")), assistant("a")]}, None),
        ({"messages": [user(" "), assistant("a"), user("b"), assistant("c")]}, None),
    ],
)
def test_an_empty_question_or_answer_is_refused_or_left_out(bytes_tokenizer, read, row, fields):
    good = {"messages": SHORT, "prompt": "what is it?", "response": "The cat"}
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*(empty).*leave_out_empty"):
        read(bytes_tokenizer, [row, good], template=TEMPLATES["qwen"], fields=fields)
    [kept] = read(bytes_tokenizer, [row, good], fields=fields, source={"leave_out_empty": True})
    assert kept.trajectory_id == "student_sft:0"
    assert "The cat" in bytes_tokenizer.decode(kept.response_ids)


def test_an_empty_answer_does_not_matter_where_answers_are_not_read(bytes_tokenizer, ask):
    [prompt] = ask(
        bytes_tokenizer, [{"messages": [user("q"), assistant("")]}], template=TEMPLATES["qwen"]
    )
    assert prompt.text == "q"


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"prompt": "a\ud800", "response": "x"}, {"format": "prompt_response"}),
        ({"prompt": "a", "response": ["x", "\udc00"]}, {"format": "prompt_response"}),
        ({"messages": [user("\ud800"), assistant("x")]}, None),
        ({"messages": [user("a"), assistant("x")], "tools": [{"\ud800": 1}]}, None),
    ],
)
def test_half_a_surrogate_is_refused_with_its_row(bytes_tokenizer, read, row, fields):
    with pytest.raises(DataError, match=r"rows\.jsonl:1: field '\w+': .*half of a surrogate pair"):
        read(bytes_tokenizer, [row], template=TEMPLATES["qwen"], fields=fields)


def test_tables_lend_a_call_no_arguments_of_other_rows(
    build_long_config, bytes_tokenizer, tmp_path
):
    """A table gives every mapping the keys of all; content without text stays null."""
    bytes_tokenizer.chat_template = TEMPLATES["qwen"]
    chats = [
        [TALK[0], {"role": "assistant", "content": None, "tool_calls": call(arguments)}]
        for arguments in ({"city": "Oslo"}, {"days": 3})
    ]
    table = pyarrow.Table.from_pylist([{"messages": chat, "tools": [TOOL]} for chat in chats])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    fields = {"format": "messages"}
    rows_of = {"type": "parquet", "path": str(tmp_path / "rows.parquet"), "fields": fields}
    config = build_long_config(student_sft=rows_of)
    rows = load_run_data(config, bytes_tokenizer, ["student_sft"]).student_sft
    learned = [bytes_tokenizer.decode(row.response_ids) for row in rows]
    assert '"arguments": {"city": "Oslo"}}' in learned[0]
    assert '"arguments": {"days": 3}}' in learned[1]
    assert "null" not in bytes_tokenizer.decode(rows[0].token_ids)


def test_rows_that_a_template_loses_are_left_out_where_that_is_asked_for(bytes_tokenizer, read):
    rows = [{"messages": TALK}, {"messages": SHORT}]
    [kept] = read(
        bytes_tokenizer, rows, template=TEMPLATES["zephyr"], source={"leave_out_refused": True}
    )
    check_row(bytes_tokenizer, kept, SHORT, "zephyr")


@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_turn_of_sharegpt_is_left_out_where_that_is_asked_for(bytes_tokenizer, read, text):
    rows = [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": each}]}
        for each in (text, "The cat")
    ]
    fields = {"format": "sharegpt"}
    [kept] = read(
        bytes_tokenizer,
        rows,
        template=TEMPLATES["zephyr"],
        fields=fields,
        source={"leave_out_empty": True},
    )
    assert bytes_tokenizer.decode(kept.response_ids) == "The cat</s>"


@pytest.mark.parametrize("depth", [990, 30_000])
def test_a_row_that_is_nested_too_deep_is_refused_with_its_place(
    build_long_config, bytes_tokenizer, tmp_path, depth
):
    nested = "[" * depth + "]" * depth
    for number, row in enumerate(
        (f'{{"messages": {nested}}}', f'{{"messages": [], "tools": [{{"a": {nested}}}]}}')
    ):
        row = row.replace('"messages": []', f'"messages": {json.dumps(SHORT)}')
        path = tmp_path / f"rows_{number}.jsonl"
        path.write_text(row)
        rows_of = {"type": "jsonl", "path": str(path), "fields": {"format": "messages"}}
        config = build_long_config(student_sft=rows_of)
        bytes_tokenizer.chat_template = TEMPLATES["qwen"]
        with pytest.raises(DataError, match=rf"rows_{number}\.jsonl:1"):
            load_run_data(config, bytes_tokenizer, ["student_sft"])

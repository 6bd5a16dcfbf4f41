"""What the teacher reads before a prompt and the student does not."""

from __future__ import annotations

import pytest
from chat_templates import TEMPLATES, TOKENIZERS
from pydantic import ValidationError

from distill_system.data import build_tokenizer, load_run_data
from distill_system.data.embedded_tasks import generate_tasks
from distill_system.errors import DataError

EXAMPLES = {"type": "embedded", "split": "train", "num_examples": 3, "seed": 9}
LONG = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_layers": 1,
    "num_heads": 1,
    "max_position_embeddings": 4096,
}


@pytest.fixture
def load(build_config):
    """The run's data, by a teacher that may read long sequences, with its tokenizer."""

    def build(context=None, *, distill=None, **data):
        teacher = {"architecture": LONG, "sft": {"steps": 1, "optimizer": {"learning_rate": 1e-3}}}
        sections = {} if distill is None else {"distill": distill}
        config = build_config(
            data={"teacher_context": context, **data}, teacher=teacher, **sections
        )
        tokenizer = build_tokenizer(config, None)
        return tokenizer, load_run_data(config, tokenizer)

    return build


def test_a_plain_prompt_stands_behind_the_text_and_the_examples(load):
    context = {"text": "{response}<sep>", "examples": EXAMPLES, "separator": "<eos>"}
    tokenizer, data = load(context)
    _, without = load()
    shown = "".join(f"{t.prompt}<sep>{t.answer}<eos>" for t in generate_tasks("train", 3, 9))
    tasks = generate_tasks("train", 30, 2)
    for task, prompt, plain in zip(tasks, data.prompts, without.prompts, strict=True):
        whole = f"{task.answer}<sep>{shown}{task.prompt}<sep>"
        assert prompt.teacher_ids.tolist() == tokenizer(whole)["input_ids"]
        assert prompt.token_ids.tolist() == plain.token_ids.tolist()
        assert (prompt.text, plain.teacher_ids) == (plain.text, None)
    assert all(prompt.teacher_ids is not None for prompt in data.held_out)
    # Its own answer would stand before an evaluated prompt; rows nobody scores have no context.
    assert all(prompt.teacher_ids is None for prompt in data.evaluation["paraphrase"])
    for one, other in zip(data.student_sft, without.student_sft, strict=True):
        assert one.teacher_prompt_ids is None
        assert one.token_ids.tolist() == other.token_ids.tolist()


def test_a_fixed_text_is_read_in_evaluations_and_before_rows_that_the_teacher_scores(load):
    context = {"text": "the answer is<sep>", "fine_tuning": True}
    distill = {"off_policy_source": "dataset", "steps": 1, "optimizer": {"learning_rate": 1e-3}}
    tokenizer, data = load(context, distill=distill)
    before = tokenizer("the answer is<sep>")["input_ids"]
    [*_, prompt] = data.evaluation["paraphrase"]
    assert prompt.teacher_ids.tolist() == [*before, *prompt.token_ids.tolist()]
    for row in data.student_sft:
        own = row.token_ids[: row.num_prompt_tokens].tolist()
        assert row.teacher_prompt_ids.tolist() == [*before, *own]
    _, without = load()
    for row, plain in zip(data.teacher_sft, without.teacher_sft, strict=True):
        assert row.token_ids.tolist() == [*before, *plain.token_ids.tolist()]
        assert row.response_ids.tolist() == plain.response_ids.tolist()


@pytest.mark.parametrize("own", [None, "Be kind."])
def test_a_chat_begins_with_the_text_and_the_examples_are_its_turns(
    build_long_config, write_jsonl, own
):
    tokenizer = TOKENIZERS["bytes"]()
    tokenizer.chat_template = TEMPLATES["qwen"]
    question = {"role": "user", "content": "12 + 30?"}
    system = [] if own is None else [{"role": "system", "content": own}]
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    rows = [{"messages": [*system, question], "hint": "it is {42}"}]
    fields = {"format": "messages"}
    prompts = {"type": "jsonl", "path": str(write_jsonl("rows.jsonl", rows)), "fields": fields}
    shown = str(write_jsonl("shown.jsonl", [{"messages": [*system, *turns]}]))
    config = build_long_config(
        prompts=prompts,
        held_out=prompts | {"path": str(write_jsonl("held_out.jsonl", [
            {"messages": [{"role": "user", "content": "other"}], "hint": "none"}
        ]))},
        teacher_context={
            "text": "Know: {hint}",
            "examples": prompts | {"path": shown},
        },
    )  # fmt: skip
    [prompt] = load_run_data(config, tokenizer, ["prompts"]).prompts
    text = "Know: it is {42}" + ("" if own is None else f"\n\n{own}")
    for ids, messages in (
        (prompt.token_ids, [*system, question]),
        (prompt.teacher_ids, [{"role": "system", "content": text}, *turns, question]),
    ):
        rendered = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert ids.tolist() == rendered


def test_examples_that_are_evaluated_are_left_out(load, write_jsonl):
    [one, other] = generate_tasks("train", 2, 5)
    rows = [{"prompt": task.prompt, "response": task.answer} for task in (one, other)]
    shown = {"type": "jsonl", "path": str(write_jsonl("shown.jsonl", rows))}
    test = {"type": "jsonl", "path": str(write_jsonl("test.jsonl", rows[:1]))}
    tokenizer, data = load({"examples": shown, "separator": "<eos>"}, evaluation={"test": test})
    [prompt] = data.evaluation["test"]
    whole = f"{other.prompt}<sep>{other.answer}<eos>{one.prompt}<sep>"
    assert prompt.teacher_ids.tolist() == tokenizer(whole)["input_ids"]
    assert data.num_removed["teacher_context.examples"] == 1


def test_a_field_that_no_row_has_is_named(load):
    with pytest.raises(DataError, match=r"no field 'hint'.*data\.teacher_context\.text"):
        load({"text": "{hint} "})


def test_a_context_that_is_too_long_is_refused_with_its_prompt(load):
    rows = {"type": "embedded", "split": "train", "num_examples": 30, "seed": 2}
    sets = {"teacher_sft": rows, "student_sft": rows}
    data = load(**sets)[1]
    prompts = [*data.prompts, *data.held_out, *data.evaluation["paraphrase"]]
    sets["max_prompt_tokens"] = longest = max(prompt.token_ids.size for prompt in prompts)
    load({"text": "the cat<sep>", "max_tokens": 3}, **sets)
    with pytest.raises(DataError, match=rf"teacher_context\.max_tokens={longest + 2}; raise the"):
        load({"text": "the cat<sep>", "max_tokens": 2}, **sets)


@pytest.mark.parametrize(
    ("context", "source", "message"),
    [
        ({}, "teacher", "give text or examples"),
        ({"text": "{"}, "teacher", "cannot be read"),
        ({"text": "now"}, "store", "stored samples do not say"),
    ],
)
def test_keys_that_mean_nothing_are_refused(load, context, source, message):
    distill = {"off_policy_source": source, "steps": 1, "optimizer": {"learning_rate": 1e-3}}
    with pytest.raises(ValidationError, match=message):
        load(context, distill=distill, trajectory_store="store")

import numpy as np
import pytest
from pydantic import ValidationError
from tokenizers import processors

from distill_system.data import build_tokenizer, load_run_data, tokenizer_texts
from distill_system.data.embedded_tasks import generate_tasks
from distill_system.errors import DataError
from distill_system.records import Author, Finish

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TRAINED = {"type": "train_bpe", "vocab_size": 300}


def jsonl(path, **values):
    return {"type": "jsonl", "path": str(path), **values}


def decode_split(tokenizer, trajectory):
    at = trajectory.num_prompt_tokens
    return tokenizer.decode(trajectory.token_ids[:at]), tokenizer.decode(trajectory.token_ids[at:])


def test_supervised_rows_become_trajectories_of_prompt_answer_and_end(build_config):
    config = build_config()
    tokenizer = build_tokenizer(config, None)
    data = load_run_data(config, tokenizer)
    tasks = generate_tasks("train", 40, 0)
    assert len(data.teacher_sft) == 40
    for task, trajectory in zip(tasks, data.teacher_sft, strict=True):
        prompt, response = decode_split(tokenizer, trajectory)
        assert (prompt, response) == (task.prompt + "<sep>", task.answer + "<eos>")
        assert trajectory.author is Author.DATASET
        assert trajectory.finish is Finish.STOP
        assert trajectory.temperature == 1.0
        assert trajectory.behaviour_logprobs.dtype == np.float32
    assert len(data.student_sft) == 20
    assert data.student_sft[3].trajectory_id == "student_sft:3"


def test_prompts_carry_ids_text_and_references_of_their_set(build_config):
    config = build_config()
    tokenizer = build_tokenizer(config, None)
    data = load_run_data(config, tokenizer)
    tasks = generate_tasks("paraphrase", 10, 4)
    split = data.evaluation["paraphrase"]
    assert [p.prompt_id for p in split] == [f"evaluation.paraphrase:{i}" for i in range(10)]
    assert [(p.text, p.references) for p in split] == [(t.prompt, t.references) for t in tasks]
    assert tokenizer.decode(split[0].token_ids) == tasks[0].prompt + "<sep>"
    assert [prompt.prompt_id for prompt in data.prompts] == [f"prompts:{i}" for i in range(30)]
    assert all(prompt.references == () for prompt in data.prompts)
    assert len(data.held_out) == 10
    assert data.num_removed == {"teacher_sft": 0, "student_sft": 0, "prompts": 0}


def test_only_the_sets_asked_for_are_loaded(build_config):
    config = build_config()
    data = load_run_data(config, build_tokenizer(config, None), sets=["student_sft", "held_out"])
    assert (len(data.student_sft), len(data.held_out)) == (20, 10)
    assert (data.teacher_sft, data.prompts, data.evaluation) == ((), (), {})
    assert data.num_removed == {"student_sft": 0}


@pytest.fixture
def overlapping(build_config, write_jsonl):
    """Rows 0..9 for training, of which 2 and 5 are held out and 5, 7 and 8 evaluated."""
    rows = [{"prompt": f"ask {{}} {i}\n", "response": f"say {i}"} for i in range(10)]
    train = write_jsonl("train.jsonl", rows)
    held_out = write_jsonl("held_out.jsonl", [{"prompt": rows[i]["prompt"]} for i in (2, 5)])
    test = write_jsonl("test.jsonl", [rows[i] for i in (5, 7, 8)])
    return {
        "prompt_template": "Q: {prompt}",
        "teacher_sft": jsonl(train),
        "student_sft": jsonl(train, num_examples=4),
        "prompts": jsonl(train),
        "held_out": jsonl(held_out),
        "evaluation": {"test": jsonl(test)},
    }


def test_held_out_and_evaluation_prompts_are_removed_from_training(build_config, overlapping):
    config = build_config(tokenizer=TRAINED, data=overlapping)
    tokenizer = build_tokenizer(config, tokenizer_texts(config))
    data = load_run_data(config, tokenizer)
    kept = [0, 1, 3, 4, 6, 9]
    assert [prompt.prompt_id for prompt in data.prompts] == [f"prompts:{i}" for i in kept]
    assert [row.prompt_id for row in data.teacher_sft] == [f"teacher_sft:{i}" for i in kept]
    assert [row.prompt_id for row in data.student_sft] == [f"student_sft:{i}" for i in (0, 1, 3)]
    assert data.num_removed == {"teacher_sft": 4, "student_sft": 1, "prompts": 4}
    assert decode_split(tokenizer, data.teacher_sft[2]) == ("Q: ask {} 3\n", "say 3</s>")
    alone = load_run_data(config, tokenizer, sets=["prompts"])
    assert alone.prompts[2].prompt_id == data.prompts[2].prompt_id
    assert alone.num_removed == {"prompts": 4}


def test_a_set_that_the_removal_empties_is_refused(build_config, overlapping):
    same = {"prompts": {**overlapping["prompts"], "skip": 7, "num_examples": 2}}
    config = build_config(tokenizer=TRAINED, data=overlapping | same)
    tokenizer = build_tokenizer(config, ["ask say"])
    with pytest.raises(DataError, match=r"data\.prompts: each of its 2 prompts also stands in"):
        load_run_data(config, tokenizer)


def test_a_prompt_that_is_too_long_names_its_id_length_limit_and_key(build_config):
    config = build_config(data={"max_prompt_tokens": 3})
    tokenizer = build_tokenizer(config, None)
    with pytest.raises(DataError, match=r"prompt 'teacher_sft:0' \(embedded train\[0\]\) has \d+ "):
        load_run_data(config, tokenizer)
    with pytest.raises(DataError, match=r"'evaluation\.paraphrase:0'.*data\.max_prompt_tokens=3"):
        load_run_data(config, tokenizer, sets=["evaluation"])


def test_a_prompt_of_exactly_the_limit_is_accepted(build_config):
    config = build_config()
    tokenizer = build_tokenizer(config, None)
    longest = max(p.token_ids.size for p in load_run_data(config, tokenizer, ["prompts"]).prompts)
    exact = build_config(data={"max_prompt_tokens": int(longest)})
    assert len(load_run_data(exact, tokenizer, ["prompts"]).prompts) == 30
    short = build_config(data={"max_prompt_tokens": int(longest) - 1})
    with pytest.raises(DataError, match=f"has {longest} tokens"):
        load_run_data(short, tokenizer, ["prompts"])


def test_a_supervised_row_without_answer_is_named(build_config, write_jsonl):
    rows = [{"prompt": "cat", "response": "dog"}, {"prompt": "fox", "response": None}]
    config = build_config(data={"student_sft": jsonl(write_jsonl("rows.jsonl", rows))})
    with pytest.raises(
        DataError, match=r"'student_sft:1' \(rows\.jsonl:2\): a supervised row needs"
    ):
        load_run_data(config, build_tokenizer(config, None))


def test_evaluation_without_references_is_allowed(build_config, write_jsonl):
    path = write_jsonl("rows.jsonl", [{"prompt": "cat"}])
    fields = {"format": "prompt_response", "response": None}
    config = build_config(data={"evaluation": {"open": jsonl(path, fields=fields)}})
    data = load_run_data(config, build_tokenizer(config, None), ["evaluation"])
    assert data.evaluation["open"][0].references == ()


def test_words_outside_of_the_closed_vocabulary_are_refused(build_config, write_jsonl):
    path = write_jsonl("rows.jsonl", [{"prompt": "cat", "response": "zebra"}])
    config = build_config(data={"teacher_sft": jsonl(path)})
    with pytest.raises(DataError, match=r"'teacher_sft:0' \(rows.jsonl:1\): 'zebra' holds words"):
        load_run_data(config, build_tokenizer(config, None))


@pytest.fixture
def bos_tokenizer(build_config):
    """A byte-level tokenizer that puts <s> in front of a text, as Llama's does."""
    tokenizer = build_tokenizer(build_config(tokenizer=TRAINED), ["a cat and a dog"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.mark.parametrize("template", ["{prompt}:", "<s>{prompt}:"])
def test_a_plain_prompt_begins_with_one_bos_and_its_answer_with_none(
    build_config, bos_tokenizer, template
):
    config = build_config(tokenizer=TRAINED, data={"prompt_template": template})
    data = load_run_data(config, bos_tokenizer)
    task = generate_tasks("train", 40, 0)[0]
    expected = bos_tokenizer(f"{task.prompt}:")["input_ids"]
    assert data.teacher_sft[0].token_ids[: len(expected)].tolist() == expected
    assert bos_tokenizer.decode(data.teacher_sft[0].response_ids) == f"{task.answer}</s>"
    assert data.prompts[0].token_ids[:2].tolist().count(bos_tokenizer.bos_token_id) == 1


def test_the_chat_template_renders_plain_prompts_and_chats(
    build_config, bos_tokenizer, write_jsonl
):
    bos_tokenizer.chat_template = CHAT_TEMPLATE
    user, reply = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
    chats = [{"messages": [user, reply]}, {"messages": [user, reply, user, reply]}]
    rows = jsonl(write_jsonl("chats.jsonl", chats), fields={"format": "messages"})
    sources = {"use_chat_template": True, "teacher_sft": rows}
    config = build_config(tokenizer=TRAINED, data=sources)
    data = load_run_data(config, bos_tokenizer)
    first, second = (decode_split(bos_tokenizer, row) for row in data.teacher_sft)
    assert first == ("<s><user>hi\n<assistant>", "ho\n</s>")
    assert second == ("<s><user>hi\n<assistant>ho\n<user>hi\n<assistant>", "ho\n</s>")
    plain = data.prompts[0]
    assert bos_tokenizer.decode(plain.token_ids) == f"<s><user>{plain.text}\n<assistant>"
    as_transformers_does = bos_tokenizer.apply_chat_template(
        [{"role": "user", "content": plain.text}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    assert plain.token_ids.tolist() == as_transformers_does


def test_the_text_of_a_chat_prompt_is_readable(build_config, bos_tokenizer, write_jsonl):
    bos_tokenizer.chat_template = CHAT_TEMPLATE
    system, user = {"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}
    path = write_jsonl("chats.jsonl", [{"messages": [user]}, {"messages": [system, user]}])
    prompts = jsonl(path, fields={"format": "messages"})
    config = build_config(tokenizer=TRAINED, data={"prompts": prompts})
    texts = [p.text for p in load_run_data(config, bos_tokenizer, ["prompts"]).prompts]
    assert texts == ["hi", "system: be kind\nuser: hi"]


def test_a_chat_without_chat_template_is_refused(build_config, write_jsonl):
    config = build_config(data={"use_chat_template": True})
    with pytest.raises(DataError, match="the tokenizer has none"):
        load_run_data(config, build_tokenizer(config, None))


def test_messages_that_the_chat_template_refuses_are_named(
    build_config, bos_tokenizer, write_jsonl
):
    bos_tokenizer.chat_template = CHAT_TEMPLATE
    path = write_jsonl("chats.jsonl", [{"messages": [{"role": "tool", "content": "x"}]}])
    prompts = jsonl(path, fields={"format": "messages"})
    config = build_config(tokenizer=TRAINED, data={"prompts": prompts})
    with pytest.raises(DataError, match=r"data\.prompts: chats\.jsonl:1: .* refused .*no tools"):
        load_run_data(config, bos_tokenizer)


def mixture(**sources):
    return {"type": "mixture", "sources": sources}


def test_rows_that_a_policy_measures_on_are_read_with_answers_and_never_learned_from(
    build_config, overlapping
):
    train = overlapping["prompts"]
    sources = {
        "one": {"source": train, "held_out": {**train, "skip": 0, "num_examples": 1}},
        "two": {"source": train, "held_out": {**train, "skip": 9, "num_examples": 1}},
    }
    prompts = {**mixture(**sources), "policy": {"every": 2}}
    config = build_config(tokenizer=TRAINED, data={**overlapping, "prompts": prompts})
    tokenizer = build_tokenizer(config, tokenizer_texts(config))
    data = load_run_data(config, tokenizer)
    texts = {
        name: [decode_split(tokenizer, row) for row in rows]
        for name, rows in data.source_held_out.items()
    }
    end = tokenizer.eos_token
    assert texts == {
        "one": [("Q: ask {} 0\n", f"say 0{end}")],
        "two": [("Q: ask {} 9\n", f"say 9{end}")],
    }
    kept = [1, 3, 4, 6]
    assert [row.trajectory_id for row in data.teacher_sft] == [f"teacher_sft:{i}" for i in kept]
    ids = [f"prompts.{name}:{i}" for name in ("one", "two") for i in kept]
    assert [prompt.prompt_id for prompt in data.prompts] == ids


def test_the_prompts_of_a_mixture_carry_their_source(build_config, write_jsonl):
    rows = [{"prompt": f"ask {i}"} for i in range(6)]
    test = write_jsonl("test.jsonl", [{"prompt": "ask 4", "response": "say 4"}])
    config = build_config(
        data={
            "teacher_sft": jsonl(write_jsonl("sft.jsonl", [{"prompt": "a", "response": "b"}])),
            "prompts": mixture(
                few={"source": jsonl(write_jsonl("few.jsonl", rows[:2])), "weight": 2.5},
                many={"source": jsonl(write_jsonl("many.jsonl", rows[2:]))},
            ),
            "evaluation": {"test": jsonl(test)},
        },
        tokenizer=TRAINED,
    )
    tokenizer = build_tokenizer(config, tokenizer_texts(config))
    data = load_run_data(config, tokenizer, sets=["prompts"])
    assert [(p.prompt_id, p.source, p.text) for p in data.prompts] == [
        ("prompts.few:0", "prompts.few", "ask 0"),
        ("prompts.few:1", "prompts.few", "ask 1"),
        ("prompts.many:0", "prompts.many", "ask 2"),
        ("prompts.many:1", "prompts.many", "ask 3"),
        ("prompts.many:3", "prompts.many", "ask 5"),
    ]
    assert data.num_removed == {"prompts.few": 0, "prompts.many": 1}
    assert config.data.prompt_weights == {"prompts.few": 2.5, "prompts.many": 1.0}


def test_what_is_wrong_with_a_source_of_a_mixture_names_its_key(build_config, write_jsonl):
    rows = [{"prompt": "ask"}]
    held_out = write_jsonl("held_out.jsonl", rows)
    test = write_jsonl("test.jsonl", [{"prompt": "ask", "response": "say"}])

    def load(**source):
        config = build_config(
            data={
                "teacher_sft": jsonl(write_jsonl("sft.jsonl", [{"prompt": "a", "response": "b"}])),
                "prompts": mixture(code={"source": source}),
                "held_out": jsonl(held_out),
                "evaluation": {"test": jsonl(test)},
            },
            tokenizer=TRAINED,
        )
        load_run_data(config, build_tokenizer(config, tokenizer_texts(config)), sets=["prompts"])

    with pytest.raises(DataError, match=r"^data\.prompts\.sources\.code\.source\.path='no\.jsonl'"):
        load(**jsonl("no.jsonl"))
    with pytest.raises(DataError, match=r"^data\.prompts\.sources\.code\.source: each of its 1"):
        load(**jsonl(held_out))
    with pytest.raises(ValidationError, match=r"sources\.code\.source: answers are not read here"):
        load(**jsonl(held_out, min_response_tokens=1))


@pytest.mark.parametrize("sources", [{}, {"a b": {"source": {"type": "jsonl", "path": "x"}}}])
def test_a_mixture_needs_sources_with_names_that_ids_can_carry(build_config, sources):
    with pytest.raises(ValidationError, match="each named by letters, digits"):
        build_config(data={"prompts": mixture(**sources)})

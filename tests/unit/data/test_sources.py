import datasets
import pyarrow
import pyarrow.parquet
import pytest
from pydantic import TypeAdapter

from distill_system.config.data import DataConfig, Source
from distill_system.data import Example, load_examples
from distill_system.errors import DataError

ROWS = [{"prompt": f"ask {i}", "response": f"say {i}"} for i in range(5)]
INSTRUCTION = {"format": "instruction"}
MESSAGES = {"format": "messages"}


@pytest.fixture
def load(tmp_path):
    def load_source(key="data.prompts", with_answers=True, **values):
        source = TypeAdapter(Source).validate_python(values)
        data = DataConfig(
            directory=str(tmp_path), prompts=source, held_out=source, evaluation={"test": source}
        )
        return load_examples(source, data, key=key, with_answers=with_answers)

    return load_source


def asked(examples):
    return [(example.prompt, example.answer) for example in examples]


EXPECTED = [(f"ask {i}", f"say {i}") for i in range(5)]


def test_jsonl_rows_are_read_in_order_and_blank_lines_skipped(load, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"prompt": "a\\u2028b", "response": "ü"}\n\n  \n{"prompt": "c", "response": "d"}'
    )
    examples = load(type="jsonl", path="rows.jsonl")
    assert asked(examples) == [("a\u2028b", "ü"), ("c", "d")]
    assert [example.row for example in examples] == ["rows.jsonl:1", "rows.jsonl:4"]


def test_an_absolute_path_does_not_start_from_the_directory(load, write_jsonl):
    path = write_jsonl("rows.jsonl", ROWS)
    assert asked(load(type="jsonl", path=str(path))) == EXPECTED


def test_parquet_and_datasets_give_the_rows_that_jsonl_gives(load, write_jsonl, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl("set/train.jsonl", ROWS)
    extra = [{**row, "image": b"not needed"} for row in ROWS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(extra), tmp_path / "rows.parquet")
    from_parquet = load(type="parquet", path="rows.parquet")
    from_datasets = load(type="datasets", name="set")
    assert asked(from_parquet) == asked(from_datasets) == EXPECTED
    assert from_parquet[3].row == "rows.parquet[3]"
    assert from_datasets[3].row == "set train[3]"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_skip_and_num_examples_choose_a_window(load, write_jsonl, tmp_path, kind):
    write_jsonl("rows.jsonl", ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    source = {"type": kind, "path": f"rows.{kind}"}
    assert asked(load(**source, skip=1, num_examples=3)) == EXPECTED[1:4]
    assert asked(load(**source, skip=4)) == EXPECTED[4:]
    with pytest.raises(DataError, match=r"expected 3 rows after skipping 3, the data set has 5"):
        load(**source, skip=3, num_examples=3)
    with pytest.raises(DataError, match=r"at least one row after skipping 5, the data set has 5"):
        load(**source, skip=5)


def test_an_embedded_source_makes_as_many_examples_as_asked(load):
    examples = load(type="embedded", split="paraphrase", num_examples=7, seed=2)
    assert len({example.prompt for example in examples}) == 7
    assert all(example.answer in example.references for example in examples)
    assert all(len(example.references) == 3 for example in examples)


def test_a_list_of_accepted_texts_becomes_the_references(load, write_jsonl):
    write_jsonl("rows.jsonl", [{"prompt": "a", "response": ["x", "y"]}])
    (example,) = load(type="jsonl", path="rows.jsonl")
    assert example == Example(row="rows.jsonl:1", prompt="a", references=("x", "y"), answer="x")


def test_an_instruction_is_followed_by_its_input_where_there_is_one(load, write_jsonl):
    rows = [
        {"instruction": "add", "input": "1 2", "output": "3"},
        {"instruction": "sing", "input": " ", "output": "la"},
        {"instruction": "sing", "input": None, "output": "la"},
    ]
    write_jsonl("rows.jsonl", rows)
    examples = load(type="jsonl", path="rows.jsonl", fields=INSTRUCTION)
    assert asked(examples) == [("add\n\n1 2", "3"), ("sing", "la"), ("sing", "la")]
    without = load(type="jsonl", path="rows.jsonl", fields={**INSTRUCTION, "input": None})
    assert without[0].prompt == "add"


def test_a_last_message_of_the_assistant_is_the_answer(load, write_jsonl):
    user = {"role": "user", "content": "hi"}
    reply = {"role": "assistant", "content": "ho"}
    write_jsonl("rows.jsonl", [{"messages": [user, reply]}, {"messages": [user, reply, user]}])
    answered, open_ended = load(type="jsonl", path="rows.jsonl", fields=MESSAGES)
    assert (answered.prompt, answered.answer, answered.references) == ((user,), "ho", ("ho",))
    assert (open_ended.prompt, open_ended.answer) == ((user, reply, user), None)
    assert open_ended.references == ()


def test_answers_need_not_exist_where_they_are_not_read(load, write_jsonl):
    write_jsonl("rows.jsonl", [{"prompt": "a"}])
    (example,) = load(type="jsonl", path="rows.jsonl", with_answers=False)
    assert (example.answer, example.references) == (None, ())
    (example,) = load(
        type="jsonl", path="rows.jsonl", fields={"format": "prompt_response", "response": None}
    )
    assert example.answer is None
    write_jsonl("null.jsonl", [{"prompt": "a", "response": None}])
    assert load(type="jsonl", path="null.jsonl")[0].answer is None


def test_a_missing_file_is_named_with_the_path_tried(load, tmp_path):
    with pytest.raises(DataError) as info:
        load(type="jsonl", path="no/such.jsonl")
    for part in ("data.prompts.path='no/such.jsonl'", f"{tmp_path}/no/such.jsonl", "no such file"):
        assert part in str(info.value)
    assert f"data.directory='{tmp_path}'" in str(info.value)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="it is a folder"):
        load(type="parquet", path="folder")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a", }', r"rows\.jsonl:3: not valid JSON"),
        (b'{"prompt": "\xff"}', r"rows\.jsonl:3: not valid JSON"),
        (b'["a", "b"]', r"rows\.jsonl:3: expected one JSON object a line, got list"),
        (
            b'{"prompt": 7, "response": "b"}',
            r"rows\.jsonl:3: field 'prompt' must be a text, got int 7",
        ),
        (b'{"prompt": " ", "response": "b"}', r"rows\.jsonl:3: field 'prompt' is empty"),
        (
            b'{"prompt": "a", "response": 7}',
            r"rows\.jsonl:3: field 'response' must be a text or a list",
        ),
        (
            b'{"prompt": "a", "response": []}',
            r"'response' must be a text or a list .* got list \[\]",
        ),
        (b'{"prompt": "a", "response": ["b", 1]}', r"'response' must be a text or a list"),
        (
            b'{"promt": "a", "response": "b"}',
            r"rows\.jsonl:3: no field 'prompt', the fields are \['promt', 'response'\]; "
            r"did you mean 'promt'\? Set data\.prompts\.fields\.prompt",
        ),
        (
            b'{"prompt": "a", "answer": "b"}',
            r"rows\.jsonl:3: no field 'response', .*fields\.response to .* or to null",
        ),
    ],
)
def test_a_bad_jsonl_row_is_named_by_file_and_line(load, tmp_path, line, message):
    good = b'{"prompt": "a", "response": "b"}\n'
    (tmp_path / "rows.jsonl").write_bytes(good + b"\n" + line + b"\n" + good)
    with pytest.raises(DataError, match=message):
        load(type="jsonl", path="rows.jsonl")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", r"field 'messages' must be a list of messages \{role, content\}, got str 'hi'"),
        ([], r"must be a list of messages"),
        (["hi"], r"field 'messages'\[0\] must be \{role, content\}, got str 'hi'"),
        ([{"role": "user"}], r"\[0\] must have 'content' as a text, got NoneType None"),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            r"got a part of type 'image' at \[0\]",
        ),
        ([{"role": "assistant", "content": "ho"}], r"holds an assistant's answer and no message"),
    ],
)
def test_a_bad_chat_is_named_by_file_and_line(load, write_jsonl, messages, message):
    write_jsonl("rows.jsonl", [{"messages": messages}])
    with pytest.raises(DataError, match=r"^rows\.jsonl:1: .*" + message):
        load(type="jsonl", path="rows.jsonl", fields=MESSAGES)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_jsonl_file_is_refused(load, tmp_path, content):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"data\.prompts: the data set is empty"):
        load(type="jsonl", path="rows.jsonl")


def test_an_empty_or_broken_parquet_file_is_refused(load, tmp_path):
    empty = pyarrow.table(
        {"prompt": pyarrow.array([], "string"), "response": pyarrow.array([], "string")}
    )
    pyarrow.parquet.write_table(empty, tmp_path / "empty.parquet")
    with pytest.raises(DataError, match=r"data\.prompts: the data set is empty"):
        load(type="parquet", path="empty.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(DataError, match=r"broken\.parquet: not a parquet file"):
        load(type="parquet", path="broken.parquet")


def test_a_column_missing_from_a_table_is_named_before_any_row(load, write_jsonl, tmp_path):
    table = pyarrow.Table.from_pylist([{"question": "a", "response": "b"}])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    message = r"rows\.parquet: no field 'prompt', the fields are \['question', 'response'\]"
    fields = {"format": "prompt_response"}
    with pytest.raises(DataError, match=message):
        load(type="parquet", path="rows.parquet", fields=fields)
    (tmp_path / "set").mkdir()
    write_jsonl("set/train.jsonl", [{"question": "a", "response": "b"}])
    with pytest.raises(DataError, match=r"set train: no field 'prompt'"):
        load(type="datasets", name="set", fields=fields)


def test_an_unknown_split_or_subset_of_a_data_set_is_refused(load, write_jsonl, tmp_path):
    (tmp_path / "set").mkdir()
    write_jsonl("set/train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"split='test'.*Should be one of \['train'\]"):
        load(type="datasets", name="set", split="test")
    with pytest.raises(DataError, match=r"subset='french'.*not found"):
        load(type="datasets", name="set", subset="french")


def test_a_data_set_that_is_nowhere_is_refused(load, tmp_path):
    with pytest.raises(DataError, match=r"data\.prompts: `datasets` could not load name="):
        load(type="datasets", name=str(tmp_path / "nowhere"))


@pytest.fixture(autouse=True)
def cache_of_datasets_in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

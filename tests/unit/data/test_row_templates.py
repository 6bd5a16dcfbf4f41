"""Rows by templates, nested fields, and rows that are left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from pydantic import TypeAdapter

from distill_system.config.data import DataConfig, Source
from distill_system.data import Example, build_tokenizer, load_examples, load_run_data
from distill_system.errors import DataError

Load = Callable[..., list[Example]]

TRANSLATIONS = [
    {"translation": {"en": "Thank you.", "de": "Danke."}, "id": 3},
    {"translation": {"en": "Good {evening}.", "de": "Guten Abend."}, "id": 4},
]
TRANSLATE = {
    "format": "template",
    "prompt": "English: {translation.en}\nGerman:",
    "response": " {translation.de}",
}
TRANSLATED = [
    ("English: Thank you.\nGerman:", " Danke."),
    ("English: Good {evening}.\nGerman:", " Guten Abend."),
]
REASON = {
    "format": "template",
    "prompt": "{question}",
    "response": "{facts} So the answer is {answer}.",
    "reference": "{answer}",
}


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def load_source(*, with_answers: bool = True, **values: Any) -> list[Example]:
        source = TypeAdapter(Source).validate_python(values)
        sets = {"prompts": source, "held_out": source, "evaluation": {"test": source}}
        data = DataConfig.model_validate({"directory": str(tmp_path), **sets})
        return load_examples(source, data, key="data.evaluation.test", with_answers=with_answers)

    return load_source


def _asked(examples: list[Example]) -> list[tuple[object, str | None]]:
    return [(example.prompt, example.answer) for example in examples]


def test_nested_fields_are_read_alike_from_jsonl_parquet_and_datasets(
    load: Load, write_jsonl: Any, tmp_path: Path
) -> None:
    (tmp_path / "set" / "en-de").mkdir(parents=True)
    (tmp_path / "set" / "other").mkdir()
    write_jsonl("rows.jsonl", TRANSLATIONS)
    write_jsonl("set/other/train.jsonl", [{"text": "of another kind"}])
    table = pyarrow.Table.from_pylist(TRANSLATIONS)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    pyarrow.parquet.write_table(table, tmp_path / "set" / "en-de" / "pairs-train.parquet")
    from_datasets = load(type="datasets", name="set", folder="en-de", fields=TRANSLATE)
    assert _asked(from_datasets) == TRANSLATED
    assert _asked(load(type="jsonl", path="rows.jsonl", fields=TRANSLATE)) == TRANSLATED
    assert _asked(load(type="parquet", path="rows.parquet", fields=TRANSLATE)) == TRANSLATED
    plain = {"format": "prompt_response", "prompt": "translation.en", "response": "translation.de"}
    assert _asked(load(type="parquet", path="rows.parquet", fields=plain)) == [
        ("Thank you.", "Danke."),
        ("Good {evening}.", "Guten Abend."),
    ]


def test_subset_folder_and_revision_of_a_data_set_reach_the_hub(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, subset: str | None, **values: Any) -> datasets.Dataset:
        asked.append((name, subset, values))
        return datasets.Dataset.from_list(TRANSLATIONS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load(
        type="datasets",
        name="IWSLT/iwslt2017",
        subset="pairs",
        folder="en-de",
        revision="refs/convert/parquet",
        split="test",
        fields=TRANSLATE,
    )
    expected = {"data_dir": "en-de", "revision": "refs/convert/parquet", "split": "test"}
    assert asked == [("IWSLT/iwslt2017", "pairs", expected)]


def test_a_field_whose_own_name_holds_a_dot_comes_first(load: Load, write_jsonl: Any) -> None:
    write_jsonl("rows.jsonl", [{"a.b": "outer", "a": {"b": "inner", "c": "deep"}}])
    fields = {"format": "template", "prompt": "{a.b} {a.c}"}
    assert load(type="jsonl", path="rows.jsonl", fields=fields)[0].prompt == "outer deep"


def test_what_is_learned_and_what_is_scored_may_differ(load: Load, write_jsonl: Any) -> None:
    rows = [
        {
            "question": "Do fish swim?",
            "answer": True,
            "facts": ["Fish live in water.", "It is wet."],
        },
        {"question": "Do cats fly?", "answer": "no", "facts": "Cats have no wings."},
    ]
    write_jsonl("rows.jsonl", rows)
    first, second = load(type="jsonl", path="rows.jsonl", fields=REASON)
    assert first.answer == "Fish live in water. It is wet. So the answer is yes."
    assert first.references == ("yes",)
    assert second.answer == "Cats have no wings. So the answer is no."
    assert second.references == ("no",)


def test_answers_need_not_exist_where_they_are_not_read(load: Load, write_jsonl: Any) -> None:
    write_jsonl("rows.jsonl", [{"question": "Do fish swim?", "number": 7}])
    fields = {**REASON, "prompt": "{number}: {question}"}
    (example,) = load(type="jsonl", path="rows.jsonl", fields=fields, with_answers=False)
    assert (example.prompt, example.answer, example.references) == ("7: Do fish swim?", None, ())


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"en": "x"}, r"rows\.jsonl:1: no field 'translation\.en', the fields are \['en'\]"),
        (
            {"translation": {"de": "x"}},
            r"rows\.jsonl:1: no field 'translation\.en': field 'translation' is dict",
        ),
        ({"translation": "x"}, r"field 'translation' is str 'x'"),
        ({"translation": {"en": " ", "de": "x"}}, r"field 'translation\.en' is empty"),
        (
            {"translation": {"en": 1.5, "de": "x"}},
            r"'translation\.en' must be a text, .* float 1\.5",
        ),
        ({"translation": {"en": ["a", 2], "de": "x"}}, r"to stand in a template, got list"),
    ],
)
def test_a_row_that_does_not_fit_its_template_is_named(
    load: Load, write_jsonl: Any, row: dict[str, Any], said: str
) -> None:
    write_jsonl("rows.jsonl", [row])
    with pytest.raises(DataError, match=said):
        load(type="jsonl", path="rows.jsonl", fields=TRANSLATE)


def test_an_instruction_is_put_into_the_template_of_its_kind(load: Load, write_jsonl: Any) -> None:
    rows = [
        {"instruction": "add {input}", "input": "{1} 2", "output": ["3", "three"]},
        {"instruction": "sing", "input": "\n", "output": "la"},
    ]
    write_jsonl("rows.jsonl", rows)
    fields = {
        "format": "instruction",
        "template": "Do: {instruction}.",
        "template_with_input": "Do: {instruction}. With: {input}.",
    }
    added, sung = load(type="jsonl", path="rows.jsonl", fields=fields)
    assert (added.prompt, added.references) == ("Do: add {input}. With: {1} 2.", ("3", "three"))
    assert sung.prompt == "Do: sing."


def test_empty_rows_are_left_out_only_where_asked(load: Load, write_jsonl: Any) -> None:
    texts = [("a", "x"), ("", "y"), ("b", None), ("c", " "), ("d", "z"), ("e", "w")]
    write_jsonl("rows.jsonl", [{"prompt": p, "response": r} for p, r in texts])
    with pytest.raises(DataError, match=r"rows\.jsonl:2: field 'prompt' is empty"):
        load(type="jsonl", path="rows.jsonl")
    source = {"type": "jsonl", "path": "rows.jsonl", "leave_out_empty": True}
    assert _asked(load(**source)) == [("a", "x"), ("d", "z"), ("e", "w")]
    assert _asked(load(**source, skip=1, num_examples=1)) == [("d", "z")]
    unread = load(**source, with_answers=False)
    assert [example.prompt for example in unread] == ["a", "b", "c", "d", "e"]
    with pytest.raises(DataError, match=r"expected 4 rows .* has 6, of which 3 with text"):
        load(**source, num_examples=4)


def test_an_empty_input_is_no_reason_to_leave_a_row_out(load: Load, write_jsonl: Any) -> None:
    rows = [{"instruction": "sing", "input": "", "output": "la"}]
    write_jsonl("rows.jsonl", rows)
    fields = {"format": "instruction"}
    (example,) = load(type="jsonl", path="rows.jsonl", fields=fields, leave_out_empty=True)
    assert example.prompt == "sing"


WORDS = [("cat", "dog"), ("cat dog", "fox"), ("cat dog fox", "cat"), ("fox", "cat dog fox")]


@pytest.fixture
def words(write_jsonl: Any) -> dict[str, Any]:
    """A source of four rows whose tokens are their words; each prompt has a separator as well."""
    path = write_jsonl("words.jsonl", [{"prompt": p, "response": r} for p, r in WORDS])
    return {"type": "jsonl", "path": str(path)}


@pytest.mark.parametrize(
    ("bounds", "kept"),
    [
        ({"max_prompt_tokens": 3}, [0, 1, 3]),
        ({"max_response_tokens": 1}, [0, 1, 2]),
        ({"min_response_tokens": 2}, [3]),
        ({"max_prompt_tokens": 2, "max_response_tokens": 2}, [0]),
        ({"min_response_tokens": 1, "max_response_tokens": 3}, [0, 1, 2, 3]),
    ],
)
def test_rows_outside_of_the_token_bounds_are_left_out_and_counted(
    build_config: Any, words: dict[str, Any], bounds: dict[str, int], kept: list[int]
) -> None:
    config = build_config(data={"student_sft": {**words, **bounds}})
    data = load_run_data(config, build_tokenizer(config, None))
    assert [row.trajectory_id for row in data.student_sft] == [f"student_sft:{i}" for i in kept]
    missing = len(WORDS) - len(kept)
    assert data.num_out_of_bounds == ({"student_sft": missing} if missing else {})
    assert data.num_removed["student_sft"] == 0


def test_long_prompts_are_left_out_of_prompts_and_of_evaluation_too(
    build_config: Any, words: dict[str, Any]
) -> None:
    bounded = {**words, "max_prompt_tokens": 2}
    longest = max(len(prompt.split()) for prompt, _ in WORDS) + 1
    sets = {"evaluation": {"words": bounded}, "max_prompt_tokens": longest}
    config = build_config(data=sets)
    data = load_run_data(config, build_tokenizer(config, None), ["evaluation"])
    assert [prompt.text for prompt in data.evaluation["words"]] == ["cat", "fox"]
    assert data.num_out_of_bounds == {"evaluation.words": 2}


def test_bounds_that_leave_no_row_are_refused(build_config: Any, words: dict[str, Any]) -> None:
    config = build_config(data={"student_sft": {**words, "min_response_tokens": 4}})
    with pytest.raises(DataError, match=r"data\.student_sft: none of its 4 rows is within .*=4"):
        load_run_data(config, build_tokenizer(config, None))

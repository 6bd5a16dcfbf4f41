import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from distill_system.config.data import DataConfig, FieldMap
from distill_system.config.templates import fill_pieces, joined, template_fields

VALUES = {"question": "why {x}?", "answer": "{answer} }{"}


def test_a_template_names_its_fields_in_order_and_each_once() -> None:
    template = "{question} {{not}} {translation.en} {question}"
    assert template_fields(template) == ("question", "translation.en")
    assert template_fields("plain {{}}") == ()


@given(st.lists(st.sampled_from(["{question}", "{answer}", "{{", "}}", "text", "\n"])))
def test_filling_is_str_format_and_values_are_taken_as_they_are(parts: list[str]) -> None:
    template = "".join(parts)
    assert joined(fill_pieces(template, VALUES)) == template.format(**VALUES)


def test_a_dotted_name_is_one_name_and_not_an_attribute() -> None:
    assert joined(fill_pieces("<{a.b}>", {"a.b": "x"})) == "<x>"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("a { b", "cannot be read"),
        ("a } b", "cannot be read"),
        ("{}", "must name fields as {name}"),
        ("{ }", "must name fields as {name}"),
        ("{n:3}", "with nothing after the name"),
        ("{n!r}", "with nothing after the name"),
    ],
)
def test_a_template_that_is_none_is_refused(template: str, said: str) -> None:
    with pytest.raises(ValueError, match="template") as raised:
        template_fields(template)
    assert said in str(raised.value)
    assert repr(template) in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"template": "no field"}, "template must contain {instruction} and no other field"),
        ({"template": "{instruction}{input}"}, "template must contain {instruction} and no other"),
        (
            {"template_with_input": "{instruction}"},
            "template_with_input must contain {instruction} and {input} and no other field",
        ),
        ({"template_with_input": "{instruction} {inptu}"}, "got '{instruction} {inptu}'"),
    ],
)
def test_an_instruction_s_templates_hold_its_own_fields(fields: dict[str, str], said: str) -> None:
    with pytest.raises(ValidationError) as raised:
        TypeAdapter(FieldMap).validate_python({"format": "instruction", **fields})
    assert said in str(raised.value)


def test_a_template_without_any_field_is_refused() -> None:
    with pytest.raises(ValidationError, match="must name at least one"):
        TypeAdapter(FieldMap).validate_python({"format": "template", "prompt": "Answer:"})


@pytest.mark.parametrize("name", ["prompts", "held_out"])
@pytest.mark.parametrize("bound", ["min_response_tokens", "max_response_tokens"])
def test_answers_that_are_not_read_cannot_be_bounded(name: str, bound: str) -> None:
    source = {"type": "jsonl", "path": "rows.jsonl"}
    sets = {"prompts": source, "held_out": source, "evaluation": {"test": source}}
    with pytest.raises(ValidationError, match=f"{name}: answers are not read here"):
        DataConfig.model_validate({**sets, name: {**source, bound: 5}})

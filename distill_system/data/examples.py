"""How one row of a file or data set becomes an example.

In: a mapping from field names to values, and the configured field map.  Out: an Example.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from distill_system.config.data import (
    FieldMap,
    InstructionFields,
    MessagesFields,
    PromptResponseFields,
    TemplateFields,
)
from distill_system.config.templates import fill_template, template_fields
from distill_system.data.row_fields import (
    ANSWER_SETTINGS,
    Row,
    check_fields,
    describe,
    field_value,
    given_templates,
    needed_fields,
)
from distill_system.errors import DataError

Message = dict[str, str]  # role, content


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One row as text.

    row: its place, e.g. "train.jsonl:17".  prompt: a text, or the messages of a chat.
    references: all accepted answers.  answer: the one to learn from; None if the row has none.
    """

    row: str
    prompt: str | tuple[Message, ...]
    references: tuple[str, ...] = ()
    answer: str | None = None


def read_example(
    row: Row, fields: FieldMap, *, where: str, key: str, with_answers: bool
) -> Example:
    """Turn a row into an example.

    Args:
        row: field names to values.
        fields: the configured field map.
        where: the row's place, for messages and Example.row.
        key: configuration key of the field map.
        with_answers: False reads no answers.

    Raises:
        DataError: a field is missing, empty or of the wrong type; the message names the row.
    """
    needed = needed_fields(fields, with_answers)
    check_fields(needed, row.keys(), where, key)
    if isinstance(fields, TemplateFields):
        return _read_templates(row, fields, where, with_answers)
    values = {setting: field_value(row, field, where) for setting, field in needed}
    if isinstance(fields, MessagesFields):
        return _read_messages(values["messages"], f"{where}: field {fields.messages!r}", where)
    if isinstance(fields, PromptResponseFields):
        prompt = _read_text(values["prompt"], fields.prompt, where)
        references = _read_references(values.get("response"), fields.response, where)
    else:
        assert isinstance(fields, InstructionFields), "others become one of these first"
        prompt = _read_instruction(values, fields, where)
        references = _read_references(values.get("output"), fields.output, where)
    answer = references[0] if references else None
    return Example(row=where, prompt=prompt, references=references, answer=answer)


def _read_templates(row: Row, fields: TemplateFields, where: str, with_answers: bool) -> Example:
    texts = {
        setting: _fill(template, row, where)
        for setting, template in given_templates(fields)
        if with_answers or setting not in ANSWER_SETTINGS
    }
    answer = texts.get("response")
    reference = texts.get("reference", answer)
    references = () if reference is None else (reference,)
    return Example(row=where, prompt=texts["prompt"], references=references, answer=answer)


def _fill(template: str, row: Row, where: str) -> str:
    values = {
        name: _as_text(field_value(row, name, where), name, where)
        for name in template_fields(template)
    }
    return fill_template(template, values)


def _as_text(value: object, name: str, where: str) -> str:
    """The text with which a field's value replaces its {name} in a template."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        return " ".join(value)
    if isinstance(value, str):
        return _read_text(value, name, where)
    raise DataError(
        f"{where}: field {name!r} must be a text, a whole number, true or false, or a list of "
        f"texts, to stand in a template, got {describe(value)}"
    )


def _read_instruction(values: Mapping[str, object], fields: InstructionFields, where: str) -> str:
    instruction = _read_text(values["instruction"], fields.instruction, where)
    given = values.get("input")
    if fields.input is None or given is None:
        return fill_template(fields.template, {"instruction": instruction})
    extra = _read_text(given, fields.input, where, may_be_empty=True)
    if not extra.strip():
        return fill_template(fields.template, {"instruction": instruction})
    parts = {"instruction": instruction, "input": extra}
    return fill_template(fields.template_with_input, parts)


def _read_text(value: object, field: str, where: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: field {field!r} must be a text, got {describe(value)}")
    if not may_be_empty and not value.strip():
        raise DataError(f"{where}: field {field!r} is empty; remove the row or give it a text")
    return value


def _read_references(value: object, field: str | None, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        return tuple(value)
    raise DataError(
        f"{where}: field {field!r} must be a text or a list of accepted texts, got "
        f"{describe(value)}"
    )


def _read_messages(value: object, what: str, where: str) -> Example:
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{what} must be a list of messages {{role, content}}, got {describe(value)}"
        )
    messages = [_read_message(message, f"{what}[{i}]") for i, message in enumerate(value)]
    answer = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
    if not messages:
        raise DataError(f"{what} holds an assistant's answer and no message before it")
    references = () if answer is None else (answer,)
    return Example(row=where, prompt=tuple(messages), references=references, answer=answer)


def _read_message(value: object, what: str) -> Message:
    if not isinstance(value, dict):
        raise DataError(f"{what} must be {{role, content}}, got {describe(value)}")
    message: Message = {}
    for part in ("role", "content"):
        text = value.get(part)
        if not isinstance(text, str):
            raise DataError(f"{what} must have {part!r} as a text, got {describe(text)}")
        message[part] = text
    return message

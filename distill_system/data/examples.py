"""How one row of a file or data set becomes an example.

In: a mapping from field names to values, and the configured field map.  Out: an Example.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from distill_system.config.data import (
    FieldMap,
    InstructionFields,
    MessagesFields,
    PromptResponseFields,
)
from distill_system.errors import DataError

Message = dict[str, str]  # role, content
Row = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One row as text.

    row: where it came from, e.g. "train.jsonl:17".  prompt: a text, or the messages of a chat.
    references: all accepted answers.  answer: the one to learn from; None if the row has none.
    """

    row: str
    prompt: str | tuple[Message, ...]
    references: tuple[str, ...] = ()
    answer: str | None = None


def needed_fields(fields: FieldMap, with_answers: bool) -> dict[str, str]:
    """Fields that must exist in every row, by the setting that names them."""
    wanted: dict[str, str | None]
    match fields:
        case PromptResponseFields():
            wanted = {"prompt": fields.prompt, "response": fields.response}
            answer = "response"
        case InstructionFields():
            wanted = {
                "instruction": fields.instruction,
                "input": fields.input,
                "output": fields.output,
            }
            answer = "output"
        case MessagesFields():
            return {"messages": fields.messages}
    return {
        setting: field
        for setting, field in wanted.items()
        if field is not None and (with_answers or setting != answer)
    }


def check_fields(
    needed: Mapping[str, str], existing: Collection[str], where: str, key: str
) -> None:
    """Refuse a row or table that lacks a needed field.

    Args:
        needed: as from `needed_fields`.
        existing: the field names there are.
        where: the row or table, for the message.
        key: configuration key of the field map, e.g. "data.prompts.fields".

    Raises:
        DataError: names the missing field, the existing ones and the nearest of them.
    """
    for setting, field in needed.items():
        if field in existing:
            continue
        nearest = difflib.get_close_matches(field, existing, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        optional = setting in ("response", "input", "output")
        way_out = f", or to null for rows without {setting}" if optional else ""
        raise DataError(
            f"{where}: no field {field!r}, the fields are {sorted(existing)}{hint} "
            f"Set {key}.{setting} to the field's name{way_out}"
        )


def read_example(
    row: Row, fields: FieldMap, *, where: str, key: str, with_answers: bool
) -> Example:
    """Turn a row into an example.

    Args:
        row: field names to values.
        fields: the configured field map.
        where: the row, for messages and Example.row.
        key: configuration key of the field map.
        with_answers: False leaves answers unread.

    Raises:
        DataError: a field is missing, empty or of the wrong type; the message names the row.
    """
    needed = needed_fields(fields, with_answers)
    check_fields(needed, row.keys(), where, key)
    values = {setting: row[field] for setting, field in needed.items()}
    if isinstance(fields, MessagesFields):
        return _read_messages(values["messages"], f"{where}: field {fields.messages!r}", where)
    if isinstance(fields, PromptResponseFields):
        prompt = _read_text(values["prompt"], fields.prompt, where)
        references = _read_references(values.get("response"), fields.response, where)
    else:
        prompt = _read_text(values["instruction"], fields.instruction, where)
        if fields.input is not None and values["input"] is not None:
            extra = _read_text(values["input"], fields.input, where, may_be_empty=True)
            prompt = f"{prompt}\n\n{extra}" if extra.strip() else prompt
        references = _read_references(values.get("output"), fields.output, where)
    answer = references[0] if references else None
    return Example(row=where, prompt=prompt, references=references, answer=answer)


def _read_text(value: object, field: str, where: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: field {field!r} must be a text, got {_describe(value)}")
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
        f"{_describe(value)}"
    )


def _read_messages(value: object, what: str, where: str) -> Example:
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{what} must be a list of messages {{role, content}}, got {_describe(value)}"
        )
    messages = [_read_message(message, f"{what}[{i}]") for i, message in enumerate(value)]
    answer = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
    if not messages:
        raise DataError(f"{what} holds an assistant's answer and no message before it")
    references = () if answer is None else (answer,)
    return Example(row=where, prompt=tuple(messages), references=references, answer=answer)


def _read_message(value: object, what: str) -> Message:
    if not isinstance(value, dict):
        raise DataError(f"{what} must be {{role, content}}, got {_describe(value)}")
    message: Message = {}
    for part in ("role", "content"):
        text = value.get(part)
        if not isinstance(text, str):
            raise DataError(f"{what} must have {part!r} as a text, got {_describe(text)}")
        message[part] = text
    return message


def _describe(value: object) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown[:57] + '...' if len(shown) > 60 else shown}"

"""How one row of a file or data set becomes an example.

In: a mapping from field names to values, and the configured field map.  Out: an Example.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from distill_system.config.data import (
    FieldMap,
    InstructionFields,
    MessagesFields,
    PromptResponseFields,
    TemplateFields,
)
from distill_system.config.templates import Piece, fill_pieces, joined, template_fields
from distill_system.data.messages import (
    Message,
    Messages,
    Tool,
    lacks_words,
    message_text,
    read_messages,
    read_tools,
)
from distill_system.data.row_fields import (
    ANSWER_SETTINGS,
    check_fields,
    field_value,
    given_templates,
    needed_fields,
)
from distill_system.data.row_values import Row, check_texts, describe
from distill_system.errors import DataError

_LEAVE_OUT = "set leave_out_empty of its source"


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One row as text.

    row: its place, e.g. "train.jsonl:17".  prompt: a text, or the messages of a chat.
    references: all accepted answers.  answer: the one to learn from; None if the row has none.
    prompt_pieces, answer_pieces: what of them a template wrote; empty where all is the row's.
    reply: the answer as the message that the chat holds.  tools: what the chat may call.
    earlier: the chat's assistant turns before this one, where each is learned from.
    """

    row: str
    prompt: str | Messages
    references: tuple[str, ...] = ()
    answer: str | None = None
    prompt_pieces: tuple[Piece, ...] = ()
    answer_pieces: tuple[Piece, ...] = ()
    reply: Message | None = None
    tools: tuple[Tool, ...] = ()
    earlier: tuple[Example, ...] = ()

    @property
    def turns(self) -> tuple[Example, ...]:
        """This and the chat's earlier turns, in the chat's order."""
        return (*self.earlier, self)


def read_example(
    row: Row, fields: FieldMap, *, where: str, key: str, with_answers: bool
) -> Example:
    """Turn a row into an example.

    row: field names to values.
    fields: the configured field map.
    where: the row's place, for messages and Example.row.
    key: configuration key of the field map.
    with_answers: False reads no answers.
    Raises: DataError if a field is missing, empty or of the wrong type; the message names the row.
    """
    needed = needed_fields(fields, with_answers)
    check_fields(needed, row.keys(), where, key)
    if isinstance(fields, TemplateFields):
        return _read_templates(row, fields, where, with_answers)
    values = {setting: field_value(row, field, where) for setting, field in needed}
    if isinstance(fields, MessagesFields):
        return _read_chat(values, fields, where, with_answers)
    pieces: tuple[Piece, ...] = ()
    if isinstance(fields, PromptResponseFields):
        prompt = _read_text(values["prompt"], fields.prompt, where)
        references = _read_references(values.get("response"), fields.response, where)
    else:
        assert isinstance(fields, InstructionFields), "others become one of these first"
        pieces = _read_instruction(values, fields, where)
        prompt = joined(pieces)
        references = _read_references(values.get("output"), fields.output, where)
    answer = references[0] if references else None
    return Example(
        row=where, prompt=prompt, references=references, answer=answer, prompt_pieces=pieces
    )


def _read_templates(row: Row, fields: TemplateFields, where: str, with_answers: bool) -> Example:
    texts = {
        setting: _fill(template, row, where)
        for setting, template in given_templates(fields)
        if with_answers or setting not in ANSWER_SETTINGS
    }
    response = texts.get("response")
    reference = texts.get("reference", response)
    return Example(
        row=where,
        prompt=joined(texts["prompt"]),
        references=() if reference is None else (joined(reference),),
        answer=None if response is None else joined(response),
        prompt_pieces=texts["prompt"],
        answer_pieces=response or (),
    )


def _fill(template: str, row: Row, where: str) -> tuple[Piece, ...]:
    values = {
        name: _as_text(field_value(row, name, where), name, where)
        for name in template_fields(template)
    }
    return fill_pieces(template, values)


def _as_text(value: object, name: str, where: str) -> str:
    """The text with which a field's value replaces its {name} in a template."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        check_texts(value, f"{where}: field {name!r}")
        return " ".join(value)
    if isinstance(value, str):
        return _read_text(value, name, where)
    raise DataError(
        f"{where}: field {name!r} must be a text, a whole number, true or false, or a list of "
        f"texts, to stand in a template, got {describe(value)}"
    )


def _read_instruction(
    values: Mapping[str, object], fields: InstructionFields, where: str
) -> tuple[Piece, ...]:
    instruction = _read_text(values["instruction"], fields.instruction, where)
    given = values.get("input")
    if fields.input is None or given is None:
        return fill_pieces(fields.template, {"instruction": instruction})
    extra = _read_text(given, fields.input, where, may_be_empty=True)
    if not extra.strip():
        return fill_pieces(fields.template, {"instruction": instruction})
    parts = {"instruction": instruction, "input": extra}
    return fill_pieces(fields.template_with_input, parts)


def _read_text(value: object, field: str, where: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: field {field!r} must be a text, got {describe(value)}")
    if not may_be_empty and not value.strip():
        raise DataError(f"{where}: field {field!r} is empty; remove the row or give it a text")
    check_texts(value, f"{where}: field {field!r}")
    return value


def _read_references(value: object, field: str | None, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        for text in texts:
            _read_answer(text, field, where)
        return tuple(texts)
    raise DataError(
        f"{where}: field {field!r} must be a text or a list of accepted texts, got "
        f"{describe(value)}"
    )


def _read_answer(text: str, field: str | None, where: str) -> None:
    if not text.strip():
        raise DataError(
            f"{where}: field {field!r} holds an empty answer, from which a model would learn to "
            f"say nothing; remove the row, give it a text, or {_LEAVE_OUT}"
        )
    check_texts(text, f"{where}: field {field!r}")


def _read_chat(
    values: Mapping[str, object], fields: MessagesFields, where: str, with_answers: bool
) -> Example:
    what = f"{where}: field {fields.messages!r}"
    messages = read_messages(values["messages"], what)
    tools = read_tools(values.get("tools"), f"{where}: field {fields.tools!r}")
    check_texts([messages, tools], what)
    if lacks_words(messages, with_answer=with_answers):
        raise DataError(f"{what} holds an empty question or answer; remove the row or {_LEAVE_OUT}")
    turns = [
        _turn(messages[:at], message, tools, where)
        for at, message in enumerate(messages)
        if message["role"] == "assistant" and at > 0
    ]
    if messages[-1]["role"] != "assistant":
        turns.append(_turn(messages, None, tools, where))
    if not turns:
        raise DataError(f"{what} holds an assistant's answer and no message before it")
    *earlier, last = turns
    return replace(last, earlier=tuple(earlier)) if fields.assistant_turns == "all" else last


def _turn(context: Messages, reply: Message | None, tools: tuple[Tool, ...], where: str) -> Example:
    answer = None if reply is None else message_text(reply)
    references = () if answer is None else (answer,)
    return Example(
        row=where, prompt=context, references=references, answer=answer, reply=reply, tools=tools
    )

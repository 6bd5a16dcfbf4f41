"""Which columns of a set hold prompt and answer, found by their usual names; foreign layouts in.

In: the first rows of a set.  Out: the field map that reads them, or a refusal that names every
reading. Rows of ShareGPT, preferences and prompts that are chats become rows of messages.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from distill_system.config.data import (
    FieldMap,
    InstructionFields,
    MessagesFields,
    PreferenceFields,
    PromptResponseFields,
    ShareGptFields,
    TemplateFields,
)
from distill_system.data.row_fields import field_value, needed_fields
from distill_system.data.row_values import Row, describe
from distill_system.errors import DataError

CHAT_COLUMNS = ("messages", "conversations", "conversation", "chat")
PROMPT_COLUMNS = ("prompt", "question", "query", "problem", "inputs", "input")
ANSWER_COLUMNS = (
    *("response", "completion", "answer", "answers", "output", "outputs"),
    *("solution", "target", "targets"),
)
INPUT_COLUMNS = ("input", "context")
TEXT_COLUMN = "text"

SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot", "bing", "bard"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "function_response"), "tool"),
}
"""Who a message is `from` in ShareGPT's form -> its role."""

_TEXT, _TEXTS, _ROLES, _FROMS, _NULL, _OTHER = "text", "texts", "roles", "froms", "null", "other"


class Layout(NamedTuple):
    """The field map that reads a set, and how it is told, e.g. "question -> answer"."""

    fields: FieldMap
    told: str


def find_layout(rows: Sequence[Row], *, where: str, key: str, with_answers: bool) -> Layout:
    """The layout of a set whose configuration names no fields.

    `prompt` with `response` comes before everything else; a column `text` is a prompt where nothing
    else is found.

    rows: the first rows.
    where: the set's file or name, for messages.
    key: configuration key of the field map, e.g. "data.prompts.fields".
    with_answers: whether answers are needed; otherwise two layouts that differ in them alone
        are the same.
    Raises: DataError if no column has a usual name, there are two readings, or an answer is needed
        and no column has the usual name of one.
    """
    kinds = _kinds(rows)
    found = _readings(kinds, with_answers) or _readings(dict.fromkeys(kinds), with_answers)
    own = [each for each in found if each.fields == PromptResponseFields()]
    if own:
        return own[0]
    if not found:
        raise DataError(_nothing_found(kinds, where, key))
    if len(found) > 1:
        readings = " or ".join(f"{each.told} ({_as_key(each.fields)})" for each in found)
        raise DataError(
            f"{where}: its columns {sorted(kinds)} can be read in {len(found)} ways: {readings}. "
            f"Choose one by {key}"
        )
    layout = found[0]
    if with_answers and _lacks_answers(layout.fields):
        raise DataError(
            f"{where}: {layout.told} is a prompt, and none of the columns {sorted(kinds)} holds "
            f"texts under the usual name of an answer ({', '.join(ANSWER_COLUMNS)}). Name it by "
            f"{key}, or say that there is none: {key}={_as_key(layout.fields)}"
        )
    return layout


def told_layout(fields: FieldMap) -> str:
    """A field map in words, e.g. "question -> answer"."""
    match fields:
        case PromptResponseFields():
            return _arrow(fields.prompt, fields.response)
        case InstructionFields():
            asked = " + ".join(filter(None, (fields.instruction, fields.input)))
            return _arrow(asked, fields.output)
        case MessagesFields():
            return f"the chat {fields.messages}"
        case ShareGptFields():
            return f"the ShareGPT chat {fields.conversations}"
        case PreferenceFields():
            return _arrow(fields.prompt or f"the beginning of {fields.chosen}", fields.chosen)
        case TemplateFields():
            return "templates"


def to_basic_row(row: Row, fields: FieldMap, where: str) -> tuple[Row, FieldMap]:
    """A row of a layout that `read_example` does not know as one that it does.

    Raises: DataError if the row's values are of another form; `where` names the row.
    """
    if isinstance(fields, ShareGptFields):
        chat = field_value(row, fields.conversations, where)
        return _chat_row(row, _from_sharegpt(chat, f"{where}: field {fields.conversations!r}"))
    if isinstance(fields, PreferenceFields):
        return _read_preference(row, fields, where)
    if isinstance(fields, PromptResponseFields):
        prompt = row.get(fields.prompt)
        if isinstance(prompt, list) and prompt:
            answer = None if fields.response is None else row.get(fields.response)
            return _chat_row(row, _join(prompt, answer, where))
    return row, fields


# ---- finding -------------------------------------------------------------------------------------


def _kinds(rows: Sequence[Row]) -> dict[str, set[str]]:
    """What each column holds in some row."""
    kinds: dict[str, set[str]] = {}
    for row in rows:
        for name, value in row.items():
            kinds.setdefault(name, set()).add(_kind(value))
    return kinds


def _kind(value: object) -> str:
    if value is None or value == []:
        return _NULL
    if isinstance(value, str):
        return _TEXT
    if isinstance(value, list):
        if isinstance(value[0], str):
            return _TEXTS
        if isinstance(value[0], Mapping):
            if "role" in value[0]:
                return _ROLES
            return _FROMS if "from" in value[0] else _OTHER
    return _OTHER


class _Columns:
    """Columns by their usual names, in whichever case they are written.

    kinds: of each column; None for a column whose values are not looked at.
    """

    def __init__(self, kinds: Mapping[str, Collection[str] | None]) -> None:
        self._kinds = kinds

    def find(self, names: Sequence[str], *wanted: str) -> list[str]:
        """The columns of these names that hold one of these kinds in some row."""
        return [
            column
            for name in names
            for column, kinds in self._kinds.items()
            if column.lower() == name and (kinds is None or not {*wanted}.isdisjoint(kinds))
        ]


def _readings(kinds: Mapping[str, Collection[str] | None], with_answers: bool) -> list[Layout]:
    """Every reading; of those that read the same, the first."""
    found: dict[str, Layout] = {}
    for fields in _all_readings(_Columns(kinds)):
        needed = str(needed_fields(fields, with_answers))
        found.setdefault(needed, Layout(fields, told_layout(fields)))
    return list(found.values())


def _all_readings(columns: _Columns) -> Iterator[FieldMap]:
    before = 0
    for fields in _readings_beside_text(columns):
        before += 1
        yield fields
    if not before:
        for name in columns.find([TEXT_COLUMN], _TEXT):
            yield PromptResponseFields(prompt=name, response=None)


def _readings_beside_text(columns: _Columns) -> Iterator[FieldMap]:
    chats = columns.find(CHAT_COLUMNS, _ROLES)
    for name in chats:
        yield MessagesFields(messages=name)
    for name in columns.find(CHAT_COLUMNS, _FROMS):
        if name not in chats:
            yield ShareGptFields(conversations=name)
    chosen = columns.find(["chosen"], _TEXT, _ROLES)
    if not columns.find(["rejected"], _TEXT, _ROLES):
        chosen = []
    instructions = columns.find(["instruction"], _TEXT)
    prompts = [*instructions, *columns.find(PROMPT_COLUMNS, _TEXT, _ROLES)]
    for preferred in chosen:
        yield PreferenceFields(prompt=prompts[0] if prompts else None, chosen=preferred)
    answers = columns.find(ANSWER_COLUMNS, _TEXT, _TEXTS, _ROLES)
    answers = answers or columns.find(ANSWER_COLUMNS, _NULL)
    for name in instructions:
        inputs = columns.find(INPUT_COLUMNS, _TEXT, _NULL)
        for answer in answers or _none_unless(chosen):
            yield InstructionFields(
                instruction=name, input=inputs[0] if inputs else None, output=answer
            )
    taken = INPUT_COLUMNS if instructions else ()
    for name in prompts[len(instructions) :]:
        if name.lower() not in taken:
            for answer in answers or _none_unless(chosen):
                yield PromptResponseFields(prompt=name, response=answer)


def _none_unless(chosen: list[str]) -> list[None]:
    """No answer, as one reading; none at all where the preferred answer is one."""
    return [] if chosen else [None]


def _lacks_answers(fields: FieldMap) -> bool:
    return (isinstance(fields, PromptResponseFields) and fields.response is None) or (
        isinstance(fields, InstructionFields) and fields.output is None
    )


def _arrow(prompt: str, answer: str | None) -> str:
    return prompt if answer is None else f"{prompt} -> {answer}"


def _as_key(fields: FieldMap) -> str:
    values = {"format": fields.format, **fields.model_dump(exclude_defaults=True)}
    written = (f"{name}: {'null' if value is None else value}" for name, value in values.items())
    return f"{{{', '.join(written)}}}"


def _nothing_found(kinds: Mapping[str, object], where: str, key: str) -> str:
    usual = ["instruction", *PROMPT_COLUMNS, *CHAT_COLUMNS, "chosen", TEXT_COLUMN]
    near = [
        f"{name!r} for {close[0]!r}"
        for name in kinds
        if (close := difflib.get_close_matches(name.lower(), usual, n=1, cutoff=0.75))
    ]
    hint = f"; did you mean {near[0]}?" if near else ""
    return (
        f"{where}: none of the columns {sorted(kinds)} has the usual name of a prompt or chat "
        f"({', '.join(usual)}){hint} Say which column is what by {key}, for instance "
        f"{key}={{format: prompt_response, prompt: COLUMN, response: COLUMN}}"
    )


# ---- foreign layouts -----------------------------------------------------------------------------


def _chat_row(row: Row, messages: list[object]) -> tuple[Row, FieldMap]:
    fields = MessagesFields()
    return {**row, fields.messages: messages}, fields


def _from_sharegpt(value: object, what: str) -> list[object]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{what} must be a list of messages {{from, value}}, got {describe(value)}")
    return [_message_from_sharegpt(each, f"{what}[{i}]") for i, each in enumerate(value)]


def _message_from_sharegpt(value: object, what: str) -> dict[str, object]:
    if not isinstance(value, Mapping) or not {"from", "value"} <= value.keys():
        raise DataError(f"{what} must be {{from, value}}, got {describe(value)}")
    role = SHAREGPT_ROLES.get(str(value["from"]).lower())
    if role is None:
        raise DataError(
            f"{what} is from {value['from']!r}; expected one of {', '.join(SHAREGPT_ROLES)}"
        )
    return {"role": role, "content": value["value"]}


def _read_preference(row: Row, fields: PreferenceFields, where: str) -> tuple[Row, FieldMap]:
    chosen = field_value(row, fields.chosen, where)
    prompt = None if fields.prompt is None else field_value(row, fields.prompt, where)
    if isinstance(chosen, list) and any(_role(message) != "assistant" for message in chosen):
        return _chat_row(row, chosen)  # it begins with its prompt
    if isinstance(prompt, list) or isinstance(chosen, list):
        if fields.prompt is None:
            raise DataError(
                f"{where}: field {fields.chosen!r} holds answers alone; name the field of the "
                "prompt"
            )
        return _chat_row(row, _join(prompt, chosen, where))
    if fields.prompt is None:
        raise DataError(
            f"{where}: field {fields.chosen!r} must be a chat that begins with its prompt, got "
            f"{describe(chosen)}; name the field of the prompt, or split the text into prompt and "
            "answer"
        )
    return row, PromptResponseFields(prompt=fields.prompt, response=fields.chosen)


def _join(prompt: object, answer: object, where: str) -> list[object]:
    """One chat of a prompt and an answer, each a text or a list of messages."""
    asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    if answer is None:
        return asked
    if isinstance(answer, str):
        return [*asked, {"role": "assistant", "content": answer}]
    if isinstance(answer, list) and answer and all(isinstance(each, Mapping) for each in answer):
        return [*asked, *answer]
    raise DataError(
        f"{where}: the answer to a chat must be a text or a list of messages, got "
        f"{describe(answer)}"
    )


def _role(message: object) -> object:
    return message.get("role") if isinstance(message, Mapping) else None

"""Chats as rows hold them: messages of {role, content}, with tool calls, reasoning and parts.

In: a value from a row.  Out: messages as the chat template is given them, and their text for
people. Keys that this module does not know are kept: templates read what they like.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from distill_system.data.row_values import describe
from distill_system.errors import DataError

Message = dict[str, object]
"""role, content, and what else the row gives: tool_calls, reasoning_content, name, ..."""
Tool = dict[str, object]
"""The JSON schema of a tool."""
Messages = tuple[Message, ...]


def read_messages(value: object, what: str) -> Messages:
    """The messages of a chat, checked.

    value: the row's field.
    what: row and field, for messages.
    Raises: DataError for what is no list of {role, content}, content that is neither a text nor
        text parts, or a tool call without a name.
    """
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{what} must be a list of messages {{role, content}}, got {describe(value)}"
        )
    return tuple(_read_message(message, f"{what}[{i}]") for i, message in enumerate(value))


def read_tools(value: object, what: str) -> tuple[Tool, ...]:
    """The tools of a row: a list of JSON schemas, or that list as JSON text; none for null.

    Raises: DataError for anything else.
    """
    if isinstance(value, str):
        value = _from_json(value, what) if value.strip() else None
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(
            f"{what} must be a list of tools, each a JSON schema, got {describe(value)}; set "
            "fields.tools to null to leave them out"
        )
    return tuple(value)


def message_text(message: Mapping[str, object]) -> str:
    """The text of a message, for people and for scores; that of its parts, joined by lines."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "\n".join(part_texts(content))


def part_texts(content: object) -> list[str]:
    """The texts of a content that is a list of parts; none for any other."""
    parts = content if isinstance(content, list) else []
    return [part["text"] for part in parts if isinstance(part, dict) and _is_text_part(part)]


def tool_calls(message: Mapping[str, object]) -> list[dict[str, Any]]:
    """The calls of a message, each as {name, arguments}."""
    calls: Any = message.get("tool_calls") or ()
    return [call.get("function", call) for call in calls]


def lacks_words(messages: object, *, with_answer: bool) -> bool:
    """Whether a user's message is empty, or, if it is to be learned from, the answer.

    messages: a chat as a row holds it; what is no chat lacks nothing.
    """
    if not isinstance(messages, list | tuple) or not messages:
        return False
    if not all(isinstance(message, dict) for message in messages):
        return False
    last = messages[-1]
    if with_answer and last.get("role") == "assistant" and _is_silent(last):
        return True
    return any(message.get("role") == "user" and _is_silent(message) for message in messages)


def _is_silent(message: Mapping[str, object]) -> bool:
    """No text but blanks, and no tool call."""
    content = message.get("content")
    if content is not None and not isinstance(content, str | list):
        return False
    return not message_text(message).strip() and not message.get("tool_calls")


def _is_text_part(part: Mapping[str, object]) -> bool:
    return isinstance(part.get("text"), str) and part.get("type", "text") == "text"


def _read_message(value: object, what: str) -> Message:
    if not isinstance(value, dict):
        raise DataError(f"{what} must be {{role, content}}, got {describe(value)}")
    # Tables give every message all keys of all messages; null stands for "has none".
    message = {key: given for key, given in value.items() if given is not None}
    if not isinstance(message.get("role"), str):
        raise DataError(f"{what} must have 'role' as a text, got {describe(message.get('role'))}")
    if "tool_calls" in message:
        message["tool_calls"] = _read_calls(message["tool_calls"], what)
        if not message["tool_calls"]:
            del message["tool_calls"]
    content = message.get("content")
    if content is None and "tool_calls" in message:
        message["content"] = None
    elif isinstance(content, list):
        message["content"] = _read_parts(content, what)
    elif not isinstance(content, str):
        raise DataError(f"{what} must have 'content' as a text, got {describe(content)}")
    return message


def _read_parts(parts: list[object], what: str) -> list[object]:
    for at, part in enumerate(parts):
        if isinstance(part, dict) and _is_text_part(part):
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        raise DataError(
            f"{what} must have 'content' as a text or as text parts {{type: text, text}}, got "
            f"{'a part of type ' + repr(kind) if kind else describe(part)} at [{at}]; models read "
            "text alone here: remove the part or the row"
        )
    return [{"type": "text", "text": text} for text in part_texts(parts)]


def _read_calls(value: object, what: str) -> list[object]:
    if isinstance(value, str):
        value = _from_json(value, f"{what}: tool_calls")
    if not isinstance(value, list):
        raise DataError(f"{what}: tool_calls must be a list, got {describe(value)}")
    for at, call in enumerate(value):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f"{what}: tool_calls[{at}] must be {{function: {{name, arguments}}}}, got "
                f"{describe(call)}"
            )
    return value


def _from_json(text: str, what: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is a text that is no JSON: {describe(text)}") from error

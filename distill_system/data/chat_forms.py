"""The forms in which a chat can be given to a chat template, and what a rendering has lost.

Templates differ in what they take: tool arguments as JSON text or as a mapping, content as parts or
as one text, no content as null or as "". A row has one form; a rendering of another form shows by
Python's way to write it, by quotes within quotes, or by what is not there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

from distill_system.data.messages import Message, Tool, part_texts, tool_calls

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys under which data sets keep what was thought before an answer."""
Change = Callable[[Message], Message]


def forms(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """The chat as it is, then in the other forms that say the same."""
    changes: list[tuple[Change, ...]] = []
    if any(tool_calls(message) for message in messages):
        changes.append((_as_it_is, _other_arguments))
    if any(isinstance(message.get("content"), list) for message in messages):
        changes.append((_as_it_is, _one_text))
    if any(message.get("content", "") is None for message in messages):
        changes.append((_as_it_is, _empty_text))
    for chosen in product(*changes):
        changed = list(messages)
        for change in chosen:
            changed = [change(message) for message in changed]
        yield changed


def find_loss(messages: Sequence[Message], tools: Sequence[Tool], rendered: str) -> str | None:
    """What of a chat the rendering lacks or garbles, in words; None if it is all there."""
    for tool in tools:
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and name not in rendered:
            return f"it does not show the tool {name!r} (fields.tools=null leaves tools out)"
    for message in messages:
        if loss := _find_lost_call(message, rendered) or _find_lost_part(message, rendered):
            return loss
    return _find_lost_thought(messages[-1], rendered)


def _find_lost_thought(message: Message, rendered: str) -> str | None:
    """Of the answer alone: templates leave out what was thought before earlier answers."""
    for key in REASONING if message["role"] == "assistant" else ():
        thought = message.get(key)
        if isinstance(thought, str) and thought.strip() not in rendered:
            return f"it does not show the answer's {key}"
    return None


def _find_lost_call(message: Message, rendered: str) -> str | None:
    if message.get("content", "") is None and "None" in rendered:
        return "it writes None for an answer without text"
    for call in tool_calls(message):
        name, arguments = call["name"], call.get("arguments")
        if name not in rendered:
            return f"it does not show the call of the tool {name!r}"
        if isinstance(arguments, str):
            garbled, right = json.dumps(arguments, ensure_ascii=False), arguments
        else:
            garbled, right = repr(arguments), json.dumps(arguments, ensure_ascii=False)
        if garbled in rendered and garbled not in (right, "{}"):
            return f"it writes the arguments of {name!r} as {garbled[:60]}"
    return None


def _find_lost_part(message: Message, rendered: str) -> str | None:
    content = message.get("content")
    texts = part_texts(content)
    if texts and (repr(content) in rendered or not all(t.strip() in rendered for t in texts)):
        return f"it does not write content that is a list of parts as text: {texts[0][:40]!r}"
    return None


def _as_it_is(message: Message) -> Message:
    return message


def _other_arguments(message: Message) -> Message:
    """JSON text in place of a mapping, or the reverse."""
    if not tool_calls(message):
        return message
    calls: Any = message["tool_calls"]
    return {**message, "tool_calls": [_with_other_arguments(call) for call in calls]}


def _with_other_arguments(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _with_other_arguments(call["function"])}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    try:
        return {**call, "arguments": json.loads(arguments)}
    except ValueError:
        return call


def _one_text(message: Message) -> Message:
    if not isinstance(message.get("content"), list):
        return message
    return {**message, "content": "\n".join(part_texts(message["content"]))}


def _empty_text(message: Message) -> Message:
    return {**message, "content": ""} if message.get("content", "") is None else message

"""Prompts that are too long, cut in the row's own text, so that what templates write stays whole.

In: an example, the side to cut, and how many tokens a prompt of it has.  Out: an example whose
prompt fits, or None where no text of the row is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

from distill_system.config.templates import joined
from distill_system.data.encoding import Text, TextEncoder
from distill_system.data.examples import Example
from distill_system.data.messages import Messages, message_text

Side = Literal["cut_left", "cut_right"]

MOST_CHARACTERS = 1_000_000
"""A text of more characters is too long for any model here, and is not tokenised to find out."""
_ATTEMPTS = 8


def shorten(
    example: Example,
    side: Side,
    *,
    excess: Callable[[Example], int],
    encoder: TextEncoder,
) -> Example | None:
    """The example with a prompt that fits, cut at its left (the beginning) or right (the end).

    A chat cut at its left loses whole messages first: the oldest, but not a system message, and not
    the last. What is cut within a message or a plain prompt is the row's longest text.
    excess: by how many tokens the prompt of an example is too long; 0 or less: it fits.
    """
    for candidate in _without_oldest(example) if side == "cut_left" else (example,):
        example = candidate
        if excess(example) <= 0:
            return example
    text = _longest_text(example)
    if len(text) > MOST_CHARACTERS:
        text = text[-MOST_CHARACTERS:] if side == "cut_left" else text[:MOST_CHARACTERS]
    [encoded] = encoder.encode([Text(text)], with_ends=True)
    shortened, num_kept = _with_text(example, text), len(encoded.ids)
    for _ in range(_ATTEMPTS):
        too_many = excess(shortened)
        if too_many <= 0:
            return shortened
        num_kept -= too_many
        if num_kept <= 0 or not encoded.ends:
            return None
        if side == "cut_right":
            remaining = text[: encoded.ends[num_kept - 1]]
        else:
            remaining = text[encoded.ends[-num_kept - 1] :]
        if not remaining.strip():
            return None
        shortened = _with_text(example, remaining)
    return None


def _without_oldest(example: Example) -> Iterator[Example]:
    """The example, then without more and more of its oldest turns."""
    yield example
    if isinstance(example.prompt, str):
        return
    first = next((n for n, m in enumerate(example.prompt) if m["role"] != "system"), 0)
    system, turns = example.prompt[:first], example.prompt[first:]
    for begin in range(1, len(turns)):
        if turns[begin]["role"] == "user":
            yield replace(example, prompt=system + turns[begin:])


def _longest_text(example: Example) -> str:
    """The text that is cut: of a chat the last message's, of a template the longest of the row."""
    if not isinstance(example.prompt, str):
        return message_text(example.prompt[-1])
    data = [piece.text for piece in example.prompt_pieces if piece.is_data]
    return max(data, key=len) if data else example.prompt


def _with_text(example: Example, text: str) -> Example:
    """The example with another text in the place of `_longest_text`."""
    if not isinstance(example.prompt, str):
        context: Messages = example.prompt[:-1]
        return replace(example, prompt=(*context, {**example.prompt[-1], "content": text}))
    if not example.prompt_pieces:
        return replace(example, prompt=text)
    pieces, longest = list(example.prompt_pieces), _longest_text(example)
    at = next(n for n, piece in enumerate(pieces) if piece.is_data and piece.text == longest)
    pieces[at] = pieces[at]._replace(text=text)
    return replace(example, prompt_pieces=tuple(pieces), prompt=joined(pieces))

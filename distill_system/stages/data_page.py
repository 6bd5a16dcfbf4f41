"""Shows inspected sets: in a terminal with colours, elsewhere as text with marks.

Each token is told from its neighbours: by its background in a terminal, by "|" elsewhere.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from distill_system.config import RunConfig
from distill_system.data.inspection import SetInspection, TokenisedRow

BINS = 8
BAR = 40
"""Characters of the longest bar of a histogram."""
FIRST_TOKENS, LAST_TOKENS = 300, 60
"""Of a longer text only so many tokens at its beginning and end are shown."""
SHOWN_REFUSALS = 10

_STYLES = {
    "prompt": ("cyan", "cyan on grey23"),
    "learned": ("bold green", "bold green on grey23"),
    "reference": ("yellow", "yellow"),
}
_VISIBLE = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


def render_data(
    inspections: Sequence[SetInspection], config: RunConfig, *, plain: bool
) -> RenderableType:
    """All sets, one under the other.

    plain: without colours, each row's tokens in one line each for prompt and response.
    """
    legend = (
        "Each row as the models read it: tokens between |, ⏎ is a new line."
        if plain
        else Text.assemble(
            "Each row as the models read it, token by token: ",
            ("the prompt", _STYLES["prompt"][0]),
            ", ",
            ("what is learned", _STYLES["learned"][0]),
            ", ",
            ("references", _STYLES["reference"][0]),
            ".",
        )
    )
    return Group(legend, *(part for each in inspections for part in _parts(each, config, plain)))


def _parts(found: SetInspection, config: RunConfig, plain: bool) -> Iterator[RenderableType]:
    yield Text(f"\ndata.{found.name}", style="bold")
    if found.report.place:
        yield Text(f"  {found.report.describe()}")
    for line in _counts(found):
        yield Text(f"  {line}")
    yield from _refusals(found)
    for number, row in enumerate(found.rows, 1):
        yield from _row(number, row, plain)
    limits = config.data.max_prompt_tokens, config.rollout.sampling.max_response_tokens
    yield from _histogram(
        "prompt", found.prompt_lengths, f"data.max_prompt_tokens={limits[0]}", limits[0]
    )
    yield from _histogram(
        "response",
        found.response_lengths,
        f"rollout.sampling.max_response_tokens={limits[1]}",
        limits[1],
    )


def _counts(found: SetInspection) -> Iterator[str]:
    if found.num_out_of_bounds:
        yield f"{found.num_out_of_bounds} rows left out by the token bounds of the source"
    if found.num_removed:
        yield f"{found.num_removed} rows left out, their prompts are in an evaluation split"
    yield from found.notes


def _refusals(found: SetInspection) -> Iterator[Text]:
    if found.problem is not None:
        yield Text(f"  ends the run: {found.problem}", style="bold red")
    refused = [each for each in found.report.refused if each != found.problem]
    for reason in refused[:SHOWN_REFUSALS]:
        yield Text(f"  refused: {reason}", style="red")
    more = found.report.num_refused - len(refused[:SHOWN_REFUSALS]) - (found.problem is not None)
    if more > 0:
        yield Text(f"  and {more} more rows refused", style="red")


def _row(number: int, row: TokenisedRow, plain: bool) -> Iterator[Text]:
    lengths = f"{len(row.prompt)} tokens"
    if row.learned:
        lengths = f"{len(row.prompt)} + {len(row.learned)} tokens"
    yield Text(f"  {number}. {row.place}: {lengths}", style="bold")
    if plain:
        yield Text(f"     prompt:    {_marked(row.prompt)}")
        if row.learned:
            yield Text(f"     learned:   {_marked(row.learned)}")
        for reference in row.references:
            yield Text(f"     reference: {_visible(reference)}")
        return
    line = Text("     ")
    _append_tokens(line, row.prompt, "prompt")
    _append_tokens(line, row.learned, "learned")
    yield line
    for reference in row.references:
        yield Text.assemble("     ", (_visible(reference), _STYLES["reference"][0]))


def _append_tokens(line: Text, tokens: Sequence[str], kind: str) -> None:
    for number, token in enumerate(_shortened(tokens)):
        line.append(_visible(token), style=_STYLES[kind][number % 2])


def _marked(tokens: Sequence[str]) -> str:
    return "|".join(_visible(token) for token in _shortened(tokens))


def _shortened(tokens: Sequence[str]) -> list[str]:
    left_out = len(tokens) - FIRST_TOKENS - LAST_TOKENS
    if left_out <= 0:
        return list(tokens)
    return [*tokens[:FIRST_TOKENS], f" [... {left_out} tokens ...] ", *tokens[-LAST_TOKENS:]]


def _visible(text: str) -> str:
    """Control characters as signs, so that no row can write to the terminal."""
    return "".join(
        _VISIBLE.get(c) or (f"\\x{ord(c):02x}" if unicodedata.category(c) in ("Cc", "Cf") else c)
        for c in text
    )


def _histogram(what: str, lengths: Sequence[int], limit: str, most: int) -> Iterator[Text]:
    if not lengths:
        return
    longer = sum(length > most for length in lengths)
    middle, high = np.percentile(lengths, [50, 95])
    yield Text(
        f"  {what} tokens: {min(lengths)} to {max(lengths)}, half have {middle:.0f} or fewer, 95 % "
        f"{high:.0f} or fewer; {limit}: {longer or 'none'} longer"
    )
    counts, edges = np.histogram(lengths, bins=_edges(min(lengths), max(lengths)))
    for count, low, end in zip(counts.tolist(), edges[:-1], edges[1:], strict=True):
        bar = "█" * round(BAR * count / max(counts))
        yield Text(f"    {low:>6.0f} to {end - 1:<6.0f} {bar} {count}")


def _edges(low: int, high: int) -> list[int]:
    """Edges of at most BINS equal bins of whole numbers that hold both ends."""
    width = -(-(high - low + 1) // BINS)
    return [*range(low, high + width + 1, width)][: -(-(high - low + 1) // width) + 1]

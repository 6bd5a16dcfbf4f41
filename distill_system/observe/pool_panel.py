"""Draws the activity of the pools on a terminal: bars, their key, and a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from distill_system.records import PoolActivity

BAR_CHARACTERS = 24

# Part -> its colour, its character (a bar is readable without colours), and that in ASCII.
PARTS = {"busy": ("green", "█", "#"), "blocked": ("yellow", "▒", "="), "starved": ("red", "░", ".")}

KEY_CHARACTERS = sum(len(part) + 3 for part in PARTS) - 1


@dataclass(frozen=True, slots=True)
class ActivityBar:
    """One pool's time as a bar: busy, blocked, starved, and a blank rest."""

    activity: PoolActivity

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The bar, in ASCII if the terminal cannot print more."""
        for part, count in self.count_characters().items():
            color, character, plain = PARTS[part]
            text = (plain if options.ascii_only else character) * count
            yield Segment(text, Style(color=color))
        yield Segment(" " * (BAR_CHARACTERS - sum(self.count_characters().values())))

    def count_characters(self) -> dict[str, int]:
        """Characters of each part.  The ends of parts are rounded, not their lengths, so that the
        rounding errors do not add up to a bar that is too long."""
        counts, share, drawn = {}, 0.0, 0
        for part in PARTS:
            share += getattr(self.activity, f"{part}_share")
            end = min(BAR_CHARACTERS, round(BAR_CHARACTERS * share))
            counts[part], drawn = end - drawn, end
        return counts


class BarKey:
    """The key to the bars: which character stands for what."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One line, in ASCII if the terminal cannot print more."""
        for index, (part, (color, character, plain)) in enumerate(PARTS.items()):
            yield Segment(" " * (index > 0))
            yield Segment(plain if options.ascii_only else character, Style(color=color))
            yield Segment(f" {part}")


def draw_pools(pools: Mapping[str, PoolActivity], line: str) -> Group:
    """A bar of each pool with its workers and its queue, the key, and the sentence `line`."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(width=KEY_CHARACTERS)
    for name, activity in pools.items():
        table.add_row(
            Text(f"{name} x{activity.num_workers:.3g}"),
            ActivityBar(activity),
            Text(f"{activity.busy_share:.0%} busy"),
            Text(f"{activity.queued:,} wait" if activity.queued else ""),
        )
    table.add_row("", BarKey())
    return Group(table, Text(line, style="bold"))

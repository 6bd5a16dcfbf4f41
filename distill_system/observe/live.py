"""What a person sees while a run goes on: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from distill_system.observe.pool_panel import BAR_CHARACTERS, draw_pools
from distill_system.records import PoolActivity


class LiveTask:
    """One stage in progress; made by LiveView.start, updated from any thread."""

    def __init__(
        self,
        stage: str,
        total_steps: int,
        first_step: int,
        announce: Callable[[LiveTask], None],
        *,
        earlier_seconds: float = 0.0,
    ) -> None:
        self.stage = stage
        self.total_steps = total_steps
        self.step = first_step
        self.values: dict[str, float] = {}
        self.is_finished = False
        self.last_line_at = -math.inf
        self._first_step = first_step
        self._earlier_seconds = earlier_seconds
        self._announce = announce
        self._start = time.monotonic()
        self._end: float | None = None

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show that this step is done.

        step: steps done, of total_steps.
        values: numbers to show beside it, by name.  A name that ends in "/s" is a rate, which
            is shown as "5,230 tok/s".  A value that is not given again stays.
        """
        self.step = step
        self.values = {**self.values, **values}
        self._announce(self)

    def finish(self) -> None:
        """Show that the stage is done."""
        self._end = time.monotonic()
        self.is_finished = True
        self._announce(self)

    @property
    def elapsed_seconds(self) -> float:
        """Seconds since the start, until now or until the stage was finished."""
        end = time.monotonic() if self._end is None else self._end
        return end - self._start

    @property
    def remaining_seconds(self) -> float | None:
        """Estimate from the mean time of the steps so far; None before the first step."""
        done = self.step - self._first_step
        if done <= 0:
            return None
        return self.elapsed_seconds / done * max(0, self.total_steps - self.step)

    @property
    def clock(self) -> str:
        """The ETA, or how long the finished stage took."""
        if self.is_finished:
            return f"done in {format_duration(self._earlier_seconds + self.elapsed_seconds)}"
        remaining = self.remaining_seconds
        return "ETA -:--" if remaining is None else f"ETA {format_duration(remaining)}"


class LiveView:
    """Stages in progress, for a person; stages may run at the same time, from several threads.

    On a terminal it is a panel that redraws itself. Elsewhere it prints plain lines without control
    characters: one per stage every few seconds, one about the pools every minute.
    """

    def __init__(
        self,
        run_name: str,
        *,
        console: Console | None = None,
        plain_interval_seconds: float = 5.0,
        pools_interval_seconds: float = 60.0,
    ) -> None:
        self._run_name = run_name
        self._console = console or Console(stderr=True)
        self._plain_interval_seconds = plain_interval_seconds
        self._lock = threading.Lock()
        self._pools_interval_seconds = pools_interval_seconds
        self._tasks: list[LiveTask] = []
        self._pools: dict[str, PoolActivity] = {}
        self._pools_line = ""
        self._pools_shown_at = -math.inf
        self._listeners: list[Callable[[LiveTask], None]] = []
        is_plain = not self._console.is_terminal or self._console.is_dumb_terminal
        self._live = None if is_plain else self._build_live()

    def __enter__(self) -> LiveView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()
            return
        for task in self._tasks:
            if not task.is_finished:
                self._print_plain(format_line(task))

    def _build_live(self) -> Live:
        # rich redirects stdout into the panel; if stdout is a file or a pipe, leave it alone.
        return Live(
            console=self._console,
            get_renderable=self._render,
            refresh_per_second=4,
            redirect_stdout=sys.stdout.isatty(),
        )

    def start(
        self, stage: str, total_steps: int, *, first_step: int = 0, earlier_seconds: float = 0.0
    ) -> LiveTask:
        """Show a new stage.

        stage: its name.
        total_steps: step at which it is done.
        first_step: steps that were done before this process, if the run is resumed.
        earlier_seconds: what the stage took before, in other processes too; counted in what is
            said when it is done, and not in the estimate of what is left.
        """
        task = LiveTask(
            stage, total_steps, first_step, self._announce, earlier_seconds=earlier_seconds
        )
        with self._lock:
            self._tasks.append(task)
        self._tell(task)
        return task

    def listen(self, listener: Callable[[LiveTask], None]) -> None:
        """Call this whenever a stage begins, moves or ends, in the thread that says so."""
        self._listeners.append(listener)

    def _tell(self, task: LiveTask) -> None:
        for listener in self._listeners:
            listener(task)

    def note(self, text: str) -> None:
        """Print a line that stays, and log it."""
        logging.getLogger(__name__).info(text)
        if self._live is not None:
            self._live.console.print(Text(text))
        else:
            self._print_plain(text)

    def show_pools(self, pools: Mapping[str, PoolActivity], line: str) -> None:
        """Show the recent activity of the pools.

        pools: the activity of each pool, in the order to show.
        line: Bottleneck.line, a sentence on which pool bounds the run; plain output shows only
            this.
        """
        now = time.monotonic()
        with self._lock:
            self._pools, self._pools_line = dict(pools), line
            is_due = now - self._pools_shown_at >= self._pools_interval_seconds and bool(line)
            if is_due:
                self._pools_shown_at = now
        if is_due and self._live is None:
            self._print_plain(f"[pools] {line}")

    def _announce(self, task: LiveTask) -> None:
        """Print the task's plain line if one is due; the panel redraws by itself."""
        self._tell(task)
        if self._live is not None:
            return
        now = time.monotonic()
        with self._lock:
            is_due = now - task.last_line_at >= self._plain_interval_seconds or task.is_finished
            if is_due:
                task.last_line_at = now
        if is_due:
            self._print_plain(format_line(task))

    def _print_plain(self, text: str) -> None:
        # console.print would wrap the line at 80 columns, the width it assumes without a terminal.
        with self._lock, suppress(OSError):  # a log on a full disk, a pipe whose reader has left
            print(text, file=self._console.file, flush=True)

    def _render(self) -> Panel:
        table = Table.grid(padding=(0, 2))
        with self._lock:
            tasks, pools, line = list(self._tasks), self._pools, self._pools_line
        for task in tasks:
            table.add_row(
                Text(task.stage, style="bold"),
                ProgressBar(total=task.total_steps, completed=task.step, width=BAR_CHARACTERS),
                Text(f"{task.step}/{task.total_steps}"),
                Text(task.clock, style="green" if task.is_finished else "cyan"),
                Text("  ".join(format_values(task.values))),
            )
        shown = Group(table, "", draw_pools(pools, line)) if pools else table
        return Panel(shown, title=Text(self._run_name), title_align="left", expand=False)


def format_line(task: LiveTask) -> str:
    """[distill] step 50/200  on-policy distance 0.0123  5,230 tok/s  ETA 0:42."""
    step = f"[{task.stage}] step {task.step}/{task.total_steps}"
    return "  ".join([step, *format_values(task.values), task.clock])


def format_values(values: Mapping[str, float]) -> list[str]:
    """Each value with its name: "loss 0.5", then the rates, as "5,230 tok/s"."""
    rates = [f"{format_number(value)} {name}" for name, value in values.items() if is_rate(name)]
    rest = [f"{name} {format_number(value)}" for name, value in values.items() if not is_rate(name)]
    return rest + rates


def is_rate(name: str) -> bool:
    """Whether a value of this name is an amount per second."""
    return name.endswith("/s")


def format_number(value: float) -> str:
    """Three significant digits; from 100 a whole number with separators; tiny ones as 1.2e-05."""
    size = abs(value)
    if not math.isfinite(value) or size == 0:
        return f"{value:.4g}"
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if size >= 1e-4 else f"{value:.1e}"


def format_duration(seconds: float) -> str:
    """0:42, 12:05 or 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"

"""The real command line, with an end for what a failed test leaves running."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pipeline.command_line import Run, start


@pytest.fixture
def launch() -> Iterator[Callable[..., Run]]:
    """command_line.start; whatever still runs when the test is over is ended."""
    runs: list[Run] = []

    def begin(command: str, *arguments: object, **options: Any) -> Run:
        runs.append(start(command, *arguments, **options))
        return runs[-1]

    yield begin
    for run in runs:
        run.end()

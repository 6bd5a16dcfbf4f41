import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distill_system.learner.peak_memory import read_peak_memory_bytes


def test_the_peak_grows_by_what_was_held_and_does_not_fall() -> None:
    # What is resident now; the peak of a process that held more before does not move.
    resident = 4096 * int(Path("/proc/self/statm").read_text().split()[1])
    before = read_peak_memory_bytes(torch.device("cpu"))
    size = max(0, before - resident) + 64 * 2**20
    block = torch.ones(size, dtype=torch.uint8)
    held = read_peak_memory_bytes(torch.device("cpu"))
    del block
    assert before >= 0.9 * resident
    assert held - before > 32 * 2**20
    assert read_peak_memory_bytes(torch.device("cpu")) >= held


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_the_systems_count_is_told_in_bytes(
    monkeypatch: pytest.MonkeyPatch, platform: str, unit: int
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5000))
    assert read_peak_memory_bytes(torch.device("cpu")) == 5000 * unit

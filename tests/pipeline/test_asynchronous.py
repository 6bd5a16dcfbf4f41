"""A run whose pools work ahead of the learner: real Ray, real vLLM, scaled, killed and resumed."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Callable
from itertools import filterfalse
from pathlib import Path

import pytest
from pipeline.command_line import Run, wait_until, write_configuration
from pipeline.exposure import (
    SECRETS,
    files_with_secrets,
    is_loopback,
    listening,
    planted,
    session_folders,
)

from distill_system.data import PromptFrontier
from distill_system.observe import RunDirectory
from distill_system.observe.metrics import read_metrics, read_prompts

Launch = Callable[..., Run]

BOUND = 2


@pytest.fixture
def folder(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> Path:
    """A run that may run two versions ahead, with a checkpoint every few steps."""
    path = write_configuration(
        tmp_path, tiny_model_folder(seed=1), tiny_model_folder(seed=2, num_layers=1)
    )
    form = json.loads(path.read_text())
    form["distill"] |= {
        "steps": 100_000,  # more than anybody waits for
        "staleness": {"max_staleness": BOUND, "importance": "state"},
        "measure_every": 20,
        "checkpoint_every": 4,
    }
    form["pools"]["student_rollout"] |= {"max_count": 2}
    # Ratios of truncated text: what the engines say of it is compared with the learner.
    form["rollout"]["sampling"] |= {"top_k": 12, "top_p": 0.95}
    path.write_text(json.dumps(form))
    return tmp_path


def _last_step(run: RunDirectory) -> int:
    rows = read_metrics(run) if run.metrics_path.exists() else []
    return max((row.step for row in rows), default=-1)


def _column(run: RunDirectory, name: str) -> list[float]:
    return [row.metrics[name] for row in read_metrics(run) if name in row.metrics]


def _scale(launch: Launch, run: RunDirectory, count: int, running: Run) -> None:
    """Ask for so many student rollout workers; returns 30 steps after they are there."""
    asked = launch("scale", run.path, f"student_rollout={count}").finish()
    assert asked.code == 0, asked.stderr
    done = _last_step(run)
    wait_until(lambda: _last_step(run) > done + 30, running)
    assert _column(run, "workers/student_rollout")[-1] == pytest.approx(count)


def test_a_scaled_and_killed_run_feeds_every_step_its_own_prompts_within_the_bound(
    launch: Launch, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One writer, then two, then one again; killed as a whole, resumed, and ended by SIGTERM.

    And while all stand there: nobody else reaches them, and no secret is in what they write.
    """
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    run = RunDirectory(folder / "run")
    first = launch("train", folder / "run.yaml")
    wait_until(lambda: _last_step(run) > 2, first)
    sockets: dict[str, set[str]] = {}
    for count in (2, 1):
        _scale(launch, run, count, first)
        sockets = sockets or listening(first)
    sessions = session_folders(first)
    for process in first.processes():
        process.send_signal(signal.SIGKILL)
    first.finish()
    killed_at = _last_step(run)
    second = launch("train", folder / "run.yaml", "--resume")
    wait_until(lambda: _last_step(run) > killed_at + 10, second)
    second.process.send_signal(signal.SIGTERM)
    second.finish()
    assert "Interrupted" in second.stderr, second.stderr

    _assert_no_door_is_open(sockets)
    assert sessions, "Ray's own folder was looked for where it is not"
    assert [*files_with_secrets([folder, *sessions])] == []
    (folder / "leak").write_text(f"token={SECRETS['HF_TOKEN']}")
    assert [*files_with_secrets([folder])] == [f"{folder / 'leak'}: HF_TOKEN"]
    assert not [name for name in planted() if planted()[name] in second.stdout + second.stderr]

    walks = {
        "on_policy": PromptFrontier(60, 0, "student_prompts"),
        "off_policy": PromptFrontier(60, 0, "teacher_prompts"),
    }
    rows, last = read_prompts(run), _last_step(run)
    assert last > killed_at + 10
    assert [row.step for row in rows] == list(range(1, last + 1))
    for row in rows:
        for stream, walk in walks.items():
            expected = Counter(f"prompts:{index}" for index in walk.take(4))
            assert Counter(row.prompt_ids[stream]) == expected, (row.step, stream)
    oldest = _column(run, "learner/max_staleness")
    assert len(oldest) == last
    assert 0 < max(oldest) <= BOUND
    assert max(_column(run, "held_out/max_logprob_gap")) < 1e-4, "the newest weights, joined or not"
    assert max(_column(run, "learner/logprob_gap")) < 1e-4, "of the step's own tokens, as sampled"
    assert max(_column(run, "in_flight/sequences")) <= 2 * (BOUND + 1) * 4


def _assert_no_door_is_open(sockets: dict[str, set[str]]) -> None:
    """Every process that must listen was seen, and other machines reach none of them."""
    expected = {"ray::RolloutWorker", "ray::TeacherScorer", "ray::Learner", "gcs_server", "raylet"}
    assert expected <= {title.split(".")[0] for title in sockets}
    reached = {title: {*filterfalse(is_loopback, found)} for title, found in sockets.items()}
    assert {title: found for title, found in reached.items() if found} == {}

"""What a person meets when a run cannot go on: one clear message, and nothing left behind.

Each case through the real command line.  What can be known before workers are asked for must be
told before: those cases are given too little time to start a cluster.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from pipeline.command_line import Run, wait_until, write_configuration, write_rows

Launch = Callable[..., Run]

WORKERS = (
    ("ray::RolloutWorker", "(student|teacher)_rollout"),
    ("ray::TeacherScorer", "teacher_scoring"),
    ("ray::Learner", "learner"),
)
MESSAGE = re.compile(r"^(?:[A-Z]\w*Error|Interrupted): ", re.MULTILINE)


@pytest.fixture
def configuration(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> Path:
    """A run of two random models that share their tokenizer; nothing is fine-tuned."""
    teacher, student = tiny_model_folder(seed=1), tiny_model_folder(seed=2, num_layers=1)
    return write_configuration(tmp_path, teacher, student)


def _checkpoints(configuration: Path) -> Path:
    return configuration.parent / "run/checkpoints/distill"


def _assert_one_message(run: Run, *said: str) -> None:
    assert run.code == 1, run.stderr
    assert len(MESSAGE.findall(run.stderr)) == 1, run.stderr
    assert "Traceback" not in run.stderr
    for part in said:
        assert part in run.stderr
    assert run.orphans() == []


def _fail_before_ray(launch: Launch, configuration: Path, *overrides: str) -> Run:
    """A run that must end by itself before any cluster stands."""
    run = launch("train", configuration, *overrides).finish()
    assert not (configuration.parent / "run/metrics.jsonl").exists(), "the cluster was started"
    return run


def test_a_path_without_a_model_is_told_at_once(launch: Launch, configuration: Path) -> None:
    run = _fail_before_ray(launch, configuration, "teacher.path=/nowhere/at/all")
    _assert_one_message(run, "teacher.path='/nowhere/at/all'", "no such folder")


def test_models_of_different_vocabularies_are_refused(
    launch: Launch, configuration: Path, tiny_model_folder: Callable[..., Path]
) -> None:
    student = tiny_model_folder(vocab_size=80)
    run = _fail_before_ray(launch, configuration, f"student.path={student}")
    _assert_one_message(run, "student.path=", "80 tokens", "64", "share one vocabulary")


def test_a_prompt_that_is_too_long_is_named(launch: Launch, configuration: Path) -> None:
    write_rows(configuration.parent / "prompts.jsonl", 60, first=0, num_words=9)
    run = _fail_before_ray(launch, configuration)
    _assert_one_message(run, "prompts:0", "9 tokens", "data.max_prompt_tokens=8")


def test_an_empty_data_set_is_named(launch: Launch, configuration: Path) -> None:
    (configuration.parent / "prompts.jsonl").write_text("")
    run = _fail_before_ray(launch, configuration)
    _assert_one_message(run, "data.prompts", "the data set is empty")


def test_a_cache_too_small_for_one_sequence_ends_the_run(
    launch: Launch, configuration: Path, tiny_model_folder: Callable[..., Path]
) -> None:
    run = launch(
        "train",
        configuration,
        f"teacher.path={tiny_model_folder(max_position_embeddings=4096, seed=1)}",
        f"student.path={tiny_model_folder(max_position_embeddings=4096, seed=2)}",
        "data.max_prompt_tokens=2000",
        "rollout.sampling.max_response_tokens=2000",
        "rollout.teacher_engine.kv_cache_mebibytes=1",
    ).finish()
    _assert_one_message(
        run,
        "ResourceError: teacher_rollout-0:",
        "rollout.teacher_engine.kv_cache_mebibytes",
        "4000 tokens",
    )
    assert not _checkpoints(configuration).exists()


def test_a_loss_that_is_not_a_number_ends_the_run_at_the_last_good_checkpoint(
    launch: Launch, configuration: Path
) -> None:
    run = launch("train", configuration, "distill.optimizer.learning_rate=1e30").finish()
    _assert_one_message(run, "NonFiniteError: learner-0:", "at step 1", "learning rate")
    assert [folder.name for folder in _checkpoints(configuration).iterdir()] == ["step_000001"]
    assert not (configuration.parent / "run/student").exists()


def _assert_interrupted(run: Run, number: signal.Signals) -> None:
    assert run.code == 128 + number
    assert MESSAGE.findall(run.stderr) == ["Interrupted: "]
    assert f"by {number.name}; --resume continues" in run.stderr
    assert "Traceback" not in run.stderr
    assert run.orphans() == []


def _last_step(configuration: Path) -> int:
    """Steps done at the newest whole checkpoint; -1 if there is none."""
    names = [path.name for path in _checkpoints(configuration).glob("step_??????")]
    return max((int(name.removeprefix("step_")) for name in names), default=-1)


def test_sigterm_to_every_process_ends_the_run(launch: Launch, configuration: Path) -> None:
    """As a job scheduler does: workers and Ray's own processes get it too."""
    run = launch("train", configuration, "distill.steps=3000")
    wait_until(lambda: _last_step(configuration) > 0, run)
    os.killpg(run.process.pid, signal.SIGTERM)
    _assert_interrupted(run.finish(seconds=60), signal.SIGTERM)


def test_a_run_survives_ctrl_c_and_a_killed_worker_and_is_then_done(
    launch: Launch, configuration: Path
) -> None:
    setting = ("train", configuration, "distill.steps=60")
    run = launch(*setting)
    wait_until(lambda: _last_step(configuration) > 0, run)
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does
    _assert_interrupted(run.finish(seconds=60), signal.SIGINT)

    interrupted_at = _last_step(configuration)
    run = launch(*setting, "--resume")
    wait_until(lambda: _last_step(configuration) > interrupted_at, run)
    title, name = random.choice(WORKERS)
    run.workers(title)[0].kill()
    run.finish(seconds=60)
    _assert_one_message(run, " died while the run waited for ", "--resume")
    assert re.search(rf"^WorkerError: {name}-0 \(process", run.stderr, re.MULTILINE)

    run = launch(*setting, "--resume").finish()
    assert run.code == 0, run.stderr
    assert run.orphans() == []
    folder = configuration.parent / "run"
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == list(range(61)), "every step once"

    before = _files(folder)
    assert "student/model.safetensors" in before
    run = launch(*setting).finish()
    assert run.code == 0, run.stderr
    changed = {path for path, state in _files(folder).items() if before.get(path) != state}
    assert changed == {"report.html", "summary.json"}


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_ino)
        for path in folder.rglob("*")
        if path.is_file()
    }

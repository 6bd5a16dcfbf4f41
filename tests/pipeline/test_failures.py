"""What a person meets when a run cannot go on: one clear message, and nothing left behind.

Through the real command line, each start of which costs seconds; what is told before any worker is
asked for is told in the tests' own process too, once one case has shown that both say the same. A
loss that is not a number ends one of the runs of test_compare.py.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import ray
from pipeline.command_line import (
    MESSAGE,
    Run,
    assert_one_message,
    wait_until,
    write_configuration,
    write_rows,
)
from pipeline.sabotage import sabotaged
from typer.testing import CliRunner

from distill_system.cli import app
from distill_system.observe import RunDirectory
from distill_system.observe.fault_log import read_faults
from distill_system.observe.metrics import read_metrics, read_prompts

Launch = Callable[..., Run]

WORKERS = (
    ("ray::RolloutWorker", "(student|teacher)_rollout"),
    ("ray::TeacherScorer", "teacher_scoring"),
    ("ray::Learner", "learner"),
)


@pytest.fixture
def configuration(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> Path:
    """A run of two random models that share their tokenizer; nothing is fine-tuned."""
    teacher, student = tiny_model_folder(seed=1), tiny_model_folder(seed=2, num_layers=1)
    return write_configuration(tmp_path, teacher, student)


def _checkpoints(configuration: Path) -> Path:
    return configuration.parent / "run/checkpoints/distill"


def _assert_one_message(run: Run, *said: str) -> None:
    assert run.code == 1, run.stderr
    assert_one_message(run.stderr, *said)
    assert run.orphans() == []


def _refused(configuration: Path, *overrides: str) -> str:
    """The message of a train command that ends by itself before any cluster is asked for."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ray, "init", _fail_because_ray_was_asked)
        said = CliRunner().invoke(app, ["train", str(configuration), *overrides])
    assert said.exit_code == 1, said.output
    assert len(MESSAGE.findall(said.stderr)) == 1, said.stderr
    return said.stderr


def _fail_because_ray_was_asked(*_: object, **__: object) -> None:
    raise AssertionError("a cluster was asked for")


def test_a_path_without_a_model_is_told_at_once(launch: Launch, configuration: Path) -> None:
    override = "teacher.path=/nowhere/at/all"
    run = launch("train", configuration, override).finish()
    _assert_one_message(run, "teacher.path='/nowhere/at/all'", "no such folder")
    assert not (configuration.parent / "run/metrics.jsonl").exists(), "the cluster was started"
    assert run.stderr == _refused(configuration, override)


def test_models_of_different_vocabularies_are_refused(
    configuration: Path, tiny_model_folder: Callable[..., Path]
) -> None:
    said = _refused(configuration, f"student.path={tiny_model_folder(vocab_size=80)}")
    for part in ("student.path=", "80 tokens", "64", "share one vocabulary"):
        assert part in said


def test_a_prompt_that_is_too_long_is_named(configuration: Path) -> None:
    write_rows(configuration.parent / "prompts.jsonl", 60, first=0, num_words=9)
    said = _refused(configuration)
    for part in ("prompts:0", "9 tokens", "data.max_prompt_tokens=8"):
        assert part in said


def test_an_empty_data_set_is_named(configuration: Path) -> None:
    (configuration.parent / "prompts.jsonl").write_text("")
    said = _refused(configuration)
    assert "data.prompts" in said
    assert "the data set is empty" in said


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


READS_OTHERWISE = """
def scale_the_last_norm(module):
    load = module._load_model

    def load_otherwise(*arguments):
        model = load(*arguments)
        if is_worker("teacher_rollout-0"):
            model.model.norm.weight.mul_(3.0)
        return model

    module._load_model = load_otherwise

PATCHES = {"distill_system.rollout.transformers_engine": scale_the_last_norm}
"""


def test_an_engine_that_reads_its_model_otherwise_ends_the_run_before_its_first_step(
    launch: Launch, configuration: Path
) -> None:
    environment = sabotaged(configuration.parent / "otherwise", READS_OTHERWISE)
    launch = partial(launch, environment=environment)
    run = launch("distill", configuration, "rollout.engine=transformers").finish()
    _assert_one_message(
        run,
        "ModelError: start check: the teacher's engine and its torch model, the scorer, read",
        "rounding in float32 explains 0.001 and 0.01",
        "Nothing was learned",
    )
    assert not _checkpoints(configuration).exists()
    metrics = configuration.parent / "run/metrics.jsonl"
    assert not metrics.exists() or '"learner/loss"' not in metrics.read_text()
    assert run.orphans() == []


def _assert_interrupted(run: Run, number: signal.Signals) -> None:
    assert run.code == 128 + number
    assert MESSAGE.findall(run.stderr) == ["Interrupted: "]
    assert f"Interrupted: by {number.name}; " in run.stderr
    assert run.stderr.rstrip().endswith(" --resume auto"), "how to go on"
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
    setting = ("train", configuration, "distill.steps=40")
    run = launch(*setting)
    wait_until(lambda: _last_step(configuration) > 0, run)
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does
    _assert_interrupted(run.finish(seconds=120), signal.SIGINT)
    line = f"distill-system train {configuration} distill.steps=40 --resume auto"
    assert run.stderr.rstrip().endswith(line)
    interrupted_at = _last_step(configuration)
    last_row = (configuration.parent / "run/metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last_row)["step"] == interrupted_at, "nothing that was learned is lost"

    assert "add --resume" in _refused(configuration, "distill.steps=40")
    run = launch(*setting, "--resume", "faults.max_replacements=0")
    wait_until(lambda: _last_step(configuration) > interrupted_at, run)
    title, name = random.choice(WORKERS)
    run.workers(title)[0].kill()
    run.finish(seconds=60)
    _assert_one_message(run, " died while the run waited for ", "--resume")
    assert re.search(rf"^WorkerLostError: {name}-0 \(process", run.stderr, re.MULTILINE)

    run = launch(*setting, "--resume").finish()
    assert run.code == 0, run.stderr
    assert run.orphans() == []
    folder = configuration.parent / "run"
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == list(range(41)), "every step once"

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


TEACHER_DIES = """
def break_rollouts(module):
    def before(self, *_):
        if is_worker("teacher_rollout-0"):
            die_once("teacher")

    wrap(module.RolloutWorker, "generate", before)

PATCHES = {"distill_system.rollout.worker": break_rollouts}
"""


def test_a_student_that_collapses_ends_the_run_with_a_checkpoint(
    launch: Launch, configuration: Path
) -> None:
    """At a thousand times the learning rate that anybody would take. No step reads the teacher's
    engine, which writes before the others start: it dies as it does, and is replaced."""
    launch = partial(launch, environment=sabotaged(configuration.parent / "losses", TEACHER_DIES))
    overrides = (
        "rollout.engine=transformers",
        "distill.objective={type: token_matching, on_policy: {type: reverse_kl}}",
        "trackers=[]",
        "distill.steps=300",
        "distill.checkpoint_every=1000",
        "distill.optimizer.learning_rate=1.0",
        "distill.collapse={action: stop, window: 3}",
    )
    ended = launch("distill", configuration, *overrides).finish()
    _assert_one_message(ended, "the student may be collapsing: ", "distill.collapse.")
    [kept] = _checkpoints(configuration).glob("step_??????")
    assert 6 <= int(kept.name.removeprefix("step_")) < 300
    assert (kept / "manifest.json").is_file()
    run = RunDirectory(configuration.parent / "run")
    told = [(row.stage, row.event, row.worker) for row in read_faults(run)]
    assert told == [("distill", event, "teacher_rollout-0") for event in ("lost", "replaced")]
    assert run.evaluation_path("teacher").is_file()


DRIFT_AND_POISON = """
def drift_and_poison(module):
    take, write = module.RolloutWorker.receive_weights, module.RolloutWorker.generate
    poison, drawn = HERE / "poison", []

    def take_otherwise(self, version, update_info):
        done = take(self, version, update_info)
        if version >= 2 and is_worker("student_rollout-0"):
            self._engine._model.model.norm.weight.mul_(1.5)
        return done

    def write_or_die(self, prompts, *rest):
        ids = [prompt.prompt_id for prompt in prompts if prompt.prompt_id.startswith("prompts:")]
        if os.environ["DISTILL_SYSTEM_WORKER"].startswith("teacher_rollout-"):
            drawn.extend(ids[:1])
            if len(drawn) == 4 and not poison.exists():
                poison.write_text(drawn[-1])
            if poison.exists() and poison.read_text() in ids:
                die("poison")
        return write(self, prompts, *rest)

    module.RolloutWorker.receive_weights = take_otherwise
    module.RolloutWorker.generate = write_or_die

PATCHES = {"distill_system.rollout.worker": drift_and_poison}
"""


def test_an_engine_that_drifts_is_replaced_and_a_prompt_that_kills_engines_is_left_out(
    launch: Launch, configuration: Path
) -> None:
    """The student's engine holds other weights after every publish, sent anew or not. The prompt
    costs each teacher engine that answers it."""
    faults = configuration.parent / "faults"
    run = launch(
        "distill",
        configuration,
        "rollout.engine=transformers",
        "trackers=[]",
        "distill.steps=6",
        "rollout.max_logprob_gap=0.01",
        "faults.fatal_prompts=leave_out",
        environment=sabotaged(faults, DRIFT_AND_POISON),
    ).finish()
    assert run.code == 0, run.stderr
    assert run.orphans() == []
    said = "".join((run.stdout + run.stderr).split())
    assert "Theweightsaresentanew" in said
    poison = (faults / "poison").read_text()
    assert f"prompt'{poison}'isleftout(faults.fatal_prompts)" in said

    folder = RunDirectory(configuration.parent / "run")
    rows = read_faults(folder)
    lost = [(row.worker, row.cause) for row in rows if row.event == "lost"]
    drifted = [cause for worker, cause in lost if worker == "student_rollout-0"]
    assert len(drifted) == 1
    assert "disagrees with the learner under the same weights, sent anew" in drifted[0]
    assert len(lost) - 1 == sum(worker.startswith("teacher_rollout-") for worker, _ in lost) >= 2
    assert sum(row.event == "replaced" for row in rows) == len(lost)

    trained = [line.prompt_ids["off_policy"] for line in read_prompts(folder)]
    assert [len(ids) for ids in trained].count(3) == 1, "a step without the prompt"
    assert poison not in {prompt for ids in trained for prompt in ids}
    metrics = [row.metrics for row in read_metrics(folder) if "learner/logprob_gap" in row.metrics]
    assert metrics[-1]["learner/logprob_gap"] < 1e-4, "the replacement has the learner's weights"

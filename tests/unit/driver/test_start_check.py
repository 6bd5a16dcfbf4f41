"""Engines that are transformers models by another configuration, before real learner and scorer."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fakes.local_workers import LocalWorkers
from metric_names import is_documented
from one_rank import one_rank
from simulated_pools import make_prompts
from transformers import AutoConfig, AutoModelForCausalLM

from distill_system.config.rollout import ScoringConfig
from distill_system.driver import Driver, start_check
from distill_system.driver.start_check import (
    LIMITS,
    MAX_RESPONSE_TOKENS,
    StartCheck,
    choose_by_length,
    find_precision,
)
from distill_system.errors import ModelError
from distill_system.learner import LearnerGroup, ModelSource
from distill_system.records import Author, Finish, Trajectory, VersionSpan
from distill_system.rollout import RolloutPool, RolloutWorker
from distill_system.run.model_checks import ModelFacts
from distill_system.run.pools import Pools
from distill_system.scoring import ScoringPool, TeacherScorer


class Engine:
    """Stands for a RolloutWorker: any tokens, and what a transformers model says of them.

    settings: of config.json that this engine reads otherwise. says: what becomes of its
    log-probabilities.
    """

    def __init__(self, folder, author, *, dtype=torch.float32, says=lambda logprobs: logprobs):
        self.model = AutoModelForCausalLM.from_pretrained(folder).to(dtype).eval()
        self.author, self.says, self.written = author, says, []

    def reads_otherwise(self, folder, **settings):
        config = AutoConfig.from_pretrained(folder)
        for name, value in settings.items():
            setattr(config, name, value)
        self.model = AutoModelForCausalLM.from_pretrained(folder, config=config).eval()
        return self

    def generate(self, prompts, sampling, seed, label):
        assert (sampling.temperature, sampling.top_p) == (1.0, 1.0), "what torch can say"
        assert sampling.max_response_tokens <= MAX_RESPONSE_TOKENS
        generator = np.random.default_rng(seed)
        for prompt in prompts:
            length = 1 + int(generator.integers(sampling.max_response_tokens))
            response = generator.integers(4, 64, length).astype(np.int32)
            ids = np.concatenate([prompt.token_ids, response])
            self.written.append(
                Trajectory(
                    trajectory_id=f"{label}/{self.author}/{prompt.prompt_id}",
                    prompt_id=prompt.prompt_id,
                    author=self.author,
                    token_ids=ids,
                    num_prompt_tokens=prompt.token_ids.size,
                    behaviour_logprobs=self.says(self._read(ids)[-length:]),
                    temperature=1.0,
                    finish=Finish.LENGTH,
                    weight_versions=(VersionSpan(version=0, start=0, end=length),)
                    if self.author is Author.STUDENT
                    else (),
                )
            )
        return self.written[-len(prompts) :]

    @torch.no_grad()
    def _read(self, ids):
        tokens = torch.from_numpy(ids).long()
        logits = self.model(input_ids=tokens[None]).logits[0].float()
        return logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0].numpy()


@pytest.fixture(scope="module")
def folders(tiny_model_folder):
    return {
        Author.STUDENT: str(tiny_model_folder(seed=2)),
        Author.TEACHER: str(tiny_model_folder(hidden_size=96, num_heads=3, seed=1)),
    }


@pytest.fixture(scope="module")
def readers(folders):
    """The real ones: learner and scorer."""
    source = ModelSource(path=folders[Author.STUDENT], teacher_path=folders[Author.TEACHER])
    learner = one_rank(source, max_response_tokens=8)
    scorer = TeacherScorer(
        model_path=folders[Author.TEACHER],
        config=ScoringConfig(),
        vocabulary_chunk_tokens=5,
        uses_gpu=False,
    )
    return LearnerGroup(LocalWorkers([learner])), ScoringPool(LocalWorkers([scorer]))


@pytest.fixture
def make_check(configure, folders, readers):
    """A check of these engines; its notes are in check.context.view.notes."""

    def make(*overrides, students=None, teachers=None, evaluation=None):
        def pool(engines, author):
            engines = engines or [Engine(folders[author], author)]
            return RolloutPool(LocalWorkers(engines, stands_for=RolloutWorker))

        nothing: Any = None
        student_pool = pool(students, Author.STUDENT)
        pools = Pools(
            students=student_pool,
            teachers=pool(teachers, Author.TEACHER),
            scorers=readers[1],
            learner=readers[0],
            evaluation=student_pool if evaluation is None else pool(evaluation, Author.STUDENT),
            ranks=nothing,
            weights=nothing,
            placed={},
        )
        notes: list[str] = []
        context: Any = SimpleNamespace(
            config=configure(*overrides),
            view=SimpleNamespace(note=notes.append, notes=notes),
            student_path=folders[Author.STUDENT],
            teacher_path=folders[Author.TEACHER],
        )
        data: Any = SimpleNamespace(prompts=make_prompts(9))
        return StartCheck(context, pools, data)

    return make


def test_engines_that_read_as_torch_does_are_told_in_a_line_each(make_check):
    check = make_check()
    metrics = check.run()
    assert len(metrics) == 4
    assert max(metrics.values()) < 1e-5
    assert all(map(is_documented, metrics))
    [student, teacher] = check.context.view.notes
    assert "engine and learner read the student alike" in student
    assert "engine and scorer read the teacher alike" in teacher


def test_a_family_in_no_table_runs_on_its_agreement_and_is_told(make_check, monkeypatch):
    facts = ModelFacts(untested="stablelm", is_quantised=False)
    monkeypatch.setattr(start_check, "read_facts", lambda path, **_: facts)
    check = make_check()
    check.run()
    assert all("model_type='stablelm' is in no table" in note for note in check.context.view.notes)


def test_every_engine_of_every_pool_is_looked_at(make_check, folders):
    engines = [Engine(folders[Author.STUDENT], Author.STUDENT) for _ in range(7)]
    make_check("pools.evaluation={count: 1}", students=engines[:6], evaluation=engines[6:]).run()
    assert all(engine.written for engine in engines)


OTHER_READINGS = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
    "rms_norm_eps": 0.5,
    "hidden_act": "gelu",
}


@pytest.mark.parametrize("setting", OTHER_READINGS)
def test_a_setting_that_the_engine_reads_otherwise_ends_the_run(make_check, folders, setting):
    folder = folders[Author.STUDENT]
    engine = Engine(folder, Author.STUDENT)
    engine.reads_otherwise(folder, **{setting: OTHER_READINGS[setting]})
    with pytest.raises(ModelError, match="student's engine and its torch model, the learner") as it:
        make_check(students=[engine]).run()
    assert folder in str(it.value)
    said = re.search(
        r"token (\d+) at position (\d+) of '(\w+)' \(response token (\d+) of "
        r".*probability (\S+) in the engine and (\S+) in torch",
        str(it.value),
    )
    assert said is not None
    token, position, prompt, place = int(said[1]), int(said[2]), said[3], int(said[4]) - 1
    [written] = [t for t in engine.written if t.prompt_id == prompt]
    assert written.token_ids[position] == token == written.response_ids[place]
    assert float(said[5]) == pytest.approx(written.behaviour_logprobs[place], rel=1e-4)
    honest = Engine(folder, Author.STUDENT)._read(written.token_ids)
    assert float(said[6]) == pytest.approx(honest[position - 1], rel=1e-4)
    gaps = [
        np.abs(t.behaviour_logprobs - Engine(folder, Author.STUDENT)._read(t.token_ids)[-n:])
        for t in engine.written
        for n in [t.num_response_tokens]
    ]
    largest = max(gap.max() for gap in gaps)
    assert abs(float(said[5]) - float(said[6])) == pytest.approx(largest, rel=1e-3)


def test_a_teacher_that_its_scorer_reads_otherwise_ends_the_run(make_check, folders):
    engine = Engine(folders[Author.TEACHER], Author.TEACHER, says=lambda logprobs: 1.1 * logprobs)
    check = make_check(teachers=[engine])
    with pytest.raises(ModelError, match=r"teacher's engine and its torch model, the scorer") as it:
        check.run()
    assert folders[Author.TEACHER] in str(it.value)
    assert "rollout.teacher_engine.dtype" in str(it.value)


def test_one_engine_of_many_is_enough(make_check, folders):
    engines = [Engine(folders[Author.STUDENT], Author.STUDENT) for _ in range(6)]
    engines[4].says = lambda logprobs: logprobs - 0.02
    with pytest.raises(ModelError, match=r"largest 0\.02"):
        make_check(students=engines).run()


def test_a_log_probability_that_is_no_number_is_no_agreement(make_check, folders):
    def forget_one(logprobs):
        return np.where(np.arange(logprobs.size) == logprobs.size - 1, np.nan, logprobs)

    engine = Engine(folders[Author.STUDENT], Author.STUDENT, says=forget_one)
    with pytest.raises(ModelError, match="log-probability nan in the engine"):
        make_check(students=[engine]).run()


def test_a_bfloat16_engine_has_its_own_limits(make_check, folders):
    def engine():
        return Engine(folders[Author.STUDENT], Author.STUDENT, dtype=torch.bfloat16)

    metrics = make_check("rollout.student_engine.dtype=bfloat16", students=[engine()]).run()
    assert 1e-3 < metrics["start_check/student_logprob_gap"] < LIMITS["bfloat16"].median / 3
    with pytest.raises(ModelError, match="rounding in float32"):
        make_check(students=[engine()]).run()


def test_a_wider_gap_may_be_allowed(make_check, folders):
    def engine():
        says = lambda logprobs: logprobs - 0.1  # noqa: E731
        return Engine(folders[Author.STUDENT], Author.STUDENT, says=says)

    make_check("rollout.max_logprob_gap=0.2", students=[engine()]).run()
    for allowed in ("0.05", "null"):
        with pytest.raises(ModelError):
            make_check(f"rollout.max_logprob_gap={allowed}", students=[engine()]).run()


@pytest.mark.parametrize(
    ("overrides", "student", "teacher"),
    [
        ((), "float32", "float32"),
        (("learner.compute_dtype=bfloat16",), "bfloat16", "float32"),
        (("rollout.student_engine.dtype=float16",), "float16", "float32"),
        (("scoring.dtype=bfloat16",), "float32", "bfloat16"),
        (("pools.teacher_rollout.gpus=1",), "float32", "tf32"),
    ],
)
def test_the_coarser_precision_counts(configure, overrides, student, teacher):
    config = configure(*overrides)
    assert (find_precision(config, "student"), find_precision(config, "teacher")) == (
        student,
        teacher,
    )


def test_quantised_weights_are_unpacked_by_each_in_its_own_way(configure):
    assert find_precision(configure(), "teacher", is_quantised=True) == "bfloat16"


def test_the_shortest_and_the_longest_prompt_are_among_the_chosen():
    prompts = [make_prompts(1, num_tokens)[0] for num_tokens in (5, 2, 9, 3, 7, 4)]
    sizes = [prompt.token_ids.size for prompt in choose_by_length(prompts, 3)]
    assert (sizes[0], sizes[-1], len(sizes)) == (2, 9, 3)
    assert choose_by_length(prompts[:2], 4) == [prompts[1], prompts[0]]
    assert choose_by_length(prompts[:1], 4) == prompts[:1]


def test_a_run_is_checked_under_its_first_weights_and_before_anything_is_measured():
    """And where it is resumed, too: the figures of row 0 are written once."""
    for first in (0, 7):
        calls: list[Any] = []

        def note(name, calls=calls, result=None):
            def call(*arguments, **_):
                calls.append((name, *arguments))
                return result

            return call

        class EnoughError(Exception):
            """Of what was to be seen."""

        def stop(*_):
            raise EnoughError

        driver = object.__new__(Driver)
        recorder = SimpleNamespace(open=lambda first=first: first, write=note("write"))
        weights = SimpleNamespace(publish=note("publish"))
        fakes: dict[str, Any] = {
            "recorder": recorder,
            "pools": SimpleNamespace(weights=weights),
            "restarts": SimpleNamespace(goes_on_after=lambda first: None),
            "start_check": SimpleNamespace(run=note("check", result={"start_check/x": 1.0})),
            "measuring": SimpleNamespace(
                evaluate_teacher=note("teacher"),
                evaluate_student=note("student", result={"y": 2.0}),
            ),
            "streams": SimpleNamespace(begin=stop, measures_sources=lambda done: False),
        }
        driver.__dict__.update(fakes)
        with pytest.raises(EnoughError):
            driver._live()
        assert calls[:3] == [("publish", first), ("check",), ("teacher",)]
        assert calls[3:] == (
            [("student", "before"), ("write", 0, {"start_check/x": 1.0, "y": 2.0})]
            if first == 0
            else []
        )

"""Both streams in step with the learner: who is asked for what and when, and that a run repeats.

The real pools stand over workers of this process whose text follows from seed, label, prompt and
weights, as a rollout worker's does: two runs agree to the bit only if they asked for the same.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes.direct_transfer import DirectTransfer
from fakes.hand_clock import HandClock
from fakes.local_workers import Done, LocalWorkers
from simulated_pools import make_prompts, make_rows

from distill_system.cluster import SupervisedWorkers
from distill_system.config import load_config
from distill_system.errors import WorkerLostError
from distill_system.learner import Learner, LearnerGroup
from distill_system.observe import RunDirectory, Timings
from distill_system.records import (
    Author,
    Finish,
    StepResult,
    TeacherTargets,
    Trajectory,
    VersionSpan,
    WeightVersion,
)
from distill_system.rollout import RolloutPool, RolloutWorker
from distill_system.run.pools import Pools
from distill_system.scoring import ScoringPool, TeacherScorer
from distill_system.seeds import derive_seed
from distill_system.streams import LockstepStreams
from distill_system.streams.off_policy import OffPolicyMixture
from distill_system.workers import StartedWorker

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
STEPS = 7
MIXTURE = "distill.off_policy_source={teacher: 1, store: 1, dataset: 1}"
REPLAY = ("distill.off_policy_source=dataset", "distill.replay={initial_share: 0.7, capacity: 6}")
FEW_PROMPTS = ("distill.student_prompts_per_step=25", "distill.teacher_prompts_per_step=22")
ROWS = "{type: embedded, split: distractor, num_examples: 1}"
SOURCE = f"{{source: {ROWS}, held_out: {ROWS}}}"
POLICY = (
    f"data.prompts={{type: mixture, sources: {{a: {SOURCE}, b: {SOURCE}}}, policy: {{every: 2}}}}"
)
TEXT = (
    f"data.plain_text={ROWS}",
    "distill.language_model={weight: 0.5, sequences_per_step: 2}",
)
PAIRED = (
    "distill.objective={type: preference}",
    "distill.student_prompts_per_step=4",
    "distill.teacher_prompts_per_step=4",
)
PAIRS = (
    "distill.objective={type: preference, pairs: data}",
    "distill.off_policy_source=preferences",
    "distill.teacher_prompts_per_step=4",
    "data.preferences={type: jsonl, path: pairs.jsonl}",
)
RISING = [{"held_out/cross_entropy": 1.0 + step} for step in range(STEPS)]


CALLS = itertools.count()


class Later(Done):
    """A call that runs when it is waited for, so that it lasts from its start on.

    number: in the order in which calls begin.
    """

    run: Any
    number: int

    def __init__(self, run):
        super().__init__()
        object.__setattr__(self, "run", run)
        object.__setattr__(self, "number", next(CALLS))

    def complete(self):
        if self.run is not None:
            result, _ = self.run(), object.__setattr__(self, "run", None)
            for field in ("value", "error"):
                object.__setattr__(self, field, getattr(result, field))


class WaitedForWorkers(LocalWorkers):
    """Workers whose calls run as somebody waits for them, those first that began first."""

    def start(self, worker, method, *arguments):
        return Later(lambda: LocalWorkers.start(self, worker, method, *arguments))

    def start_with_receipt(self, worker, method, *arguments):
        result = Later(None)

        def run():
            receipt, value = LocalWorkers.start_with_receipt(self, worker, method, *arguments)
            object.__setattr__(result, "value", value.value)
            return receipt

        return Later(run), result

    def current(self, result):
        assert result.value is not None, "its receipt was finished"
        return result

    def finish(self, references, **how):
        for reference in references:
            if isinstance(reference, Later):
                reference.complete()
        return super().finish(references, **how)

    def wait_any(self, references, *, what, seconds, unhurried=(), together_seconds=0.0):
        left = [reference for reference in references if reference.run is not None]
        if left:
            min(left, key=lambda reference: reference.number).complete()
        return [reference for reference in references if reference.run is None]


class Writer:
    """A rollout worker. log: of (author, label, prompt ids), shared by all workers of a run."""

    def __init__(self, author, log, *, pause=lambda: None):
        self.author, self.log, self.pause = author, log, pause
        self.version, self.sampling = 0, None

    def generate(self, prompts, sampling, seed, label):
        self.pause()
        self.log.append((str(self.author), label, [prompt.prompt_id for prompt in prompts]))
        self.sampling, self.seed = sampling, seed
        return [self._write(prompt, seed, label) for prompt in prompts]

    def _write(self, prompt, seed, label):
        own = derive_seed(seed, label, prompt.sample_id, self.version)
        response = np.random.default_rng(own).integers(64, size=1 + own % 5).astype(np.int32)
        student = self.author is Author.STUDENT
        span = VersionSpan(version=self.version, start=0, end=response.size)
        return Trajectory(
            trajectory_id=f"{label}/{self.author}/{prompt.sample_id}",
            prompt_id=prompt.prompt_id,
            author=self.author,
            token_ids=np.concatenate([prompt.token_ids, response]),
            num_prompt_tokens=prompt.token_ids.size,
            behaviour_logprobs=np.full(response.size, -own % 7, np.float32),
            temperature=self.sampling.temperature,
            finish=Finish.STOP,
            weight_versions=(span,) if student else (),
        )


class Scorer:
    def __init__(self, log):
        self.log, self.needs = log, {}

    def score_with_receipt(self, chunk, needs):
        self.log.append(("scorer", str(chunk.stream)))
        self.needs[chunk.stream] = needs
        return chunk.num_tokens, [
            TeacherTargets(trajectory_id=t.trajectory_id, num_tokens=t.num_response_tokens)
            for t in chunk.trajectories
        ]


class Rank:
    """A learner rank. learned: per step, (stream, trajectory) of all chunks of all ranks."""

    def __init__(self, log, learned, writers, *, seconds, pause):
        self.log, self.learned, self.writers, self.seconds = log, learned, writers, seconds
        self.pause = pause

    def step(self, step, chunks, totals, *targets):
        self.pause()
        self.log.append(("learner", step))
        for chunk, said in zip(chunks, targets, strict=True):
            names = [t.trajectory_id for t in chunk.trajectories]
            assert said is None or names == [t.trajectory_id for t in said]
            fed = self.learned.setdefault(step, [])
            fed.extend((str(chunk.stream), trajectory) for trajectory in chunk.trajectories)
        tokens = sum(total.num_tokens for total in totals.values())
        return StepResult(step=step, metrics={}, num_response_tokens=tokens, seconds=self.seconds)

    def address(self):
        return "here", 1

    def connect_rollouts(self, *arguments):
        """Its workers are these writers."""

    def start_publish(self, version):
        self.log.append(("publish", version))
        for writer in self.writers.objects.values():
            writer.version = version
        received = WeightVersion(version=version, num_bytes=1, digest=1, seconds=0.0)
        return [Done(received)]


class Run:
    """Streams over pools of their own, and what went through them."""

    def __init__(
        self,
        folder,
        *overrides,
        students=2,
        teachers=1,
        scorers=1,
        ranks=1,
        seconds=0.0,
        step_seconds=0.0,
        workers=LocalWorkers,
        supervised=False,
    ):
        self.config = load_config(
            [QUICKSTART],
            [
                f"distill.steps={STEPS}",
                "distill.student_prompts_per_step=4",
                "distill.teacher_prompts_per_step=3",
                f"pools.learner.count={ranks}",
                "data.trajectory_store=store",
                "seed=5",
                *overrides,
            ],
        )
        self.log, self.learned, self.clock = [], {}, HandClock()
        data: Any = SimpleNamespace(
            prompts=make_prompts(11),
            stored=make_rows("store", 5),
            student_sft=make_rows("dataset", 7),
            plain_text=make_rows("text", 5),
            preferences=[
                replace(row, prompt_id=f"preferences:{at // 2}")
                for at, row in enumerate(make_rows("half", 10))
            ],
        )
        if self.config.data.source_policy is not None:
            names = ["prompts.a"] * 4 + ["prompts.b"] * 7
            data.prompts = [
                replace(prompt, source=name)
                for prompt, name in zip(data.prompts, names, strict=True)
            ]
            data.source_held_out = {"a": (), "b": ()}
        self.students, self.teachers = (
            workers(
                [Writer(author, self.log, pause=self._pause(seconds)) for _ in range(count)],
                stands_for=RolloutWorker,
            )
            for author, count in ((Author.STUDENT, students), (Author.TEACHER, teachers))
        )
        self.scorers = workers([Scorer(self.log)] * scorers, stands_for=TeacherScorer)
        rank = Rank(
            *(self.log, self.learned, self.students),
            seconds=step_seconds,
            pause=self._pause(step_seconds),
        )
        learner = LearnerGroup(workers([rank] * ranks, stands_for=Learner))
        learner.connect_rollouts("gloo", None, students, 10.0)
        context: Any = SimpleNamespace(
            config=self.config, timings=Timings(RunDirectory(folder / "run"), clock=self.clock)
        )
        weights: Any = DirectTransfer(learner, self.students)
        nothing: Any = None
        self.groups: dict[str, Any] = {
            "student_rollout": self.students,
            "teacher_rollout": self.teachers,
            "teacher_scoring": self.scorers,
        }
        self.callers: dict[str, Any] = {
            name: SupervisedWorkers(name, group) if supervised else group
            for name, group in self.groups.items()
        }
        pools = Pools(
            students=RolloutPool(self.callers["student_rollout"]),
            teachers=RolloutPool(self.callers["teacher_rollout"]),
            scorers=ScoringPool(self.callers["teacher_scoring"]),
            learner=learner,
            evaluation=RolloutPool(self.callers["student_rollout"]),
            ranks=nothing,
            weights=weights,
            placed={},
        )
        self.context, self.data = context, data
        self.streams = LockstepStreams(context, pools, data, clock=self.clock)

    def supervise(self, supervision):
        for workers in self.callers.values():
            workers.supervision = supervision
        self.streams.supervision = supervision

    def learned_texts(self):
        """Of each step: stream, name and tokens of every trajectory, in their order."""
        return {
            step: [(stream, t.trajectory_id, t.token_ids.tolist()) for stream, t in fed]
            for step, fed in self.learned.items()
        }

    def _pause(self, seconds):
        """What a call of this length does with the clock."""
        return partial(self.clock.sleep, seconds) if seconds else lambda: None

    def play(self, first=0, end=STEPS, *, metrics=RISING):
        """Steps as the driver takes them; the state after each, as a checkpoint would keep it."""
        states = {first: json.loads(json.dumps(self.streams.state()))}
        for writer in self.students.objects.values():
            writer.version = first
        if first == 0:
            self.follow_sources(0)
        self.streams.begin(first)
        for step in range(first, end):
            self.step(step, metrics[step])
            states[step + 1] = json.loads(json.dumps(self.streams.state()))
        return states

    def step(self, step, measured=None):
        self.streams.learn(step, self.streams.take(step))
        self.streams.publish(step + 1)
        self.follow_sources(step + 1)
        self.streams.on_metrics(measured or {})

    def follow_sources(self, done):
        """As the driver does; the student is behind on b, from step to step more."""
        if self.streams.measures_sources(done):
            self.streams.follow_sources(done, {"a": 1.0, "b": 1.0 + done})

    def take_steps(self, count):
        self.streams.begin(0)
        for step in range(count):
            self.step(step)

    def of_stream(self, stream, step):
        return [t for name, t in self.learned.get(step, []) if name == stream]


def _content(learned):
    """Everything that a step was fed, comparable to the bit."""
    return {
        step: sorted(
            (stream, t.trajectory_id, t.token_ids.tolist(), t.behaviour_logprobs.tolist())
            for stream, t in fed
        )
        for step, fed in learned.items()
    }


def test_the_teacher_is_asked_a_step_ahead_and_reads_its_own_text_while_the_student_writes(
    tmp_path,
):
    run = Run(tmp_path, students=1)
    run.play(end=2)
    asked = [(entry[0], entry[1]) for entry in run.log]
    step_0 = [("scorer", "off_policy"), ("student", "step_0"), ("scorer", "on_policy")]
    step_1 = [("scorer", "off_policy"), ("student", "step_1"), ("scorer", "on_policy")]
    assert asked == [
        ("teacher", "step_0"),
        *step_0,
        ("teacher", "step_1"),
        ("learner", 0),
        ("publish", 1),
        *step_1,
        ("teacher", "step_2"),
        ("learner", 1),
        ("publish", 2),
    ]


def test_the_teacher_is_not_asked_for_a_step_after_the_last(tmp_path):
    run = Run(tmp_path)
    run.play()
    labels = [entry[1] for entry in run.log if entry[0] == "teacher"]
    assert labels == [f"step_{step}" for step in range(STEPS)]


def test_each_step_learns_from_text_of_its_own_weights_and_of_its_own_teacher_prompts(tmp_path):
    run = Run(tmp_path, "rollout.sampling.max_on_policy_tokens=3")
    run.play()
    for step in range(STEPS):
        written = run.of_stream("on_policy", step)
        assert [t.oldest_version for t in written] == [step] * 4
        answered = run.of_stream("off_policy", step)
        assert len(answered) == 3
        ids = [t.trajectory_id for t in (*written, *answered)]
        assert all(each.startswith(f"step_{step}/") for each in ids)
    writers = [*run.students.objects.values(), *run.teachers.objects.values()]
    sampling = run.config.rollout.sampling
    for writer in writers:
        assert writer.seed == run.config.seed == 5
        assert writer.sampling.temperature == sampling.temperature
        assert writer.sampling.top_p == sampling.top_p
        whole = writer.author is Author.TEACHER
        longest = sampling.max_response_tokens if whole else 3
        assert writer.sampling.max_response_tokens == longest


def test_prompts_come_in_epochs_without_a_gap_between_steps(tmp_path):
    run = Run(tmp_path)
    run.play()
    for stream, count in (("on_policy", 4), ("off_policy", 3)):
        fed = [t.prompt_id for step in range(STEPS) for t in run.of_stream(stream, step)]
        assert len(fed) == count * STEPS
        assert set(fed) == {f"p{index}" for index in range(11)}
        times = [fed.count(prompt_id) for prompt_id in set(fed)]
        assert max(times) - min(times) <= 1


def test_plain_text_joins_every_step_and_changes_nothing_else(tmp_path):
    """Of five texts two a step; at weight 0 a run is the run without the key, states included."""
    without, with_text, weightless = (
        Run(tmp_path, *overrides, ranks=2)
        for overrides in ((), TEXT, (*TEXT, "distill.language_model.weight=0"))
    )
    states = without.play()
    assert weightless.play() == states
    assert _content(weightless.learned) == _content(without.learned)
    assert with_text.streams.state().keys() - states[0].keys() == {"plain_text"}
    with_text.play()
    fed = [[t.prompt_id for t in with_text.of_stream("plain_text", step)] for step in range(STEPS)]
    assert [len(each) for each in fed] == [2] * STEPS
    flat = [name for each in fed for name in each]
    assert sorted(flat[:10]) == sorted(2 * [f"text:{index}" for index in range(5)])
    others = {
        step: [(s, t) for s, t in rows if s != "plain_text"]
        for step, rows in with_text.learned.items()
    }
    assert _content(others) == _content(without.learned)


def test_paired_streams_answer_the_same_prompts_and_rows_bring_both_halves(tmp_path):
    paired, rows = Run(tmp_path, *PAIRED), Run(tmp_path, *PAIRS)
    paired.play()
    rows.play()
    asked = set()
    for step in range(STEPS):
        streams = [paired.of_stream(name, step) for name in ("on_policy", "off_policy")]
        own, others = (Counter(t.prompt_id for t in stream) for stream in streams)
        assert own == others
        asked |= own.keys()
        halves = rows.of_stream("off_policy", step)
        assert len(halves) == 8, "of both prompts_per_step together"
        names = Counter(t.prompt_id for t in halves)
        assert all(count % 2 == 0 for count in names.values())
        assert len({t.trajectory_id for t in halves}) == 2 * len(names)
    assert len(asked) == 11


def test_the_mixture_gives_rows_samples_and_answers_in_its_own_order(tmp_path):
    run = Run(tmp_path, MIXTURE)
    mixture = OffPolicyMixture(run.config, run.data)
    run.streams.begin(0)
    for step in range(STEPS):
        run.step(step)
        expected = [mixture.look_up(index) for index in mixture.frontier.take(3)]
        fed = run.streams.pop_prompts()["off_policy"]
        assert fed == [item.prompt_id for item in expected]
        learned = {t.prompt_id: t for t in run.of_stream("off_policy", step)}
        for item in expected:
            answered = learned[item.prompt_id]
            if isinstance(item, Trajectory):
                assert answered.trajectory_id == item.trajectory_id
            else:
                assert answered.trajectory_id == f"step_{step}/teacher/{item.prompt_id}"


@pytest.mark.parametrize("source", ["store", "dataset"])
def test_without_prompts_of_its_own_the_teacher_is_never_asked_to_write(tmp_path, source):
    run = Run(tmp_path, f"distill.off_policy_source={source}")
    run.play()
    assert not [entry for entry in run.log if entry[0] == "teacher"]
    fed = [t.prompt_id for step in range(STEPS) for t in run.of_stream("off_policy", step)]
    assert len(fed) == 3 * STEPS
    assert all(each.startswith(f"{source}:") for each in fed)


@pytest.mark.parametrize(
    "overrides",
    [
        *((), (MIXTURE,), REPLAY, ("distill.objective.on_policy_weight=1.0",), FEW_PROMPTS),
        *((POLICY,), (POLICY, MIXTURE), (POLICY, *REPLAY), (*TEXT, *REPLAY), PAIRS, PAIRED),
    ],
    ids=[
        *("teacher", "mixture", "replay", "on_policy_alone", "few_prompts"),
        *("sources", "sources_in_a_mixture", "sources_and_replay", "plain_text"),
        *("pairs", "paired_streams"),
    ],
)
def test_a_run_resumed_after_any_step_goes_on_to_the_bit(tmp_path, overrides):
    unbroken = Run(tmp_path, *overrides)
    states = unbroken.play()
    expected = _content(unbroken.learned)
    assert len(expected) == STEPS
    for done in range(STEPS):
        resumed = Run(tmp_path, *overrides)
        resumed.streams.restore(states[done])
        assert json.loads(json.dumps(resumed.streams.state())) == states[done]
        later = resumed.play(first=done)
        assert _content(resumed.learned) == {step: expected[step] for step in range(done, STEPS)}
        assert later == {step: states[step] for step in range(done, STEPS + 1)}


def test_pools_that_nobody_reads_may_be_empty(tmp_path):
    """Rows, and an objective that asks the teacher for nothing; whoever waits for workers fails."""
    objective = "{type: token_matching, off_policy: {type: cross_entropy}}"
    sft = (f"distill.objective={objective}", "distill.off_policy_source=dataset")

    def nobody_comes(pool):
        raise AssertionError(f"{pool} has no worker, and none is expected")

    runs = [
        Run(tmp_path / str(count), *sft, teachers=count, scorers=count, supervised=True)
        for count in (1, 0)
    ]
    for run in runs:
        run.supervise(SimpleNamespace(wait_for_worker=nobody_comes, notice=lambda: None))
        run.play()
    whole, lean = runs
    assert lean.learned_texts() == whole.learned_texts()
    assert len(lean.learned) == STEPS
    activity = lean.streams.pop_activity()
    assert activity.keys() == {"student_rollout", "learner"}


def test_the_weights_of_sources_hold_from_the_step_after_the_one_asked_for_ahead(tmp_path):
    run = Run(tmp_path, POLICY)
    run.play(end=6)
    weights, shares = [0.5, 0.5], {}
    for step in range(6):
        if step in (3, 5):  # measured after steps 2 and 4, when the prompts of those were out
            pulled = [w * math.exp(rho) for w, rho in zip(weights, (1.0, step), strict=True)]
            weights = [0.5 * each / sum(pulled) + 0.25 for each in pulled]
        shares[step] = weights[1]
    for stream, count in (("on_policy", 4), ("off_policy", 3)):
        for steps in ((0, 1, 2), (3, 4), (5,)):
            fed = [t.prompt_id for step in steps for t in run.of_stream(stream, step)]
            from_b = sum(int(prompt_id[1:]) >= 4 for prompt_id in fed)
            assert abs(from_b - shares[steps[0]] * len(fed)) <= 1
            assert len(fed) == count * len(steps)


def test_a_step_of_more_sequences_than_there_are_prompts_learns_from_different_samples(tmp_path):
    run = Run(tmp_path, *FEW_PROMPTS)
    run.play()
    for step in range(STEPS):
        for stream, author, count in (("on_policy", "student", 25), ("off_policy", "teacher", 22)):
            written = run.of_stream(stream, step)
            assert len({t.trajectory_id for t in written}) == count
            assert {t.prompt_id for t in written} == {f"p{index}" for index in range(11)}
            # The first sample of a prompt has the name and the seed that it has alone.
            alone = {f"step_{step}/{author}/p{index}" for index in range(11)}
            assert alone < {t.trajectory_id for t in written}
            texts = Counter((t.prompt_id, *t.response_ids.tolist()) for t in written)
            assert max(texts.values()) == 1


@pytest.mark.parametrize("overrides", [(MIXTURE,), REPLAY], ids=["mixture", "replay"])
def test_streams_that_have_gone_on_can_be_taken_back_to_an_earlier_step(tmp_path, overrides):
    run = Run(tmp_path, *overrides)
    states = run.play(end=5)
    expected = _content(run.learned)
    run.learned.clear()
    run.streams.restore(states[2])
    run.play(first=2, end=5)
    assert _content(run.learned) == {step: expected[step] for step in range(2, 5)}


def test_replay_learns_from_one_stream_a_step_and_counts_only_what_was_sampled(tmp_path):
    run = Run(tmp_path, *REPLAY, f"distill.steps={4 * STEPS}")
    run.streams.begin(0)
    kinds, kept, sizes = [], [], set()
    for step in range(4 * STEPS):
        run.step(step)
        fed, counts = run.streams.pop_prompts(), run.streams.pop_counts()
        own = run.of_stream("on_policy", step)
        assert bool(own) != bool(run.of_stream("off_policy", step))
        assert sorted(fed["on_policy"]) == sorted(t.prompt_id for t in own)
        asked = any(entry[:2] == ("student", f"step_{step}") for entry in run.log)
        tokens = sum(t.num_response_tokens for t in own) if asked else 0
        assert counts["sampled_tokens/student"] == tokens
        assert counts["sampled_tokens/teacher"] == 0
        if own and not asked:
            assert {t.trajectory_id for t in own} <= {t.trajectory_id for t in kept}
        in_order = sorted(own, key=lambda t: fed["on_policy"].index(t.prompt_id))
        kept = [*kept, *in_order][-6:] if asked else kept
        kinds.append("write" if asked else "again" if own else "rows")
        sizes.add((kinds[-1], len(own) or len(run.of_stream("off_policy", step))))
    assert {"write", "again", "rows"} == set(kinds)
    # A step has the sequences of both streams; the buffer holds six and no more.
    assert sizes == {("write", 7), ("again", 6), ("rows", 7)}
    assert not [entry for entry in run.log if entry[0] == "teacher"]


def test_only_the_held_out_loss_moves_the_replays_schedule(tmp_path):
    run = Run(tmp_path, *REPLAY)
    run.streams.begin(0)
    share = run.streams.state()["replay"]["share"]
    for loss in (1.0, 2.0, 3.0):
        run.streams.on_metrics({"held_out/on_policy_distance": loss})
    assert run.streams.state()["replay"]["share"] == share
    for loss in (1.0, 2.0):
        run.streams.on_metrics({"held_out/cross_entropy": loss})
    assert run.streams.state()["replay"]["share"] == pytest.approx(share + 0.1)


def test_what_was_fed_and_sampled_is_told_once(tmp_path):
    run = Run(tmp_path, MIXTURE)
    run.take_steps(2)
    fed, counts = run.streams.pop_prompts(), run.streams.pop_counts()
    for stream in ("on_policy", "off_policy"):
        for step in (0, 1):
            learned = sorted(t.prompt_id for t in run.of_stream(stream, step))
            part = fed[stream][:4] if stream == "on_policy" else fed[stream][:3]
            assert sorted(part) == learned
            del fed[stream][: len(part)]
        assert fed[stream] == []
    learned = [t for step in (0, 1) for _, t in run.learned[step]]
    for author in ("student", "teacher"):
        tokens = sum(t.num_response_tokens for t in learned if t.author == author)
        assert tokens > 0
        assert counts[f"sampled_tokens/{author}"] == tokens
    assert run.streams.pop_prompts() == {}
    assert run.streams.pop_counts() == {"sampled_tokens/student": 0, "sampled_tokens/teacher": 0}


def test_the_scorers_are_asked_for_what_each_stream_needs_in_as_many_shares_as_ranks(tmp_path):
    run = Run(
        tmp_path,
        "distill.objective={type: token_matching, off_policy: {type: top_k, k: 3}, "
        "on_policy: {type: reverse_kl}}",
        ranks=2,
    )
    run.play(end=1)
    needs = run.scorers.objects[0].needs
    assert {str(stream): (need.features, need.top_k) for stream, need in needs.items()} == {
        "off_policy": (False, 3),
        "on_policy": (True, 0),
    }
    assert [entry for entry in run.log if entry[0] == "scorer"] == (
        [("scorer", "off_policy")] * 2 + [("scorer", "on_policy")] * 2
    )


def test_every_pools_time_is_busy_or_starved_and_its_tokens_are_told_once(tmp_path):
    run = Run(tmp_path, ranks=2, seconds=0.01, workers=WaitedForWorkers)
    began = run.clock.now
    run.take_steps(3)
    played = run.clock.now - began
    activity = run.streams.pop_activity()
    counts = {pool: done.num_workers for pool, done in activity.items()}
    # The learner's ranks work side by side, as one.
    one_each = dict.fromkeys(("teacher_rollout", "teacher_scoring", "learner"), 1)
    assert counts == {"student_rollout": 2, **one_each}
    for pool, done in activity.items():
        assert done.seconds == pytest.approx(played), pool
        assert (done.blocked_seconds, done.queued) == (0, 0)
        assert done.busy_seconds + done.starved_seconds == pytest.approx(done.worker_seconds)
    # Two students and the teacher wrote in each step.
    assert activity["student_rollout"].busy_seconds >= 6 * 0.01 - 1e-9
    assert activity["teacher_rollout"].busy_seconds >= 3 * 0.01 - 1e-9
    assert activity["student_rollout"].starved_seconds > 0
    learned = [t for fed in run.learned.values() for _, t in fed]
    response = {
        author: sum(t.num_response_tokens for t in learned if t.author == author)
        for author in ("student", "teacher")
    }
    everything = sum(t.token_ids.size for t in learned)
    handed_on = {pool: (done.num_tokens, done.num_sequences) for pool, done in activity.items()}
    assert handed_on == {
        "student_rollout": (response["student"], 3 * 4),
        "teacher_rollout": (response["teacher"], 3 * 3),
        "teacher_scoring": (everything, 3 * 7),
        "learner": (sum(response.values()), 3 * 7),
    }
    idle = run.streams.pop_activity()
    assert {pool: done.num_tokens for pool, done in idle.items()} == dict.fromkeys(activity, 0)
    assert idle["student_rollout"].busy_seconds == 0.0


def test_a_worker_that_is_done_waits_while_others_work(tmp_path):
    """The teacher's call ends before the learner's step does, and is not needed until after it."""
    run = Run(tmp_path, seconds=0.01, step_seconds=0.1, workers=WaitedForWorkers)
    run.take_steps(2)
    activity = run.streams.pop_activity()
    assert activity["learner"].busy_seconds >= 2 * 0.1 - 1e-9
    assert activity["teacher_rollout"].starved_seconds >= 2 * 0.1 - 1e-9
    assert activity["student_rollout"].starved_seconds >= 2 * 2 * 0.1 - 1e-9
    assert activity["teacher_scoring"].starved_seconds >= 2 * 0.1 - 1e-9


def test_measurements_leave_no_trace_in_what_the_pools_did(tmp_path):
    run = Run(tmp_path, seconds=0.01)
    run.streams.begin(0)
    run.step(0, measured={})
    assert run.streams.pop_activity()["student_rollout"].num_tokens > 0
    run.step(1, measured={"held_out/on_policy_distance": 1.0})
    after = run.streams.pop_activity()
    assert {done.num_tokens for done in after.values()} == {0}


def test_what_the_driver_waited_for_is_told_by_pool(tmp_path):
    run = Run(tmp_path, seconds=0.01)
    run.take_steps(1)
    waited = run.context.timings.pop_step()
    assert waited.keys() == {*run.groups, "learner", "publish"}
    assert waited["student_rollout"] >= 2 * 0.01 - 1e-9


def test_workers_leave_and_join_between_take_and_learn_without_a_trace_in_the_text(tmp_path):
    same = Run(tmp_path)
    same.play()
    run, counts = Run(tmp_path), []
    run.streams.begin(0)
    for step in range(STEPS):
        scored = run.streams.take(step)
        if step == 2:
            for _ in range(2):  # it may be asked for again
                assert run.streams.release_worker("student_rollout", 0)
            run.students.remove(0)
        if step == 4:
            worker_id = run.students.take_id()
            joined = Writer(Author.STUDENT, run.log)
            run.students.add(StartedWorker(worker_id, joined, None))
            run.streams.admit_workers()
        run.streams.learn(step, scored)
        run.streams.publish(step + 1)
        counts.append(run.streams.pop_activity()["student_rollout"].num_workers)
    assert _content(run.learned) == _content(same.learned)
    assert joined.sampling is not None, "who joined was asked to write"
    assert [counts[step] for step in (0, 1, 3, 5, 6)] == [2, 2, 1, 2, 2]


class _Supervisor:
    """Replaces at once whoever is lost in a run's pools."""

    def __init__(self, run):
        self.run, self.lost = run, []

    def lose(self, lost):
        group = self.run.groups[lost.pool]
        if lost.worker_id in group.members:
            self.lost.append(lost.worker)
            self.run.streams.forget_worker(lost.pool, lost.worker_id)
            successor = group.objects[lost.worker_id]  # that holds the same weights
            place = group.vacate(lost.worker_id)
            group.add(StartedWorker(group.take_id(), successor, place))
            self.run.streams.admit_workers()

    def notice(self):
        """Nobody dies unheard here."""

    def wait_for_worker(self, pool):
        raise AssertionError("there is one")


def test_lost_workers_change_nothing_that_a_step_learns_from(tmp_path):
    """One call in five, of any pool, costs the worker that was to answer it."""
    unbroken = Run(tmp_path / "unbroken", students=3)
    unbroken.play()
    broken = Run(tmp_path / "broken", students=3, supervised=True)
    supervisor = _Supervisor(broken)
    broken.supervise(supervisor)
    draw = random.Random(1)

    def die(pool, worker):
        if draw.random() < 1 / 5:
            raise WorkerLostError(f"{pool}-{worker} died", f"{pool}-{worker}")

    for pool, group in broken.groups.items():
        group.before_each_call, group.may_fetch_again = partial(die, pool), True
    broken.play()
    assert len(supervisor.lost) > 5
    assert len({name.rpartition("-")[0] for name in supervisor.lost}) == 3
    assert broken.learned_texts() == unbroken.learned_texts()

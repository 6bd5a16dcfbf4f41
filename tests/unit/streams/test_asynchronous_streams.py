"""The streaming pipeline under a simulated clock: any delays, and what must hold all the same."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulated_pools import (
    Clock,
    SimulatedLearner,
    SimulatedScorer,
    SimulatedWorkers,
    SimulatedWriter,
    make_prompts,
    make_rows,
    simulated_run,
)

from distill_system.config import load_config
from distill_system.data import PromptFrontier
from distill_system.observe import RunDirectory
from distill_system.records import Author, Stream
from distill_system.streams.asynchronous import AsynchronousStreams
from distill_system.streams.in_flight import State

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
STEPS = 7
REISSUED = {"max_staleness": 2, "too_old": "reissue"}


def open_streams(
    folder, clock, overrides, *, students, learner, teachers=None, scorers=None, data=None
):
    """Streams over simulated pools; a teacher and a scorer that hold nobody up by default."""
    quick = SimulatedWriter(Author.TEACHER, 1e3, lambda: 5)
    context, pools, data = simulated_run(
        load_config([QUICKSTART], overrides),
        data or SimpleNamespace(prompts=make_prompts(99), student_sft=[], stored=[]),
        students=students,
        teachers=teachers or SimulatedWorkers(clock, [quick]),
        scorers=scorers or SimulatedWorkers(clock, [SimulatedScorer(1e6)]),
        learner=learner,
        timings_folder=RunDirectory(folder),
    )
    return AsynchronousStreams(context, pools, data, clock=clock)


def drawn_writers(clock, draw, author, count, *, lengths):
    def writer():
        return SimulatedWriter(author, draw.uniform(5, 200), lambda: draw.choice(lengths))

    return SimulatedWorkers(clock, [writer() for _ in range(count)])


def steady_learner(clock, students, *, step=1.0, publish=0.0):
    """One whose steps and publishes always take the same seconds."""
    return SimulatedLearner(
        clock, students, draw_step_seconds=lambda: step, draw_publish_seconds=lambda: publish
    )


def take_steps(streams, end):
    streams.begin(0)
    for step in range(end):
        streams.learn(step, streams.take(step))
        streams.publish(step + 1)


def of_two_sources(count):
    """Prompts, the first four of source a and the others of b."""
    return [
        replace(prompt, source=f"prompts.{'ab'[index >= 4]}")
        for index, prompt in enumerate(make_prompts(count))
    ]


def play(
    folder,
    *overrides,
    seed,
    workers=(2, 1, 1),
    batch=4,
    steps=STEPS,
    num_prompts=11,
    rows=(),
    has_sources=False,
    begin=0,
    stop=None,
    state=None,
    **staleness,
):
    """A whole run, or a part of one, with delays drawn from a seed.

    staleness: keys of distill.staleness.  has_sources: prompts are those of a and b.
    begin, state: where it goes on.  stop: after so many steps; the result has its state there.
    """
    draw = random.Random(seed)
    keys = [
        f"distill.steps={steps}",
        f"distill.student_prompts_per_step={batch}",
        f"distill.teacher_prompts_per_step={batch}",
        *(f"distill.staleness.{key}={value}" for key, value in staleness.items()),
        *overrides,
    ]
    clock = Clock()
    students, teachers = (
        drawn_writers(clock, draw, author, count, lengths=[1, 1, 2, 3, 5, 30, 80])
        for author, count in zip((Author.STUDENT, Author.TEACHER), workers[:2], strict=True)
    )
    scorers = SimulatedWorkers(
        clock,
        [SimulatedScorer(draw.uniform(50, 5000), 0.01) for _ in range(workers[2])],
        many_calls=seed % 2,
    )
    slow = draw.choice([0.01, 0.3, 2.0])
    learner = SimulatedLearner(
        clock,
        students,
        draw_step_seconds=lambda: draw.uniform(0.0, slow),
        draw_publish_seconds=lambda: draw.choice([0.0, 0.01, 0.5]),
    )
    data = SimpleNamespace(
        prompts=of_two_sources(num_prompts) if has_sources else make_prompts(num_prompts),
        student_sft=rows,
        stored=[],
        plain_text=make_rows("text", 5),
        source_held_out={"a": (), "b": ()},
    )
    streams = open_streams(
        folder,
        clock,
        keys,
        students=students,
        learner=learner,
        teachers=teachers,
        scorers=scorers,
        data=data,
    )
    learner.version = learner.first = begin
    for writer in students.objects.values():
        writer.version = begin
    if state is not None:
        streams.restore(state)

    def follow_sources(done):
        if streams.measures_sources(done):
            streams.follow_sources(done, {"a": 1.0, "b": 1.0 + done})

    if begin == 0:
        follow_sources(0)
    streams.begin(begin)
    most_under_way, chunk_sizes = 0, []
    for step in range(begin, steps if stop is None else stop):
        scored = streams.take(step)
        chunk_sizes.append(
            [len(p.chunk.trajectories) for p in scored if p.chunk.stream == "on_policy"]
        )
        for buffer in [flow.buffer for flow in streams._flows.values()]:
            require_one_place_each(buffer)
            most_under_way = max(most_under_way, buffer.num_in_flight)
        streams.learn(step, scored)
        streams.publish(step + 1)
        follow_sources(step + 1)
    return SimpleNamespace(
        learner=learner,
        streams=streams,
        written=[[t for s, t in batch if s == "on_policy"] for batch in learner.trained],
        fed=[Counter((s, t.prompt_id) for s, t in batch) for batch in learner.trained],
        most_under_way=most_under_way,
        chunk_sizes=chunk_sizes,
        state=json.loads(json.dumps(streams.state())),
    )


def require_one_place_each(buffer):
    """Every entry stands once in each view of the buffer, and the counts say the same."""
    placed = [
        (step, state, entry)
        for (step, state), entries in buffer._by_state.items()
        for entry in entries.values()
    ]
    assert len({entry.number for _, _, entry in placed}) == len(placed)
    assert all(state is entry.state for _, state, entry in placed)
    in_flight = [entry for _, state, entry in placed if state is not State.DROPPED]
    assert len(in_flight) == buffer.num_in_flight
    assert sorted(buffer.prompts()) == sorted(entry.prompt for _, _, entry in placed)
    writing = {entry.name: entry.worker for _, state, entry in placed if state is State.WRITING}
    of_workers = {name: worker for worker, held in buffer._by_worker.items() for name in held}
    assert writing == of_workers


def ages(played):
    return [step - t.oldest_version for step, batch in enumerate(played.written) for t in batch]


anything = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
seeds = st.integers(0, 10**6)
bounds = st.sampled_from([1, 2, 4])


@anything
@given(seed=seeds, bound=bounds, num_workers=st.integers(1, 5))
def test_in_order_nothing_is_too_old_and_every_step_has_its_own_prompts(
    tmp_path, seed, bound, num_workers
):
    played = play(tmp_path, seed=seed, max_staleness=bound, workers=(num_workers, 1, 2))
    assert all(0 <= age <= bound for age in ages(played))
    assert played.most_under_way <= (bound + 1) * 4
    # The same prompts in the same steps whatever the delays: as a walk over the prompts says.
    assert played.fed == play(tmp_path, seed=0, max_staleness=1, workers=(1, 1, 1)).fed


@anything
@given(seed=seeds, bound=bounds)
def test_weights_of_sources_that_move_give_every_step_the_same_prompts_whatever_the_delays(
    tmp_path, seed, bound
):
    rows = "{type: embedded, split: distractor, num_examples: 1}"
    source = f"{{source: {rows}, held_out: {rows}}}"
    prompts = f"{{type: mixture, sources: {{a: {source}, b: {source}}}, policy: {{every: 2}}}}"
    how = {"max_staleness": bound, "has_sources": True, "steps": 12, "batch": 8}
    fed = [
        play(tmp_path, f"data.prompts={prompts}", seed=delays, **how).fed for delays in (seed, 0)
    ]
    assert fed[0] == fed[1]
    shares = [
        sum(count for (_, prompt), count in step.items() if int(prompt[1:]) >= 4) / step.total()
        for step in fed[0]
    ]
    moved = 2 + bound + 1  # what is measured after two steps holds from here on
    assert shares[:moved] == [0.5] * moved
    assert min(shares[moved:]) > 0.5


@anything
@given(seed=seeds, bound=bounds, num_workers=st.integers(1, 5))
def test_reissuing_keeps_the_bound_and_loses_no_prompt(tmp_path, seed, bound, num_workers):
    how = {"max_staleness": bound, "too_old": "reissue"}
    played = play(tmp_path, seed=seed, workers=(num_workers, 1, 2), **how)
    assert all(0 <= age <= bound for age in ages(played))
    assert played.most_under_way <= (bound + 1) * 4
    trained = Counter(t.prompt_id for batch in played.written for t in batch)
    left = Counter(f"p{index}" for index in played.streams._flows["on_policy"].buffer.prompts())
    taken = sum(w.num_taken for w in played.streams.student._walks.values())
    assert sum((trained + left).values()) == taken == STEPS * 4 + sum(left.values())


@anything
@given(seed=seeds, bound=bounds)
def test_weighing_trains_on_every_prompt_once_an_epoch(tmp_path, seed, bound):
    how = {"max_staleness": bound, "too_old": "weigh", "importance": "token"}
    played = play(tmp_path, seed=seed, workers=(3, 1, 1), **how)
    assert min(ages(played)) >= 0
    assert [len(batch) for batch in played.written] == [4] * STEPS


@anything
@given(seed=seeds, share=st.sampled_from([0.25, 0.5, 0.75]))
def test_a_step_may_go_on_without_the_late_ones(tmp_path, seed, share):
    played = play(tmp_path, seed=seed, min_on_policy_share=share, **REISSUED)
    assert all(0 <= age <= 2 for age in ages(played))
    for batch in played.learner.trained:
        written = Counter(s for s, _ in batch)
        assert share * 4 <= written["on_policy"] <= 4
        assert 4 <= written["off_policy"] <= 8 - written["on_policy"], "no more than what lacks"


def test_off_policy_text_stands_in_for_what_an_on_policy_batch_lacks(tmp_path):
    """At a seed at which batches are short, and others whole."""
    how = {"min_on_policy_share": 0.25, "steps": 30, "num_prompts": 200}
    played = play(tmp_path, seed=1, **how, **REISSUED)
    batches = [Counter(s for s, _ in batch) for batch in played.learner.trained]
    assert {batch["on_policy"] for batch in batches} >= {1, 4}
    short = [batch for batch in batches if batch["on_policy"] < 4]
    assert max(batch["off_policy"] for batch in short) > 4
    assert all(batch["off_policy"] == 4 for batch in batches if batch["on_policy"] == 4)


@anything
@given(seed=seeds, budget=st.sampled_from([40, 200, 1000]))
def test_a_budget_of_tokens_is_filled_with_what_is_ready(tmp_path, seed, budget):
    how = {"tokens_per_step": budget, "workers": (4, 1, 2), "num_prompts": 300}
    played = play(tmp_path, seed=seed, **how, **REISSUED)
    assert all(0 <= age <= 2 for age in ages(played))
    assert played.most_under_way <= 3 * 4
    for batch, students in zip(played.learner.trained, played.written, strict=True):
        tokens = sum(t.num_response_tokens for _, t in batch)
        assert len(students) >= 4
        assert tokens <= budget or len(students) == 4
    trained = [t.prompt_id for batch in played.written for t in batch]
    assert len(trained) == len(set(trained))


def test_long_sequences_are_learned_from_in_their_turn(tmp_path):
    """In order no length is preferred: what a step learns from has the lengths that were drawn."""
    played = play(tmp_path, seed=3, max_staleness=2, steps=40, num_prompts=97)
    lengths = [[t.num_response_tokens for t in batch] for batch in played.written]
    long_share = sum(length >= 30 for batch in lengths for length in batch) / (40 * 4)
    early = sum(length >= 30 for batch in lengths[:10] for length in batch) / 40
    assert long_share == pytest.approx(2 / 7, abs=0.1)
    assert early == pytest.approx(2 / 7, abs=0.2)


def test_rows_of_data_may_be_under_way_twice(tmp_path):
    """Three rows, four a step, three batches ahead: each step takes rows in their walk's order."""
    rows = {"rows": make_rows("row", 3), "max_staleness": 2}
    played = play(tmp_path, "distill.off_policy_source=dataset", seed=2, **rows)
    walk = PromptFrontier(3, 0, "dataset_rows")
    for batch in played.learner.trained:
        fed = sorted(t.prompt_id for s, t in batch if s == "off_policy")
        assert fed == sorted(f"row:{index}" for index in walk.take(4))


def test_rows_need_neither_engines_nor_scorers(tmp_path):
    """With and without idle pools, steps learn from the same rows in the same order."""
    overrides = [
        "distill.objective={type: token_matching, off_policy: {type: cross_entropy}}",
        "distill.off_policy_source=dataset",
    ]
    how = {"seed": 1, "max_staleness": 2, "rows": make_rows("row", 9)}
    whole, lean = (
        play(tmp_path, *overrides, **how, workers=workers) for workers in ((2, 1, 1), (2, 0, 0))
    )
    assert len(lean.learner.trained) == STEPS
    names = [[t.trajectory_id for _, t in step] for step in lean.learner.trained]
    assert names == [[t.trajectory_id for _, t in step] for step in whole.learner.trained]
    assert lean.state == whole.state
    assert lean.streams.pop_activity().keys() == {"student_rollout", "learner"}


def test_what_is_dropped_is_given_out_again_and_learned_from(tmp_path):
    """A seed at which some come too late: each is dropped once, and its prompt trained on later."""
    how = {"max_staleness": 1, "too_old": "reissue", "steps": 40, "num_prompts": 200}
    played = play(tmp_path, seed=3, workers=(3, 1, 1), **how)
    assert played.streams._flows["on_policy"].buffer.num_dropped > 3
    trained = [t.prompt_id for batch in played.written for t in batch]
    assert len(trained) == len(set(trained)) == 160


def test_running_ahead_hides_the_writing_behind_the_learning(tmp_path):
    """Writing and learning take one second a step each: in turn two, ahead of each other one."""
    seconds = {}
    for bound in (1, 2):
        clock = Clock()
        writers = [SimulatedWriter(Author.STUDENT, 10.0, lambda: 10)]
        students = SimulatedWorkers(clock, writers)
        learner = steady_learner(clock, students)
        overrides = ["distill.steps=20", f"distill.staleness.max_staleness={bound}"]
        streams = open_streams(tmp_path, clock, overrides, students=students, learner=learner)
        take_steps(streams, 20)
        seconds[bound] = clock.now
    assert seconds[2] == pytest.approx(20 * 1.0 + 1.0, rel=0.1)
    assert seconds[1] <= 20 * 1.25


@anything
@given(seed=seeds, bound=bounds, leaves=st.integers(0, STEPS - 1), joins=st.integers(0, STEPS - 1))
def test_workers_come_and_go_and_every_step_keeps_its_prompts(tmp_path, seed, bound, leaves, joins):
    """One writer of each model and one scorer leave, others join, at any steps."""
    draw = random.Random(seed)
    clock = Clock()
    students, teachers = (
        drawn_writers(clock, draw, author, 3, lengths=[1, 2, 5, 40])
        for author in (Author.STUDENT, Author.TEACHER)
    )
    scorers = SimulatedWorkers(clock, [SimulatedScorer(draw.uniform(50, 5000)) for _ in range(3)])
    learner = SimulatedLearner(
        clock,
        students,
        draw_step_seconds=lambda: draw.uniform(0, 0.5),
        draw_publish_seconds=lambda: draw.choice([0.0, 0.2]),
    )
    overrides = [
        f"distill.steps={STEPS}",
        "distill.student_prompts_per_step=4",
        "distill.teacher_prompts_per_step=4",
        f"distill.staleness.max_staleness={bound}",
    ]
    groups = {"student_rollout": students, "teacher_rollout": teachers, "teacher_scoring": scorers}
    absent = {name: group.objects.pop(2) for name, group in groups.items()}
    streams = open_streams(
        tmp_path,
        clock,
        overrides,
        students=students,
        learner=learner,
        teachers=teachers,
        scorers=scorers,
        data=SimpleNamespace(prompts=make_prompts(100), student_sft=[], stored=[]),
    )
    streams.begin(0)
    for step in range(STEPS):
        scored = streams.take(step)
        if step == leaves:
            for name, group in groups.items():
                while not streams.release_worker(name, 0):
                    streams._turn()
                streams.wait_for_weight_sync()
                group.objects.pop(0)
        streams.wait_for_weight_sync()
        if step == joins:
            for name, group in groups.items():
                group.objects[2] = absent[name]
            streams.admit_workers()
        streams.learn(step, scored)
        streams.publish(step + 1)
    walk = PromptFrontier(100, 0, "student_prompts")
    for step, batch in enumerate(learner.trained):
        written = [t for s, t in batch if s == "on_policy"]
        assert all(0 <= step - t.oldest_version <= bound for t in written)
        trained = sorted(t.prompt_id for t in written)
        assert trained == sorted(f"p{index}" for index in walk.take(4))


def test_a_budget_of_tokens_lets_steps_take_more_than_their_own(tmp_path):
    how = {"tokens_per_step": 400, "steps": 30, "workers": (4, 1, 2), "num_prompts": 300}
    played = play(tmp_path, seed=1, **how, **REISSUED)
    counts = [len(batch) for batch in played.written]
    assert min(counts) == 4
    assert max(counts) > 4


@pytest.mark.parametrize(("weight", "read"), [(0.0, "off_policy"), (1.0, "on_policy")])
def test_a_stream_that_the_objective_does_not_read_is_not_written(tmp_path, weight, read):
    weighed = f"distill.objective.on_policy_weight={weight}"
    played = play(tmp_path, weighed, seed=4, max_staleness=1)
    assert {stream for batch in played.learner.trained for stream, _ in batch} == {read}
    assert played.streams.pop_prompts().keys() == {read}
    sampled = played.streams.pop_counts()
    silent = "teacher" if read == "on_policy" else "student"
    assert sampled[f"sampled_tokens/{silent}"] == 0


def test_every_learner_rank_has_a_chunk_of_the_smallest_batch(tmp_path):
    """Half of 8 sequences are enough for a step of two ranks: chunks of 2 at most."""
    how = {"min_on_policy_share": 0.5, "batch": 8, "num_prompts": 200}
    played = play(tmp_path, "pools.learner.count=2", seed=1, **how, **REISSUED)
    assert {size for sizes in played.chunk_sizes for size in sizes} <= {1, 2}
    assert max(size for sizes in played.chunk_sizes for size in sizes) == 2
    assert all(len(sizes) >= 2 for sizes in played.chunk_sizes)


@pytest.mark.parametrize(
    ("step_seconds", "publish_seconds", "reason"), [(10.0, 0.0, "blocked"), (0.0, 10.0, "starved")]
)
def test_idle_writers_wait_for_room_or_for_weights(tmp_path, step_seconds, publish_seconds, reason):
    """Quick writers before a slow learner have no room; before slow weights nothing to write by."""
    clock = Clock()
    students = SimulatedWorkers(clock, [SimulatedWriter(Author.STUDENT, 1e3, lambda: 5)])
    learner = steady_learner(clock, students, step=step_seconds, publish=publish_seconds)
    overrides = ["distill.steps=9", "distill.staleness.max_staleness=1"]
    streams = open_streams(tmp_path, clock, overrides, students=students, learner=learner)
    take_steps(streams, 5)
    activity = streams.pop_activity()
    assert getattr(activity["student_rollout"], f"{reason}_share") > 0.8
    assert activity["teacher_rollout"].blocked_share > 0.8, "the teacher needs no weights"


def test_queues_and_what_is_in_flight_are_told(tmp_path):
    """At the end of a run nothing is: every prompt that was given out was learned from."""
    played = play(tmp_path, seed=4, max_staleness=2)
    assert played.streams.pop_counts()["in_flight/sequences"] == 0
    activity = played.streams.pop_activity()
    assert {pool: each.queued for pool, each in activity.items()} == dict.fromkeys(activity, 0)
    assert activity["learner"].num_sequences == STEPS * 8
    assert activity["teacher_scoring"].num_sequences == STEPS * 8
    for pool in ("student_rollout", "teacher_rollout"):
        assert activity[pool].num_sequences == STEPS * 4
        tokens = activity[pool].num_tokens
        assert tokens == sum(
            t.num_response_tokens
            for batch in played.learner.trained
            for _, t in batch
            if t.author == pool.removesuffix("_rollout")
        )


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_a_resumed_run_trains_on_the_prompts_that_were_in_flight(tmp_path, stop):
    """In order: the same prompts in the same steps of all streams, as samples of their own."""
    texts = (
        "data.plain_text={type: embedded, split: train, num_examples: 5}",
        "distill.language_model.sequences_per_step=2",
    )
    how = {"max_staleness": 2, "num_prompts": 60}
    whole = play(tmp_path, *texts, seed=5, **how)
    first = play(tmp_path, *texts, seed=6, stop=stop, **how)
    second = play(tmp_path, *texts, seed=7, begin=stop, state=first.state, **how)
    assert whole.fed == first.fed + second.fed
    resumed = [*first.learner.trained, *second.learner.trained]
    assert all(sum(s == "plain_text" for s, _ in batch) == 2 for batch in resumed)
    names = [
        t.trajectory_id for batch in resumed for s, t in batch if s in ("on_policy", "off_policy")
    ]
    assert len(names) == len(set(names)), "labels go on where the first life stopped"


def _slow_student():
    return SimulatedWriter(Author.STUDENT, 1.0, lambda: 9, version=4)


@pytest.mark.parametrize("too_old", ["wait", "reissue"])
def test_samples_of_one_prompt_in_one_step_have_names_of_their_own(tmp_path, too_old):
    """Three prompts for eight places; a resumed run numbers its samples as an unbroken one."""
    how = {"seed": 3, "max_staleness": 2, "too_old": too_old, "num_prompts": 3, "batch": 8}
    first = play(tmp_path, **how, stop=3)
    second = play(tmp_path, **how, begin=3, state=first.state)
    for batch in [*first.learner.trained[:3], *second.learner.trained]:
        names = [t.trajectory_id for _, t in batch]
        assert len(set(names)) == len(names) == 16
        assert len({t.prompt_id for _, t in batch}) == 3


def test_what_is_handed_back_waits_for_a_writer_with_weights_that_are_new_enough(tmp_path):
    clock = Clock()
    students = SimulatedWorkers(clock, [_slow_student(), _slow_student()])
    learner = steady_learner(clock, students)
    overrides = ["distill.staleness.max_staleness=1"]
    streams = open_streams(tmp_path, clock, overrides, students=students, learner=learner)
    streams.begin(4)
    flow = streams._flows[Stream.ON_POLICY]
    for worker in (0, 1):
        flow.writers.hold(worker, 5)
    entry = list(flow.buffer._by_worker[0].values())[-1]
    entry.needs_version = 6
    streams.release_worker("student_rollout", 0)
    flow.give_out()
    assert flow.buffer.handed_back() == [entry], "the others are written again, under their names"
    flow.writers.hold(1, 6)
    flow.give_out()
    assert flow.buffer.find_writing(1, entry.name) is entry

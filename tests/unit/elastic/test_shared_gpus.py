"""Workers move between pools of the real streams, on a modelled clock, towards the best split."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from simulated_pools import (
    Clock,
    SimulatedLearner,
    SimulatedScorer,
    SimulatedWorkers,
    SimulatedWriter,
    make_prompts,
    simulated_run,
)

from distill_system.config import load_config
from distill_system.config.pools import PoolConfig, ScalingConfig
from distill_system.elastic.scaling import AutoScaler, ScalingObservation
from distill_system.observe import RunDirectory, Timings
from distill_system.records import Author
from distill_system.streams.asynchronous import AsynchronousStreams

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
POOLS = ("student_rollout", "teacher_rollout", "teacher_scoring")
TOTAL, STEPS = 8, 25


@dataclass
class Engine(SimulatedWriter):
    """Sequences share what it decodes in a second."""

    tokens_per_second: float = 0.0

    def advance(self, requests, seconds):
        at_once = len(self.under_way) + len(requests)
        self.rate = self.tokens_per_second / max(1, at_once)
        return super().advance(requests, seconds)


def play(folder, split):
    """Steps a second under this split, and what the pools did."""
    clock, lengths = Clock(), itertools.cycle([5, 9, 14, 20])

    def engines(author, count, speed):
        made = [
            Engine(author, 0.0, lambda: next(lengths), tokens_per_second=speed)
            for _ in range(count)
        ]
        return SimulatedWorkers(clock, made)

    students = engines(Author.STUDENT, split[0], 60.0)
    learner = SimulatedLearner(
        clock, students, draw_step_seconds=lambda: 0.05, draw_publish_seconds=lambda: 0.01
    )
    batch = ("distill.student_prompts_per_step=12", "distill.teacher_prompts_per_step=12")
    how = (f"distill.steps={STEPS}", "distill.staleness.max_staleness=2", *batch)
    context, pools, data = simulated_run(
        load_config([QUICKSTART], how),
        SimpleNamespace(prompts=make_prompts(99), student_sft=[], stored=[]),
        students=students,
        teachers=engines(Author.TEACHER, split[1], 150.0),
        scorers=SimulatedWorkers(clock, [SimulatedScorer(400.0, 0.01) for _ in range(split[2])]),
        learner=learner,
        timings_folder=RunDirectory(folder),
    )
    context.timings = Timings(RunDirectory(folder), clock=clock)
    streams = AsynchronousStreams(context, pools, data, clock=clock)
    streams.begin(0)
    for step in range(STEPS):
        streams.learn(step, streams.take(step))
        streams.publish(step + 1)
    waited, activity = context.timings.pop_step(), streams.pop_activity()
    learner_activity = activity.pop("learner")
    longest = max(activity.keys() & waited.keys(), key=waited.__getitem__, default=None)
    return STEPS / clock.now, activity, learner_activity.starved_share, longest


def test_from_the_worst_split_workers_move_to_where_the_modelled_run_is_fast(tmp_path):
    """Compared with every split, each played."""
    played = cache(lambda split: play(tmp_path, split))
    splits = [s for s in itertools.product(range(1, TOTAL), repeat=3) if sum(s) == TOTAL]
    speeds = {split: played(split)[0] for split in splits}
    best, worst = max(splits, key=speeds.__getitem__), min(splits, key=speeds.__getitem__)
    assert speeds[worst] < 0.5 * speeds[best], "or there would be nothing to find"
    pools = {
        name: PoolConfig(min_count=1, count=count, max_count=TOTAL, gpus=1.0)
        for name, count in zip(POOLS, worst, strict=True)
    }
    how = {"automatic": True, "total_gpus": TOTAL, "cool_down_seconds": 0.0}
    scaler = AutoScaler(ScalingConfig.model_validate(how), pools)
    split, history = worst, [worst]
    for look in range(60):
        _, activity, starved, longest = played(split)
        observation = ScalingObservation(
            at_seconds=float(look),
            pools=activity,
            learner_starved_share=starved,
            waited_for=longest,
        )
        present = dict(zip(POOLS, split, strict=True))
        split = tuple((present | scaler.decide(observation, present)).values())
        if split != history[-1]:
            history.append(split)
    assert speeds[split] >= 0.9 * speeds[best], (history, best, speeds)
    assert len(set(history)) == len(history), "no split comes twice"

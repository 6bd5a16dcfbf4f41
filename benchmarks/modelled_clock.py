"""Modelled pools under a simulated clock: the real streams, hours of them in seconds."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

from modelled_pools import ModelledLearner, ModelledRollout, ModelledScorer
from modelled_runs import POOLS, Measured, Setting, mean_ages

from distill_system.learner import LearnerGroup
from distill_system.observe import RunDirectory, Timings
from distill_system.records import Author
from distill_system.rollout import RolloutPool
from distill_system.scoring import ScoringPool
from distill_system.streams.asynchronous import AsynchronousStreams
from distill_system.streams.lockstep import LockstepStreams

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from fakes.direct_transfer import DirectTransfer
from simulated_pools import Clock, SimulatedWorkers

WORK = ("advance", "generate", "score_with_receipt", "step")


class ClockedWorkers(SimulatedWorkers):
    """The tests' workers; they add up their work, and a result may be made as its call ends."""

    def __init__(self, clock, objects):
        super().__init__(clock, objects)
        self.busy_seconds = 0.0

    def _run(self, worker):
        if self._busy[worker] or not self._queues[worker]:
            return
        call = self._queues[worker].popleft()
        arguments = [a.result if hasattr(a, "is_done") else a for a in call.arguments]
        result, seconds = getattr(self.objects[worker], call.method)(*arguments)
        self.busy_seconds += seconds if call.method in WORK else 0.0
        self._busy[worker] = True

        def end():
            call.result = result() if callable(result) else result
            call.is_done, self._busy[worker] = True, False
            if call.second is not None:
                call.result, call.second.result = call.result
                call.second.is_done = True
            self._run(worker)

        self.clock.at(self.clock.now + seconds, end)


def simulate(setting: Setting) -> Measured:
    """One run, from its first step to its last."""
    clock, config = Clock(), setting.config()
    groups = _pools(setting, clock)
    pools = SimpleNamespace(
        students=RolloutPool(groups["student_rollout"]),
        teachers=RolloutPool(groups["teacher_rollout"]),
        scorers=ScoringPool(groups["teacher_scoring"]),
        learner=LearnerGroup(groups["learner"]),
        evaluation=RolloutPool(groups["student_rollout"]),
        placed={name: SimpleNamespace(workers=groups[name]) for name in POOLS},
    )
    pools.weights = DirectTransfer(pools.learner, groups["student_rollout"])
    with TemporaryDirectory() as folder:
        context = SimpleNamespace(config=config, timings=Timings(RunDirectory(Path(folder))))
        if setting.max_staleness:
            streams = AsynchronousStreams(context, pools, setting.data(), clock=clock)
        else:
            streams = LockstepStreams(context, pools, setting.data())
        return _play(setting, clock, groups, streams)


def _play(setting, clock, groups, streams) -> Measured:
    marks, counts = {}, []
    streams.begin(0)
    for step in range(setting.last):
        if step in (setting.first, setting.last):
            marks[step] = _mark(clock, groups)
        streams.learn(step, streams.take(step))
        streams.publish(step + 1)
        said = streams.pop_counts()
        if step >= setting.first and "staleness/tokens" in said:
            counts.append(said)
    begin, end = marks[setting.first], _mark(clock, groups)
    seconds = end["now"] - begin["now"]
    return Measured(
        setting=setting,
        step_seconds=seconds / (setting.last - setting.first),
        busy={name: (end[name] - begin[name]) / seconds / groups[name].count for name in POOLS},
        ages=mean_ages(counts) if counts else {"0": 1.0},
    )


def _mark(clock, groups) -> dict[str, float]:
    return {"now": clock.now, **{name: groups[name].busy_seconds for name in POOLS}}


def _pools(setting: Setting, clock: Clock) -> dict[str, ClockedWorkers]:
    costs = setting.costs

    def rollouts(author, cost, count):
        how = {"max_num_sequences": setting.num_sequences, "send_seconds": costs.send}
        objects = [ModelledRollout(author, cost, setting.lengths, **how) for _ in range(count)]
        return ClockedWorkers(clock, objects)

    students = rollouts(Author.STUDENT, costs.student, setting.workers)

    def send(version):
        return [students.start(at, "receive_weights", version) for at in students.members]

    learner = ModelledLearner(costs.learn, pack_seconds=costs.pack, send=send)
    return {
        "student_rollout": students,
        "teacher_rollout": rollouts(Author.TEACHER, costs.teacher, setting.teachers),
        "teacher_scoring": ClockedWorkers(
            clock, [ModelledScorer(costs.score) for _ in range(setting.scorers)]
        ),
        "learner": ClockedWorkers(clock, [learner]),
    }

"""Pools under a simulated clock: calls take the time a model says, one after another per worker.

It stands where Ray stands: the real streams, window, writers and scoring queue run on it, and it
checks what they hand it.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from fakes.direct_transfer import DirectTransfer

from distill_system.cluster.waiting import MANY_CALLS
from distill_system.observe import Timings
from distill_system.records import (
    Author,
    Finish,
    Prompt,
    StepResult,
    TeacherTargets,
    Trajectory,
    VersionSpan,
)
from distill_system.rollout import DecodeSlice


class Clock:
    """Simulated time, and what is to happen when."""

    def __init__(self):
        self.now = 0.0
        self._serial = itertools.count()
        self._events: list[tuple[float, int, Any]] = []

    def __call__(self):
        return self.now

    def at(self, when, action):
        assert when >= self.now, "nothing happens in the past"
        heapq.heappush(self._events, (when, next(self._serial), action))

    def run_until(self, is_done, end):
        """Let things happen until is_done, or until `end`."""
        while not is_done():
            if not self._events or self._events[0][0] > end:
                self.now = max(self.now, end)
                return
            when, _, action = heapq.heappop(self._events)
            self.now = when
            action()


@dataclass(eq=False)
class Call:
    """A reference: its worker has run it at `done_at`."""

    method: str
    arguments: tuple[Any, ...]
    result: Any = None
    is_done: bool = False
    second: Call | None = None


class SimulatedWorkers:
    """Objects whose methods return (result, seconds); each runs its calls in their order.

    many_calls: more than so many unhurried ones are heard of together, as Ray's are.
    """

    def __init__(self, clock, objects, *, many_calls=MANY_CALLS):
        self.clock = clock
        self.many_calls = many_calls
        self.objects = dict(enumerate(objects))
        self._queues = {worker: deque() for worker in self.objects}
        self._busy = dict.fromkeys(self.objects, False)

    @property
    def members(self):
        return tuple(sorted(self.objects))

    @property
    def count(self):
        return len(self.objects)

    def start(self, worker_id, method, *arguments):
        assert worker_id in self.objects, f"there is no worker {worker_id}"
        call = Call(method, arguments)
        self._queues[worker_id].append(call)
        self.clock.at(self.clock.now, lambda: self._run(worker_id))
        return call

    def start_with_receipt(self, worker_id, method, *arguments):
        receipt = self.start(worker_id, method, *arguments)
        receipt.second = Call(method, arguments)
        return receipt, receipt.second

    def current(self, result):
        assert result.is_done, "its receipt was finished"
        return result

    def _run(self, worker):
        if worker not in self.objects:
            return  # it was ended, and its calls with it
        if self._busy[worker] or not self._queues[worker]:
            return
        call = self._queues[worker].popleft()
        arguments = [a.result if isinstance(a, Call) else a for a in call.arguments]
        call.result, seconds = getattr(self.objects[worker], call.method)(*arguments)
        self._busy[worker] = True

        def end():
            call.is_done, self._busy[worker] = True, False
            if call.second is not None:
                call.result, call.second.result = call.result
                call.second.is_done = True
            self._run(worker)

        self.clock.at(self.clock.now + seconds, end)

    def finish(self, references, *, what, fetch=True, seconds=None):
        assert what
        self.clock.run_until(lambda: all(r.is_done for r in references), self.clock.now + 1e6)
        assert all(r.is_done for r in references), f"waited in vain for {what}"
        return [r.result for r in references] if fetch else []

    def wait_any(self, references, *, what, seconds, unhurried=(), together_seconds=0.0):
        assert what
        every = [*references, *unhurried]
        assert all(isinstance(r, Call) for r in every)
        if len(unhurried) > self.many_calls:
            self._listen(references, unhurried, self.clock.now + min(seconds, together_seconds))
        self.clock.run_until(lambda: any(r.is_done for r in every), self.clock.now + seconds)
        return [r for r in every if r.is_done]

    def _listen(self, urgent, others, end):
        if urgent:
            self.clock.run_until(lambda: any(r.is_done for r in urgent), end)
        else:
            self.clock.run_until(lambda: all(r.is_done for r in others), end)


@dataclass
class SimulatedWriter:
    """A rollout worker that decodes `rate` tokens a second for each sequence.

    draw_length: number of tokens of the next response.
    """

    author: Author
    rate: float
    draw_length: Any
    version: int = 0
    under_way: dict[str, list[Any]] = field(default_factory=dict)
    num_finished: int = 0

    def advance(self, requests, seconds):
        for request in requests:
            name = request.name(self.author)
            assert name not in self.under_way, f"{name} was ordered twice"
            self.under_way[name] = [request.prompt, self.draw_length(), 0.0, []]
        last = max((length - done for _, length, done, _ in self.under_way.values()), default=0.0)
        took = min(seconds, last / self.rate)
        finished = []
        for name, entry in list(self.under_way.items()):
            prompt, length, done, spans = entry
            end = min(float(length), done + took * self.rate + 1e-9)
            if int(end) > int(done) or not spans:
                spans.append((self.version, int(done), max(int(end), int(done) + (not spans))))
            entry[2] = end
            if end >= length:
                finished.append(self._trajectory(name, prompt, length, spans))
                del self.under_way[name]
        said = DecodeSlice(
            trajectories=tuple(finished),
            version=self.version,
            busy_seconds=took,
            written_tokens=self._count_written(finished),
        )
        return said, took

    def _count_written(self, finished):
        self.num_finished += sum(trajectory.num_response_tokens for trajectory in finished)
        return self.num_finished + sum(int(entry[2]) for entry in self.under_way.values())

    def _trajectory(self, name, prompt, length, spans):
        edges = [max(0, min(end, length)) for _, _, end in spans]
        edges[-1] = length
        starts = [0, *edges[:-1]]
        versions = tuple(
            VersionSpan(version=version, start=start, end=end)
            for (version, _, _), start, end in zip(spans, starts, edges, strict=True)
            if end > start
        )
        return Trajectory(
            trajectory_id=name,
            prompt_id=prompt.prompt_id,
            author=self.author,
            token_ids=np.ones(prompt.token_ids.size + length, np.int32),
            num_prompt_tokens=int(prompt.token_ids.size),
            behaviour_logprobs=np.zeros(length, np.float32),
            temperature=1.0,
            finish=Finish.STOP,
            weight_versions=versions if self.author is Author.STUDENT else (),
        )

    def receive(self, version, seconds):
        self.version = version
        return None, seconds


@dataclass
class SimulatedScorer:
    """A teacher scorer that reads `rate` tokens a second, after a start of its own."""

    rate: float
    start_seconds: float = 0.0

    def score_with_receipt(self, chunk, needs):
        targets = [
            TeacherTargets(trajectory_id=t.trajectory_id, num_tokens=t.num_response_tokens)
            for t in chunk.trajectories
        ]
        return (chunk.num_tokens, targets), self.start_seconds + chunk.num_tokens / self.rate


class SimulatedLearner:
    """The learner's door: steps of a drawn length, and versions on their way to the writers.

    trained: per step, what it learned from: (stream, trajectory).
    """

    def __init__(self, clock, students, *, draw_step_seconds, draw_publish_seconds):
        self.clock, self.students = clock, students
        self.draw_publish_seconds = draw_publish_seconds
        self.trained: list[list[tuple[str, Trajectory]]] = []
        self.first = self.version = 0
        self._sending: list[Call] = []
        self.workers = SimulatedWorkers(clock, [self])
        self.draw_step_seconds = draw_step_seconds

    def start_step(self, step, scored):
        assert step == self.first + len(self.trained) == self.version, "steps come in order"
        for part in scored:
            assert part.targets is None or part.targets.is_done, "a step needs no wait for scores"
        self.trained.append(
            [(part.chunk.stream.value, t) for part in scored for t in part.chunk.trajectories]
        )
        return [self.workers.start(0, "step", step)]

    def step(self, step):
        self.version = step + 1
        seconds = self.draw_step_seconds()
        tokens = sum(t.num_response_tokens for _, t in self.trained[-1])
        result = StepResult(step=step, metrics={}, num_response_tokens=tokens, seconds=seconds)
        return result, seconds

    def finish_step(self, step, references):
        [result] = self.workers.finish(references, what="a step")
        return result

    def start_publish(self, version):
        assert version == self.version
        assert not self._sending, "a publish is finished before the next"
        self._sending = [
            self.students.start(worker, "receive", version, self.draw_publish_seconds())
            for worker in self.students.members
        ]
        return [self.workers.start(0, "pack")]

    def pack(self):
        return None, 0.001

    def receiving(self):
        return self._sending

    def end_publish(self):
        assert all(call.is_done for call in self._sending), "every answer was heard"
        self._sending = []

    def finish_publish(self):
        self.students.finish(self._sending, what="weights")
        self._sending = []


def simulated_run(config, data, *, students, teachers, scorers, learner, timings_folder):
    """What AsynchronousStreams is made with: a context and pools over simulated workers."""
    context = SimpleNamespace(config=config, timings=Timings(timings_folder))
    named = {"student_rollout": students, "teacher_rollout": teachers, "teacher_scoring": scorers}
    pools = SimpleNamespace(
        placed={name: SimpleNamespace(workers=workers) for name, workers in named.items()},
        weights=DirectTransfer(learner, students),
        students=SimpleNamespace(workers=students),
        teachers=SimpleNamespace(workers=teachers),
        scorers=SimpleNamespace(workers=scorers),
        learner=learner,
    )
    return context, pools, data


def make_prompts(count, num_tokens=4):
    return [
        Prompt(
            prompt_id=f"p{index}",
            token_ids=np.full(num_tokens, index % 7, np.int32),
            text=f"prompt {index}",
        )
        for index in range(count)
    ]


def make_rows(name, count):
    """Rows of data as the off-policy stream takes them: answers that nobody sampled."""
    return [
        Trajectory(
            trajectory_id=f"{name}/{index}",
            prompt_id=f"{name}:{index}",
            author=Author.DATASET,
            token_ids=np.ones(4, np.int32),
            num_prompt_tokens=2,
            behaviour_logprobs=np.zeros(0, np.float32),
            temperature=1.0,
            finish=Finish.STOP,
        )
        for index in range(count)
    ]

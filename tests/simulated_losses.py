"""A whole run under a simulated clock whose workers are lost at random moments.

The streams and the pools that replace what is lost (ElasticPools) are the real ones; Ray, the
engines, the transfer of weights and the learner are simulated. Workers die, or hang in a call until
its deadline; the learner loses a rank, and the run goes on from its newest checkpoint.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from simulated_pools import (
    Call,
    Clock,
    SimulatedLearner,
    SimulatedScorer,
    SimulatedWorkers,
    SimulatedWriter,
    make_prompts,
    simulated_run,
)

from distill_system.cluster import ElasticPool, WorkerRequest
from distill_system.config import RunConfig
from distill_system.data import PromptFrontier
from distill_system.elastic import ElasticPools
from distill_system.errors import DeadlineError, TransferError, WorkerLostError
from distill_system.observe import FaultLog, RunDirectory
from distill_system.records import Author, Stream
from distill_system.streams.asynchronous import AsynchronousStreams
from distill_system.workers import StartedWorker

SECONDS = 10.0
"""For one version to reach every worker."""

PATIENCE = 2000.0
"""A step that takes longer waits for what never comes."""


class LossyWorkers(SimulatedWorkers):
    """A pool whose workers can be lost; implements ElasticWorkers.

    A call of a worker that died fails where it is waited for; one of a worker that hangs does not
    end before that worker is given up.
    """

    def __init__(self, name: str, clock: Clock, objects: Sequence[Any]) -> None:
        super().__init__(clock, objects)
        self.name = name
        self.vacant = 0
        self._next_id = len(self.objects)
        self._failed: dict[Call, Exception] = {}
        self._under_way: dict[int, list[Call]] = {worker: [] for worker in self.objects}
        self._hangs: set[int] = set()
        self.dead: dict[int, WorkerLostError] = {}

    @property
    def count(self) -> int:
        return len(self.objects) + self.vacant

    def die(self, worker: int) -> None:
        """The process is gone; the pool hears of it from what was under way, or when it asks."""
        lost = WorkerLostError(f"{self.name}-{worker} died.", f"{self.name}-{worker}")
        self.dead[worker] = lost
        self._fail_all(worker, lost)

    def hang(self, worker: int) -> None:
        """Nothing that it does from now on ends."""
        self._hangs.add(worker)

    def start(self, worker_id: int, method: str, *arguments: Any) -> Call:
        call = super().start(worker_id, method, *arguments)
        if worker_id in self.dead:
            self._fail(call, self.dead[worker_id])
        else:
            self._under_way[worker_id].append(call)
        return call

    def finish(
        self, references: Sequence[Call], *, what: str, fetch: bool = True, seconds: Any = None
    ) -> list[Any]:
        results = super().finish(references, what=what, fetch=fetch, seconds=seconds)
        failed = [self._failed[call] for call in references if call in self._failed]
        for call in references:
            self._failed.pop(call, None)
        if failed:
            raise failed[0]
        return results

    def take_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1

    def add(self, started: StartedWorker) -> None:
        worker = started.worker_id
        assert worker not in self.objects, "an id is given once"
        self.objects[worker] = started.handle
        self._queues[worker], self._busy[worker] = type(self._queues[0])(), False
        self._under_way[worker] = []
        self.vacant -= 1

    def vacate(self, worker_id: int) -> None:
        name = f"{self.name}-{worker_id}"
        self._fail_all(worker_id, WorkerLostError(f"{name} was given up.", name))
        del self.objects[worker_id]
        self._under_way.pop(worker_id)
        self._busy.pop(worker_id)
        self._hangs.discard(worker_id)
        self.dead.pop(worker_id, None)
        self.vacant += 1

    def close(self, place: Any) -> None:
        raise AssertionError("no worker leaves here")

    def remove(self, worker_id: int) -> None:
        raise AssertionError("no worker leaves here")

    def _run(self, worker: int) -> None:
        if worker not in self.objects or worker in self.dead:
            return
        if worker in self._hangs or self._busy[worker] or not self._queues[worker]:
            return
        call = self._queues[worker].popleft()
        arguments = [a.result if isinstance(a, Call) else a for a in call.arguments]
        call.result, seconds = getattr(self.objects[worker], call.method)(*arguments)
        self._busy[worker] = True
        self.clock.at(self.clock.now + seconds, lambda: self._end(worker, call))

    def _end(self, worker: int, call: Call) -> None:
        if worker not in self.objects or worker in self.dead or worker in self._hangs:
            return  # it was lost meanwhile
        self._busy[worker] = False
        if not call.is_done:  # the transfer that it took part in has failed
            self._under_way[worker].remove(call)
            call.is_done = True
            if call.second is not None:
                call.result, call.second.result = call.result
                call.second.is_done = True
        self._run(worker)

    def fail(self, worker: int, call: Call, error: Exception) -> None:
        """A call of a worker that lives fails."""
        self._under_way[worker].remove(call)
        self._fail(call, error)

    def _fail_all(self, worker: int, error: Exception) -> None:
        for call in self._under_way[worker]:
            self._fail(call, error)
        self._under_way[worker] = []
        self._queues[worker] = type(self._queues[worker])()

    def _fail(self, call: Call, error: Exception) -> None:
        call.is_done = True
        self._failed[call] = error


class LossyWriter(SimulatedWriter):
    """A writer that can be told to forget what it writes."""

    def abandon(self) -> tuple[None, float]:
        self.under_way.clear()
        return None, 0.0


class Transfer:
    """In place of run.TransferGroup: versions reach all student workers, or the transfer fails.

    One worker that is lost on the way fails it for all.
    """

    pools = ("student_rollout",)

    def __init__(self, learner: RestartedLearner, students: LossyWorkers) -> None:
        self.learner, self.students = learner, students
        self.supervision: Any = None
        self.version = 0
        self._members: tuple[int, ...] = ()
        self._receiving: dict[Call, int] = {}

    def break_up(self) -> None:
        """The group is opened anew before the next publish, which costs no time here."""

    def start_publish(self, version: int) -> list[Call]:
        self.version, self._members = version, self.students.members
        if not self._members:
            return []
        return self.learner.start_publish(version)

    def receiving(self) -> dict[Call, str]:
        self._receiving = dict(zip(self.learner.receiving(), self._members, strict=True))
        return {call: f"student_rollout-{worker}" for call, worker in self._receiving.items()}

    def finish_publish(self) -> None:
        self.learner.end_publish()
        self._receiving = {}

    def break_off(self, worker: int) -> None:
        """A worker is lost: whoever has not received all yet waits for it in vain."""
        if worker in self._receiving.values():
            for call, other in self._receiving.items():
                if other != worker and not call.is_done and other in self.students.objects:
                    self.students.fail(other, call, TransferError(f"worker {worker} is gone"))

    def recover(self, error: Exception) -> None:
        self.learner.end_publish()
        lost = {worker for worker in self._receiving.values() if worker in self.students.dead}
        lost |= {worker for worker in self._receiving.values() if worker in self.students._hangs}
        for worker in lost & set(self.students.members):
            name = f"student_rollout-{worker}"
            self.supervision.lose(WorkerLostError(f"{name} is gone.", name))
        self._receiving = {}

    def publish(self, version: int) -> None:
        """Returns once every worker holds the version; those that are lost on the way are lost."""
        self.version = version
        while self.students.members:
            members = self.students.members
            calls = [self.students.start(worker, "receive", version, 0.1) for worker in members]
            self._receiving = dict(zip(calls, members, strict=True))
            try:
                self._receive(calls)
                break
            except (TransferError, DeadlineError, WorkerLostError) as error:
                self.recover(error)
        self._receiving = {}

    def _receive(self, calls: Sequence[Call]) -> None:
        clock = self.learner.clock
        clock.run_until(lambda: all(call.is_done for call in calls), clock.now + SECONDS)
        self.students.finish([call for call in calls if call.is_done], what="weights")
        if not all(call.is_done for call in calls):
            raise DeadlineError("some say nothing")


class RestartedLearner(SimulatedLearner):
    """A learner whose ranks can be lost: it goes on from a checkpoint, with the steps up to it."""

    def start_publish(self, version: int) -> list[Call]:
        self._sending = []
        return list(super().start_publish(version))

    def end_publish(self) -> None:
        self._sending = []

    def go_back(self, step: int) -> None:
        self.first, self.version, self.trained = step, step, []


@dataclass
class SimulatedStarts:
    """Implements elastic_pools.Starts: a worker is ready after a drawn time."""

    clock: Clock
    pools: Mapping[str, LossyWorkers]
    make: Mapping[str, Callable[[], Any]]
    draw_seconds: Callable[[], float]

    def begin_worker(
        self, request: WorkerRequest, worker_id: int, arguments: Any, place: Any = None
    ) -> Any:
        ready_at = self.clock.now + self.draw_seconds()
        worker = StartedWorker(worker_id, self.make[request.name](), None)
        self.clock.at(ready_at, lambda: None)  # so that time does not stand still until then
        return SimpleNamespace(
            name=f"{request.name}-{worker_id}",
            is_unplaced=False,
            poll=lambda: worker if self.clock.now >= ready_at else None,
            cancel=lambda: None,
        )

    def adopt_worker(self, workers: LossyWorkers, starting: Any) -> None:
        workers.add(starting.poll())

    def pop_lost(self) -> list[WorkerLostError]:
        return [lost for workers in self.pools.values() for lost in workers.dead.values()]


@dataclass
class LossyRun:
    """One run; see play.

    held: the most that each container of the run has held, by name.
    """

    config: RunConfig
    folder: Path
    seed: int
    num_prompts: int
    losses: Counter[str] = field(default_factory=Counter)
    held: Counter[str] = field(default_factory=Counter)
    most_in_flight: int = 0

    def __post_init__(self) -> None:
        self._step_since = 0.0
        self.draw = draw = random.Random(self.seed)
        self.clock = clock = Clock()
        make = {
            "student_rollout": lambda: LossyWriter(Author.STUDENT, draw.uniform(20, 200), length),
            "teacher_rollout": lambda: LossyWriter(Author.TEACHER, draw.uniform(20, 200), length),
            "teacher_scoring": lambda: SimulatedScorer(draw.uniform(200, 5000), 0.01),
        }

        def length() -> int:
            return draw.choice([1, 2, 5, 30])

        self.workers = {
            name: LossyWorkers(
                name, clock, [make[name]() for _ in range(self.config.pools.by_name[name].count)]
            )
            for name in make
        }
        students = self.workers["student_rollout"]
        self.learner = RestartedLearner(
            clock,
            students,
            draw_step_seconds=lambda: draw.uniform(0.0, 0.3),
            draw_publish_seconds=lambda: draw.choice([0.0, 0.01, 0.2]),
        )
        self.transfer = Transfer(self.learner, students)
        self.data = SimpleNamespace(
            prompts=make_prompts(self.num_prompts), student_sft=[], stored=[]
        )
        starts = SimulatedStarts(
            clock, self.workers, make, draw_seconds=lambda: draw.uniform(0.5, 20.0)
        )
        self.run_folder = RunDirectory(self.folder / "run")
        self.placed = {
            name: ElasticPool(workers=workers, request=self._request(name))
            for name, workers in self.workers.items()
        }
        self.log = FaultLog(self.run_folder, "distill", [*make, "learner"])
        self.streams = self._open_streams()
        self.elastic = ElasticPools(
            self.placed,
            starts,
            self.config.scaling,
            SimpleNamespace(  # type: ignore[arg-type]  # nobody asks for another size
                read_new=list, listening=nullcontext, write_status=lambda status: None
            ),
            crew=self.streams,
            weights=self.transfer,
            faults=self.config.faults,
            fault_log=self.log,
            notify=lambda line: None,
            clock=clock,
            sleep=self._sleep,
        )
        self.transfer.supervision = self.streams.supervision = self.elastic

    def play(
        self,
        steps: int,
        *,
        mean_seconds: float,
        checkpoint_every: int = 10,
        after_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Run, with a loss every so many seconds of the clock; every step is checked.

        after_step: called with the steps done.

        Raises: AssertionError if a step learns from other prompts than the walk says, or more is
            in flight than may be.
        """
        walks = self._walks()
        saved: tuple[int, Any] = (0, None)
        self._plan_next(mean_seconds)
        step, self.rank_is_lost = 0, False
        self._begin(0, None)
        with self.log, self.elastic:
            while step < steps:
                self._play_step(step)
                expected = {stream: walk[step] for stream, walk in walks.items()}
                fed = {
                    stream: Counter(ids)
                    for stream, ids in self.streams.pop_prompts().items()
                    if ids
                }
                assert fed == expected, f"step {step}"
                self.learner.trained[-1].clear()
                step += 1
                after_step(step)
                if step % checkpoint_every == 0:
                    saved = (step, self.streams.state())
                if self.rank_is_lost:
                    self.rank_is_lost = False
                    self.losses["learner"] += 1
                    step = saved[0]
                    self._begin_again(step, saved[1])

    def _play_step(self, step: int) -> None:
        self.log.step, self._step_since = step, self.clock.now
        scored = self.streams.take(step)
        self.elastic.advance()
        if self.elastic.has_changes():
            self.streams.wait_for_weight_sync()
            self.elastic.adopt()
        self.streams.learn(step, scored)
        self.streams.publish(step + 1)
        self._look()

    def _look(self) -> None:
        """What is held now; see held and most_in_flight."""
        for flow in self.streams._flows.values():
            self.most_in_flight = max(self.most_in_flight, flow.buffer.num_in_flight)
            holding = flow.writers._worker_of
            self.held["slices"] = max(self.held["slices"], len(holding))
            self.held["entries"] = max(self.held["entries"], len(flow.buffer.prompts()))
        calls = sum(len(watched._calls) for watched in self.streams._watched.values())
        self.held["calls"] = max(self.held["calls"], calls)
        scoring = len(self.streams._scorers._calls)
        self.held["scoring calls"] = max(self.held["scoring calls"], scoring)
        self.held["events"] = max(self.held["events"], len(self.clock._events))

    def _plan_next(self, mean_seconds: float) -> None:
        wait = self.draw.expovariate(1.0 / mean_seconds)

        def strike() -> None:
            waited = self.clock.now - self._step_since
            assert waited < PATIENCE, f"step {self.log.step} does not come, after {waited:.0f} s"
            self._lose_one()
            self._plan_next(mean_seconds)

        self.clock.at(self.clock.now + wait, strike)

    def _lose_one(self) -> None:
        name = self.draw.choice([*self.workers, "learner"])
        if name == "learner":
            self.rank_is_lost = True
            return
        workers = self.workers[name]
        alive = [w for w in workers.members if w not in workers.dead and w not in workers._hangs]
        if not alive:
            return
        worker = self.draw.choice(alive)
        way = self.draw.choice([workers.die, workers.hang])
        way(worker)
        self.losses[f"{name} {way.__name__}"] += 1
        if name == "student_rollout":
            self.transfer.break_off(worker)

    def _begin(self, step: int, state: Any) -> None:
        if state is not None:
            self.streams.restore(state)
        self.transfer.publish(step)
        self.streams.begin(step)

    def _begin_again(self, step: int, state: Any) -> None:
        """As the driver does after the learner lost a rank."""
        self.streams.abandon()
        self.transfer.finish_publish()
        self.learner.go_back(step)
        self.streams = self._open_streams()
        self.elastic.supervise(self.streams)
        self._begin(step, state)

    def _open_streams(self) -> AsynchronousStreams:
        context, pools, data = simulated_run(
            self.config,
            self.data,
            students=self.workers["student_rollout"],
            teachers=self.workers["teacher_rollout"],
            scorers=self.workers["teacher_scoring"],
            learner=self.learner,
            timings_folder=self.run_folder,
        )
        pools.placed, pools.weights = self.placed, self.transfer
        streams = AsynchronousStreams(context, pools, data, clock=self.clock)
        if hasattr(self, "elastic"):
            streams.supervision = self.elastic
        return streams

    def _walks(self) -> dict[str, list[Counter[str]]]:
        """What each step of each stream should learn from."""
        distill, count = self.config.distill, len(self.data.prompts)
        return {
            stream.value: [
                Counter(f"p{at}" for at in walk.take(distill.sequences(stream.side)))
                for _ in range(distill.steps)
            ]
            for stream, walk in {
                Stream.ON_POLICY: PromptFrontier(count, self.config.seed, "student_prompts"),
                Stream.OFF_POLICY: PromptFrontier(count, self.config.seed, "teacher_prompts"),
            }.items()
        }

    def _request(self, name: str) -> WorkerRequest:
        pool = self.config.pools.by_name[name]
        return WorkerRequest(
            name=name, worker_class=object, arguments=[{} for _ in range(pool.count)], pool=pool
        )

    def _sleep(self, seconds: float) -> None:
        self.clock.run_until(lambda: False, self.clock.now + seconds)

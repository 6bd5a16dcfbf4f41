"""Workers that say how long a call takes and compute nothing: a cost model behind the pools' doors.

Each method returns (result, seconds). A simulated clock lets the seconds pass at once
(modelled_clock.py), a Ray worker sleeps for them (modelled_ray.py). What travels is what the real
workers send: trajectories with their arrays and version spans. Nothing here imports torch or vLLM.
"""

from __future__ import annotations

import math
import statistics
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from distill_system.records import (
    Author,
    Finish,
    Prompt,
    StepResult,
    TeacherTargets,
    Trajectory,
    TrajectoryChunk,
    VersionSpan,
    WeightVersion,
)
from distill_system.rollout import DecodeSlice, GenerationRequest, Sampling
from distill_system.rollout.engine import LONGEST_SLICE

# Token counts of the 427 answers and instructions (with their inputs) of Self-Instruct's evaluation
# set and seed tasks (github.com/yizhongw/self-instruct, Apache-2.0), a token counted as four bytes
# of UTF-8: the share of texts that is no longer.
ANSWER_SHARES = (
    0,
    0.1,
    0.2,
    0.3,
    0.4,
    0.5,
    0.6,
    0.7,
    0.8,
    0.85,
    0.9,
    0.925,
    0.95,
    0.97,
    0.98,
    0.99,
    1,
)
ANSWER_TOKENS = (1, 2, 8, 16, 26, 36, 51, 75, 104, 126, 175, 196, 223, 322, 387, 472, 838)
PROMPT_SHARES = tuple(part / 16 for part in range(17))
PROMPT_TOKENS = (7, 13, 15, 17, 19, 22, 24, 28, 32, 38, 44, 51, 61, 82, 105, 168, 1529)
LONGEST = 512

# One H100 SXM per worker: bytes and operations a second, and the parts of them that are reached.
MEMORY_RATE, OPERATION_RATE = 0.6 * 3.35e12, 0.4 * 989e12
LINK_RATE = 20e9
STUDENT, TEACHER = 1.54e9, 7.62e9


@dataclass(frozen=True)
class Lengths:
    """Response lengths in tokens; a prompt has the same one in every run.

    times: stretches all of them.  is_ragged: False gives every prompt the mean.
    """

    times: float = 1.0
    longest: int = LONGEST
    is_ragged: bool = True

    def of(self, prompt_id: str) -> int:
        """Response tokens."""
        if not self.is_ragged:
            return self._mean
        return self._at(zlib.crc32(prompt_id.encode()) / 2**32)

    @cached_property
    def _mean(self) -> int:
        return round(statistics.mean(self._at((part + 0.5) / 4096) for part in range(4096)))

    def _at(self, share: float) -> int:
        tokens = self.times * float(np.interp(share, ANSWER_SHARES, ANSWER_TOKENS))
        return max(1, min(self.longest, round(tokens)))


@dataclass(frozen=True)
class EngineCost:
    """A decoding step lasts fixed + per_sequence x sequences; reading, per_token x tokens."""

    fixed: float
    per_sequence: float
    per_token: float

    @classmethod
    def of(cls, num_parameters: float) -> EngineCost:
        """Weights are read once a step in 16 bits, 2.5 ms go to launching and scheduling.

        It gives 15 ms for 9e9 parameters and 64 sequences, where 15 to 16 ms have been published
        (docs.gpustack.ai, Qwen3.5-9B on an H100 in vLLM).
        """
        operations = 2 * num_parameters / OPERATION_RATE
        fixed = 2.5e-3 + 2 * num_parameters / MEMORY_RATE
        return cls(fixed=fixed, per_sequence=operations + 1e-5, per_token=operations)


@dataclass(frozen=True)
class Costs:
    """Seconds of everything that is slept.

    score, learn: (of each call, of each token).  pack: until the learner may go on; send: until a
    rollout worker holds the weights.
    """

    student: EngineCost = field(default_factory=partial(EngineCost.of, STUDENT))
    teacher: EngineCost = field(default_factory=partial(EngineCost.of, TEACHER))
    score: tuple[float, float] = (0.01, 2 * TEACHER / OPERATION_RATE)
    learn: tuple[float, float] = (0.05, 6 * STUDENT / OPERATION_RATE)
    pack: float = 0.01
    send: float = 2 * STUDENT / LINK_RATE

    def stretched(self, times: float) -> Costs:
        """All of it, so many times slower."""

        def engine(cost: EngineCost) -> EngineCost:
            return EngineCost(cost.fixed * times, cost.per_sequence * times, cost.per_token * times)

        return replace(
            self,
            student=engine(self.student),
            teacher=engine(self.teacher),
            score=(self.score[0] * times, self.score[1] * times),
            learn=(self.learn[0] * times, self.learn[1] * times),
            pack=self.pack * times,
            send=self.send * times,
        )


@dataclass(slots=True)
class _Sequence:
    """One sequence that an engine writes.  spans: (version, tokens) in the order of writing."""

    name: str
    prompt: Prompt
    length: int
    written: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)

    def write(self, count: int, version: int) -> None:
        self.written += count
        if self.spans and self.spans[-1][0] == version:
            count += self.spans.pop()[1]
        self.spans.append((version, count))

    def trajectory(self, author: Author) -> Trajectory:
        ends = np.cumsum([count for _, count in self.spans]).tolist()
        versions = tuple(
            VersionSpan(version=version, start=end - count, end=end)
            for (version, count), end in zip(self.spans, ends, strict=True)
        )
        return Trajectory(
            trajectory_id=self.name,
            prompt_id=self.prompt.prompt_id,
            author=author,
            token_ids=np.concatenate([self.prompt.token_ids, np.ones(self.length, np.int32)]),
            num_prompt_tokens=int(self.prompt.token_ids.size),
            behaviour_logprobs=np.zeros(self.length, np.float32),
            temperature=1.0,
            finish=Finish.STOP,
            weight_versions=versions if author is Author.STUDENT else (),
        )


class ModelledRollout:
    """Continuous batching: at most max_num_sequences are written at once, the rest wait.

    New weights let every sequence under way be read again.
    """

    def __init__(
        self,
        author: Author,
        cost: EngineCost,
        lengths: Lengths,
        *,
        max_num_sequences: int,
        send_seconds: float,
    ) -> None:
        self._author, self._cost, self._lengths = author, cost, lengths
        self._max_num_sequences, self._send_seconds = max_num_sequences, send_seconds
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._version = self._num_finished = 0
        self._owed = 0.0

    def advance(
        self, requests: Sequence[GenerationRequest], seconds: float
    ) -> tuple[DecodeSlice, float]:
        """See RolloutWorker.advance."""
        for request in requests:
            self._add(request.name(self._author), request.prompt)
        finished, spent = self._decode(seconds)
        self._num_finished += sum(trajectory.num_response_tokens for trajectory in finished)
        under_way = sum(sequence.written for sequence in self._running)
        said = DecodeSlice(
            trajectories=tuple(finished),
            version=self._version,
            busy_seconds=spent,
            written_tokens=self._num_finished + under_way,
        )
        return said, spent

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, label: str
    ) -> tuple[list[Trajectory], float]:
        """See RolloutWorker.generate."""
        names = [
            GenerationRequest(prompt=prompt, label=label, sampling=sampling, seed=seed).name(
                self._author
            )
            for prompt in prompts
        ]
        for name, prompt in zip(names, prompts, strict=True):
            self._add(name, prompt)
        finished, spent = self._decode(math.inf)
        by_name = {trajectory.trajectory_id: trajectory for trajectory in finished}
        return [by_name[name] for name in names], spent

    def receive_weights(self, version: int) -> tuple[WeightVersion, float]:
        """See RolloutWorker.receive_weights."""
        self._version = version
        self._owed += sum(self._reading(sequence) for sequence in self._running)
        seconds = self._send_seconds
        return WeightVersion(version=version, num_bytes=0, digest=0, seconds=seconds), seconds

    def _add(self, name: str, prompt: Prompt) -> None:
        self._waiting.append(_Sequence(name, prompt, self._lengths.of(prompt.prompt_id)))

    def _reading(self, sequence: _Sequence) -> float:
        return self._cost.per_token * (sequence.prompt.token_ids.size + sequence.written)

    def _decode(self, seconds: float) -> tuple[list[Trajectory], float]:
        """Decoding steps until the time is over or all is written; from one event to the next."""
        spent, self._owed = self._owed, 0.0
        finished: list[Trajectory] = []
        while self._waiting or self._running:
            longest = seconds if finished else LONGEST_SLICE * seconds
            if spent >= longest:
                break
            while self._waiting and len(self._running) < self._max_num_sequences:
                spent += self._reading(self._waiting[0])
                self._running.append(self._waiting.popleft())
            step = self._cost.fixed + self._cost.per_sequence * len(self._running)
            steps = min(sequence.length - sequence.written for sequence in self._running)
            if seconds < math.inf:
                steps = min(steps, max(1, math.ceil((longest - spent) / step)))
            spent += steps * step
            for sequence in self._running:
                sequence.write(steps, self._version)
            done = [s for s in self._running if s.written == s.length]
            self._running = [s for s in self._running if s.written < s.length]
            finished += [sequence.trajectory(self._author) for sequence in done]
        return finished, spent


class ModelledScorer:
    """A teacher that reads chunks."""

    def __init__(self, cost: tuple[float, float]) -> None:
        self._cost = cost

    def score_with_receipt(
        self, chunk: TrajectoryChunk, needs: Any
    ) -> tuple[tuple[int, list[TeacherTargets]], float]:
        """See TeacherScorer.score_with_receipt; nothing is in the targets."""
        seconds = self._cost[0] + self._cost[1] * chunk.num_tokens
        targets = [
            TeacherTargets(trajectory_id=t.trajectory_id, num_tokens=t.num_response_tokens)
            for t in chunk.trajectories
        ]
        return (chunk.num_tokens, targets), seconds


class ModelledLearner:
    """One learner rank.  send: begins every rollout worker's receive_weights of a version."""

    def __init__(
        self,
        cost: tuple[float, float],
        *,
        pack_seconds: float,
        send: Callable[[int], list[Any]],
    ) -> None:
        self._cost, self._pack_seconds, self.send = cost, pack_seconds, send

    def step(
        self, step: int, chunks: Sequence[TrajectoryChunk], totals: Any, *targets: Any
    ) -> tuple[StepResult, float]:
        """See Learner.step."""
        assert all(targets), "every chunk comes with its targets"
        seconds = self._cost[0] + self._cost[1] * sum(chunk.num_tokens for chunk in chunks)
        result = StepResult(
            step=step,
            metrics={},
            num_response_tokens=sum(chunk.num_response_tokens for chunk in chunks),
            seconds=seconds,
        )
        return result, seconds

    def address(self) -> tuple[tuple[str, int], float]:
        """See Learner.address; nobody calls there."""
        return ("", 0), 0.0

    def connect_rollouts(self, *arguments: Any) -> tuple[None, float]:
        """See Learner.connect_rollouts; the weights that travel are empty."""
        return None, 0.0

    def start_publish(self, version: int) -> tuple[Callable[[], list[Any]], float]:
        """See Learner.start_publish; what is returned begins the sending once the time is over."""
        return (lambda: self.send(version)), self._pack_seconds

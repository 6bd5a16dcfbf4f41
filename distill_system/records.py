"""The frozen types that travel between rooms: numpy, one sequence each, checked on construction.

Axes: P prompt tokens, T response tokens, F teacher hidden size, E action-embedding size, K most
likely tokens.
A record is never edited; a new one is made. Arrays that come out of Ray's object store are
read-only and stay so. They have no slots: a frozen class with slots is pickled field by field in
Python, which the driver would pay for with every call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from heapq import heapreplace
from typing import Any

import numpy as np
import numpy.typing as npt

from distill_system.config.objective.needs import SIGNALS, StreamName
from distill_system.errors import RecordError
from distill_system.workers import Reference

Int32Array = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.floating]


class Author(StrEnum):
    """Who wrote a trajectory's response."""

    STUDENT = "student"
    TEACHER = "teacher"
    DATASET = "dataset"


class Finish(StrEnum):
    """Why a response ended: its own end-of-sequence token, the length limit, or an abort."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class Stream(StrEnum):
    """What a trajectory feeds: a side of the objective, or the loss on plain text beside it."""

    ON_POLICY = "on_policy"
    OFF_POLICY = "off_policy"
    PLAIN_TEXT = "plain_text"

    @property
    def side(self) -> StreamName:
        """Which side of the objective it is; plain text is none."""
        assert self is not Stream.PLAIN_TEXT, "no objective reads plain text"
        return "on_policy" if self is Stream.ON_POLICY else "off_policy"


REJECTED = "preferences.rejected"
"""Name of the set of the worse answers of data.preferences; ids of its trajectories begin so."""
OBJECTIVE_STREAMS = (Stream.ON_POLICY, Stream.OFF_POLICY)
"""Those that an objective reads, and a teacher may."""


def _require(holds: bool, record_id: str, expected: str, actual: object) -> None:
    if not holds:
        raise RecordError(f"record {record_id!r}: expected {expected}, got {actual}")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt, tokenised.  Made by data, read by rollout and evaluation.

    token_ids: int32 [P], P >= 1.  references: accepted answers as text, empty if there are none.
    text: the prompt as a person reads it.  source: the data source's name.
    teacher_ids: int32 [Q], the prompt as the teacher reads it (data.teacher_context); None: as it
    stands.
    occurrence: how often the prompt stands before this one among those answered together, as in a
    step that asks for more prompts than there are.
    """

    prompt_id: str
    token_ids: Int32Array
    text: str
    references: tuple[str, ...] = ()
    source: str = ""
    occurrence: int = 0
    teacher_ids: Int32Array | None = None

    def __post_init__(self) -> None:
        ids = self.token_ids
        _require(ids.ndim == 1 and ids.size > 0, self.prompt_id, "token_ids [P], P >= 1", ids.shape)
        _require(ids.dtype == np.int32, self.prompt_id, "token_ids of int32", ids.dtype)

    def ids_for(self, author: Author) -> Int32Array:
        """What this author reads, int32 [P], or [Q] for the teacher."""
        if author is Author.TEACHER and self.teacher_ids is not None:
            return self.teacher_ids
        return self.token_ids

    @property
    def sample_id(self) -> str:
        """With a label, the identity of a sample: its name and its seed are made of both."""
        return f"{self.prompt_id}#{self.occurrence + 1}" if self.occurrence else self.prompt_id


def count_occurrences(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts that are answered together; one that stands there again says how often before.

    What is counted already stays as it is, so that a part of the prompts may be counted again.
    """
    next_free = Counter[str]()
    counted: list[Prompt] = []
    for prompt in prompts:
        occurrence = max(prompt.occurrence, next_free[prompt.prompt_id])
        next_free[prompt.prompt_id] = occurrence + 1
        is_counted = occurrence == prompt.occurrence
        counted.append(prompt if is_counted else replace(prompt, occurrence=occurrence))
    return counted


@dataclass(frozen=True, kw_only=True)
class VersionSpan:
    """Response tokens [start, end) were sampled from the student's weights of this version."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One prompt with one response.  Made by rollout (or data), read by scoring and learner.

    token_ids: int32 [P+T].  num_prompt_tokens: P.
    behaviour_logprobs: float32 [T], nats, at the sampling temperature and truncation; empty [0] for
    Author.DATASET, whose behaviour policy is unknown.
    weight_versions: spans that cover [0, T) in order; empty unless the student wrote it.
    kept_ids: int32 [T, K], the tokens that truncated sampling left to the student at each place,
    the written one among them, -1 where there are fewer; None where it was not recorded.
    teacher_prompt_ids: int32 [Q], the prompt after which the teacher wrote the response or scores
    it; None: the one in token_ids, which the student is taught after in either case.
    """

    trajectory_id: str
    prompt_id: str
    author: Author
    token_ids: Int32Array
    num_prompt_tokens: int
    behaviour_logprobs: FloatArray
    temperature: float
    finish: Finish
    weight_versions: tuple[VersionSpan, ...] = ()
    kept_ids: Int32Array | None = None
    teacher_prompt_ids: Int32Array | None = None

    def __post_init__(self) -> None:
        name, num_response = self.trajectory_id, self.num_response_tokens
        _require(self.token_ids.ndim == 1, name, "token_ids [P+T]", self.token_ids.shape)
        _require(self.token_ids.dtype == np.int32, name, "token_ids of int32", self.token_ids.dtype)
        _require(
            self.num_prompt_tokens >= 1, name, "num_prompt_tokens >= 1", self.num_prompt_tokens
        )
        _require(num_response >= 1, name, "at least one response token", num_response)
        expected = 0 if self.author is Author.DATASET else num_response
        actual = self.behaviour_logprobs.shape
        _require(actual == (expected,), name, f"behaviour_logprobs [{expected}]", actual)
        if self.kept_ids is not None:
            is_kept = (self.kept_ids == self.response_ids[:, None]).any(axis=-1)
            _require(
                bool(is_kept.all()), name, "kept_ids with each token written", self.kept_ids.shape
            )
        if self.weight_versions:
            edges = [0, *(span.end for span in self.weight_versions)]
            starts = [span.start for span in self.weight_versions]
            covers = edges[:-1] == starts and edges[-1] == num_response
            _require(
                covers, name, f"version spans covering [0, {num_response})", self.weight_versions
            )

    @property
    def num_response_tokens(self) -> int:
        """T."""
        return int(self.token_ids.size) - self.num_prompt_tokens

    @property
    def response_ids(self) -> Int32Array:
        """int32 [T]."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def as_teacher_reads(self) -> Trajectory:
        """The same response after the teacher's prompt."""
        prompt = self.teacher_prompt_ids
        if prompt is None:
            return self
        return replace(
            self,
            token_ids=np.concatenate([prompt, self.response_ids]),
            num_prompt_tokens=int(prompt.size),
            teacher_prompt_ids=None,
        )

    @property
    def oldest_version(self) -> int | None:
        """The oldest weight version that wrote a token; None if not the student's."""
        return min((span.version for span in self.weight_versions), default=None)


def trajectory_to_plain(trajectory: Trajectory) -> dict[str, Any]:
    """A trajectory as numbers, texts and lists, for JSON; float32 comes back as it was."""
    plain = {field.name: getattr(trajectory, field.name) for field in fields(trajectory)}
    spans = [(span.version, span.start, span.end) for span in trajectory.weight_versions]
    names = ("token_ids", "behaviour_logprobs", "kept_ids", "teacher_prompt_ids")
    arrays = {name: plain[name].tolist() for name in names if plain[name] is not None}
    return plain | arrays | {"weight_versions": spans}


def trajectory_from_plain(plain: Mapping[str, Any]) -> Trajectory:
    """What trajectory_to_plain was given."""
    spans = (VersionSpan(version=v, start=s, end=e) for v, s, e in plain["weight_versions"])
    kept, prompt = plain.get("kept_ids"), plain.get("teacher_prompt_ids")
    return Trajectory(
        **{
            **plain,
            "author": Author(plain["author"]),
            "finish": Finish(plain["finish"]),
            "token_ids": np.array(plain["token_ids"], np.int32),
            "behaviour_logprobs": np.array(plain["behaviour_logprobs"], np.float32),
            "weight_versions": tuple(spans),
            "kept_ids": None if kept is None else np.array(kept, np.int32),
            "teacher_prompt_ids": None if prompt is None else np.array(prompt, np.int32),
        }
    )


@dataclass(frozen=True, kw_only=True)
class TeacherTargets:
    """What the teacher says of one trajectory.  Made by scoring, read by learner.

    Only what the objective needs of the trajectory's stream is there; the rest is None. Axes and
    dtypes are those of config.objective.needs.SIGNALS, and are checked.
    num_tokens: T.
    features: the teacher's final hidden state before each token.
    expected_embedding: sum over y of pi*(y | s_t) e(y).
    logprobs: log pi*(y_t | s_t) in nats at temperature 1.
    top_k_ids, top_k_logprobs: the most likely tokens, not renormalised.
    """

    trajectory_id: str
    num_tokens: int
    features: FloatArray | None = None
    expected_embedding: FloatArray | None = None
    logprobs: FloatArray | None = None
    top_k_ids: Int32Array | None = None
    top_k_logprobs: FloatArray | None = None

    def __post_init__(self) -> None:
        for signal in SIGNALS:
            array = getattr(self, signal.name)
            if array is None:
                continue
            good = array.ndim == 1 + bool(signal.axis) and array.shape[0] == self.num_tokens
            axes = ", ".join([str(self.num_tokens), *signal.axis])
            _require(good, self.trajectory_id, f"{signal.name} [{axes}]", list(array.shape))
            dtypes = f"{signal.name} of {' or '.join(signal.dtypes)}"
            _require(array.dtype.name in signal.dtypes, self.trajectory_id, dtypes, array.dtype)


def deal_by_cost(costs: Sequence[int], count: int) -> list[list[int]]:
    """Indices dealt to `count` hands of near-equal cost: dearest first, each to the cheapest hand.

    Deterministic (ties go to the lower index and the earlier hand); hands may be empty. No hand
    costs more than 4/3 of the best possible (Graham 1969, longest processing time first).
    """
    hands: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, hand) for hand in range(count)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, hand = loads[0]
        heapreplace(loads, (load + costs[index], hand))
        hands[hand].append(index)
    return hands


@dataclass(frozen=True, kw_only=True)
class TrajectoryChunk:
    """Trajectories of one stream that are scored together and learned from by one learner rank."""

    stream: Stream
    trajectories: tuple[Trajectory, ...]

    @classmethod
    def deal(
        cls, trajectories: Sequence[Trajectory], stream: Stream, count: int
    ) -> list[TrajectoryChunk]:
        """At most `count` chunks of near-equal numbers of tokens; empty chunks are left out."""
        hands = deal_by_cost([int(t.token_ids.size) for t in trajectories], count)
        return [
            cls(stream=stream, trajectories=tuple(trajectories[i] for i in hand))
            for hand in hands
            if hand
        ]

    @property
    def num_response_tokens(self) -> int:
        """Response tokens in the chunk."""
        return sum(trajectory.num_response_tokens for trajectory in self.trajectories)

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens in the chunk."""
        return sum(int(trajectory.token_ids.size) for trajectory in self.trajectories)


@dataclass(frozen=True)
class ScoredChunk:
    """A chunk with a reference to its targets.  Made by scoring, read by learner.

    targets: result of the scorer's call, a list of TeacherTargets in the chunk's order. It goes
    from scorer to learner without the driver; None where the objective asks nothing of the teacher.
    """

    chunk: TrajectoryChunk
    targets: Reference | None


@dataclass(frozen=True, kw_only=True)
class PoolActivity:
    """What the workers of one pool did in a stretch of time, and what they handed on in it.

    num_workers: mean over the stretch, since workers join and leave.  seconds: the stretch's.
    busy_, starved_, blocked_seconds: worker-seconds at work; idle with nothing to work on; idle
    because what comes after is full.  num_tokens, num_sequences: handed on.
    queued: items that waited before the pool at the stretch's end.
    """

    num_workers: float
    seconds: float
    busy_seconds: float = 0.0
    starved_seconds: float = 0.0
    blocked_seconds: float = 0.0
    num_tokens: int = 0
    num_sequences: int = 0
    queued: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            _require(value >= 0, "pool activity", f"{field.name} >= 0", value)
        parts = self.busy_seconds + self.starved_seconds + self.blocked_seconds
        most = self.worker_seconds
        expected = f"busy, starved and blocked seconds of at most {most} worker-seconds"
        _require(parts <= most * (1 + 1e-6) + 1e-6, "pool activity", expected, parts)

    @property
    def worker_seconds(self) -> float:
        """Seconds of all workers together."""
        return self.num_workers * self.seconds

    @property
    def busy_share(self) -> float:
        """Of the workers' time, 0..1; 0 where there was none."""
        return self._share(self.busy_seconds)

    @property
    def starved_share(self) -> float:
        """Of the workers' time, 0..1; 0 where there was none."""
        return self._share(self.starved_seconds)

    @property
    def blocked_share(self) -> float:
        """Of the workers' time, 0..1; 0 where there was none."""
        return self._share(self.blocked_seconds)

    def _share(self, part: float) -> float:
        return min(1.0, part / self.worker_seconds) if self.worker_seconds > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class EngineLoad:
    """What a generation engine has to do at a moment.  Made by rollout, read by observe.

    running, waiting: sequences that are being written, and those that wait for room.
    cache_use: of the key-value cache, 0..1; None for an engine whose cache has no fixed size.
    written_tokens: response tokens sampled since the engine was built.
    version: of the weights that it holds.
    """

    running: int
    waiting: int
    cache_use: float | None
    written_tokens: int
    version: int


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one learner step did.

    metrics: means over the global batch, keyed `learner/...`; the same on every rank.
    seconds, peak_memory_bytes: of this rank, since the step and since the process began.
    """

    step: int
    metrics: dict[str, float]
    num_response_tokens: int
    seconds: float
    peak_memory_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class WeightVersion:
    """A set of student weights that rollout workers now hold.

    digest: of its bytes, in [0, 2**56), verified by every worker (weights/digest.py).
    """

    version: int
    num_bytes: int
    digest: int
    seconds: float

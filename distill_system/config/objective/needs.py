"""What a teacher can say of a response token, and what an objective declares that it reads."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from distill_system.config.base import ConfigModel

StreamName = Literal["off_policy", "on_policy"]
RequiredSource = Literal["teacher", "preferences"]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
OpenShare = Annotated[float, Field(gt=0.0, lt=1.0)]


@dataclass(frozen=True, slots=True)
class Signal:
    """One array that travels from a teacher to the learner, one row a response token.

    name: the field of records.TeacherTargets; the learner's rows have the axes behind it.
    axis: of its columns: F teacher hidden size, E action-embedding size, K most likely tokens;
        empty for one number a token.
    dtypes: that it may travel in, the smallest first.
    need: the field of TeacherNeeds that asks for it.
    """

    name: str
    axis: Literal["", "F", "E", "K"]
    dtypes: tuple[Literal["float16", "float32", "int32"], ...]
    need: str

    @property
    def may_be_half(self) -> bool:
        """Whether it travels as float16 where the teacher computes in bfloat16."""
        return "float16" in self.dtypes


SIGNALS = (
    Signal("features", "F", ("float16", "float32"), "features"),
    Signal("expected_embedding", "E", ("float16", "float32"), "expected_embedding"),
    Signal("logprobs", "", ("float32",), "logprobs"),
    Signal("top_k_ids", "K", ("int32",), "top_k"),
    Signal("top_k_logprobs", "K", ("float32",), "top_k"),
)
"""All that a teacher can say. A new signal is a row here, a field of TeacherTargets and of the
learner's TeacherRows, and a line of the scorer that makes it."""


class TeacherNeeds(ConfigModel):
    """What an objective asks of the teacher at each token of a stream; a scorer makes no more."""

    features: bool = False
    """Final hidden states: from them the learner rebuilds the teacher's whole distribution."""
    expected_embedding: bool = False
    """sum_y pi*(y | s) e(y)."""
    logprobs: bool = False
    """log pi*(y_t | s_t) of the token written."""
    top_k: int = 0
    """The k most likely tokens and their log-probabilities."""

    def __or__(self, other: TeacherNeeds) -> TeacherNeeds:
        most = {name: max(getattr(self, name), wanted) for name, wanted in other}
        return TeacherNeeds(**most)

    @property
    def anything(self) -> bool:
        """Whether the teacher has to read the stream at all."""
        return self != NOTHING

    @property
    def signals(self) -> tuple[Signal, ...]:
        """What a scorer sends."""
        return tuple(signal for signal in SIGNALS if getattr(self, signal.need))

    def bytes_per_token(self, *, hidden: int, actions: int, half: bool) -> int:
        """What a scorer sends of one response token.

        hidden, actions: F and E, the columns of features and of expected embeddings.
        half: whether the teacher computes in bfloat16, so that these travel as float16.
        """
        columns: Mapping[str, int] = {"": 1, "F": hidden, "E": actions, "K": self.top_k}
        return sum(
            columns[signal.axis] * (2 if half and signal.may_be_half else 4)
            for signal in self.signals
        )


NOTHING = TeacherNeeds()
DISTRIBUTION = TeacherNeeds(features=True)
MOMENTS = TeacherNeeds(features=True, expected_embedding=True)
"""What both moment-matching distances are measured from, whatever the objective."""
HELD_OUT = MOMENTS | TeacherNeeds(top_k=16)
"""What is asked of the teacher on the student's held-out text: the tokens that it finds most likely
are compared with the student's, too."""


class ObjectiveModel(ConfigModel):
    """What every objective declares; the rest of the system knows no more of it than this."""

    type: str
    """Which objective it is."""

    @abstractmethod
    def reads(self, stream: StreamName) -> bool:
        """Whether a step brings this stream; one that has no weight is not brought."""

    @abstractmethod
    def teacher_needs(self, stream: StreamName) -> TeacherNeeds:
        """What the teacher is asked at each token of a stream that is read."""

    @property
    @abstractmethod
    def needs_teacher_distribution(self) -> bool:
        """Whether the learner rebuilds the teacher's whole distribution from its features."""

    @property
    def needs_source(self) -> RequiredSource | None:
        """The one source that the off-policy stream must have; None where any will do."""
        return None

    @property
    def pairs_streams(self) -> bool:
        """Whether both streams are to answer the same prompts in each step."""
        return False

    @property
    def refuses_data(self) -> str | None:
        """Why the off-policy text may not be rows of data; None where it may."""
        return None


class WeighsStreams(ObjectiveModel):
    """An objective whose loss is (1 - on_policy_weight) L_off + on_policy_weight L_on."""

    on_policy_weight: Share = 0.5
    """beta: weight of the on-policy loss; the off-policy loss has 1 - beta. 0 and 1 leave one
    stream out, which is then not read. Where a step brings one stream alone, because the objective
    has no loss on the other or because distill.replay takes them in turns, it counts 1 whatever
    beta is."""

    @abstractmethod
    def has_loss(self, stream: StreamName) -> bool:
        """Whether there is a loss on the stream, of whatever weight."""

    def weight(self, stream: StreamName) -> float:
        """What the stream counts in a step that brings both."""
        return self.on_policy_weight if stream == "on_policy" else 1.0 - self.on_policy_weight

    def reads(self, stream: StreamName) -> bool:
        """Whether the stream has a loss, and a weight or no other stream beside it."""
        other: StreamName = "off_policy" if stream == "on_policy" else "on_policy"
        return self.has_loss(stream) and (self.weight(stream) > 0 or not self.has_loss(other))

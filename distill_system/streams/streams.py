"""The two streams of a distillation, as the driver sees them: take, learn, publish.

`Streams` walks over prompts in a seeded order and counts what was fed. Two kinds of it bring
trajectories to the learner: in step with it (lockstep.py), or ahead of it within a bound
(streaming.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from distill_system.data import PromptFrontier, RunData, source_shares
from distill_system.records import PoolActivity, ScoredChunk, StepResult, Stream, Trajectory
from distill_system.rollout import Sampling
from distill_system.run.context import RunContext
from distill_system.run.pools import Pools
from distill_system.streams.off_policy import OffPolicyMixture


class Streams(ABC):
    """Both streams' prompts, and what the learner was fed of them.

    is_asynchronous: whether trajectories are written while the learner learns from earlier ones.
    """

    is_asynchronous: bool

    def __init__(self, context: RunContext, pools: Pools, data: RunData) -> None:
        self.context = context
        self.config = context.config
        self.pools = pools
        self.data = data
        shares = source_shares(data.prompts, self.config.data.prompt_weights)
        self.student = PromptFrontier(shares, self.config.seed, "student_prompts")
        self.mixture = OffPolicyMixture(self.config, data)
        self._sampled = {"student": 0, "teacher": 0}
        self._fed: dict[str, list[str]] = {}

    @abstractmethod
    def begin(self, step: int) -> None:
        """Let the pools work towards this step; every student worker holds version `step`."""

    @abstractmethod
    def take(self, step: int) -> Sequence[ScoredChunk]:
        """What this step learns from, once it is written and read by the teacher."""

    @abstractmethod
    def learn(self, step: int, scored: Sequence[ScoredChunk]) -> StepResult:
        """The step itself; the other pools go on meanwhile."""

    @abstractmethod
    def publish(self, version: int) -> None:
        """Send the student's new weights to its rollout workers."""

    @abstractmethod
    def wait_for_weight_sync(self) -> None:
        """Return once every student worker holds what was published last."""

    @abstractmethod
    def on_metrics(self, measured: Mapping[str, float]) -> None:
        """Take in what was measured on held-out data, where the schedule depends on it."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """The position from which the steps not yet learned from are fed again."""

    @abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a position that `state` returned."""

    @abstractmethod
    def release(self, pool: str, worker: int) -> bool:
        """Give this worker nothing more and take back what it has; True once it may be ended.

        Asked between `take` and `learn`, as is `welcome`.
        """

    @abstractmethod
    def welcome(self) -> None:
        """Workers have joined: let them take part, a student worker from the next publish on."""

    @abstractmethod
    def pop_activity(self) -> dict[str, PoolActivity]:
        """What every pool did since this was last asked."""

    def pop_counts(self) -> dict[str, float]:
        """Response tokens that each model sampled since this was last asked, as metrics."""
        counts, self._sampled = self._sampled, {"student": 0, "teacher": 0}
        return {f"sampled_tokens/{author}": float(count) for author, count in counts.items()}

    def pop_prompts(self) -> dict[str, list[str]]:
        """Prompt ids of each stream that was fed since this was last asked: one step's."""
        fed, self._fed = self._fed, {}
        return fed

    def _feed(self, stream: str, fed: Sequence[Trajectory]) -> Sequence[Trajectory]:
        self._fed.setdefault(stream, []).extend(trajectory.prompt_id for trajectory in fed)
        return fed

    def _count(self, author: str, written: Sequence[Trajectory]) -> Sequence[Trajectory]:
        self._sampled[author] += sum(trajectory.num_response_tokens for trajectory in written)
        return written

    def _sampling(self) -> Sampling:
        sampling = self.config.rollout.sampling
        return Sampling(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_response_tokens=sampling.max_response_tokens,
        )

    def _sequences(self, stream: Stream) -> int:
        return self.config.distill.sequences(stream.value)

"""Before the first step: do engine and torch read each model alike?

Every pool of engines writes a few tokens to a few prompts of the run, and the torch model that will
read its text, learner or scorer, says how likely it finds them. Where one of the two computes a
setting of config.json otherwise, reads other weights or rounds coarser than its precision allows,
everything that follows would be wrong and nothing would say so: the run ends here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from distill_system.config import RunConfig
from distill_system.data import RunData
from distill_system.errors import ModelError
from distill_system.records import Prompt, Trajectory
from distill_system.rollout import PendingRollouts, RolloutPool, Sampling
from distill_system.run.context import RunContext
from distill_system.run.model_checks import ModelFacts, read_facts
from distill_system.run.pools import Pools

LABEL = "start_check"
"""Of the samples' names and seeds: no text of the run has them."""

NUM_PROMPTS, MAX_RESPONSE_TOKENS, NUM_LOOKED_AT = 4, 16, 512
"""Prompts of a pool (more if it has more engines), tokens of a response, and the first prompts of
the run among which they are chosen by length."""


@dataclass(frozen=True, slots=True)
class GapLimits:
    """What rounding may make of |engine - torch| in nats: the tokens' median, and any of them.

    The median tells two readings of a model from one: another scale, rotation or mask moves most
    tokens. The largest finds what moves few, as a window does that only long prompts reach; it must
    leave room for unlikely tokens, whose logits lie farthest from the others.
    """

    median: float
    largest: float


LIMITS = {
    "float32": GapLimits(1e-3, 1e-2),
    "tf32": GapLimits(0.05, 1.0),
    "float16": GapLimits(0.05, 1.0),
    "bfloat16": GapLimits(0.3, 3.0),
}
"""By the coarser precision of the two.

float32 keeps 24 bits: sums in another order part log-probabilities by 1e-6 to 1e-4 nats, growing
with depth and with the spread of the logits (1.6e-5 in a pretrained model of 30 blocks).
bfloat16 keeps 8 bits: a logit between 16 and 32 is known to 1/8 at best, and the hidden states
before it have gone through as many roundings as there are layers; the same model parts by 0.13.
float16 keeps 11 bits: an eighth of bfloat16's errors. So does tf32, in which the attention of a
float32 engine may multiply on a GPU.
"""

_ORDER = tuple(LIMITS)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReading:
    """A pool's engines and the torch model that reads its text, on the same tokens.

    role: student, evaluation or teacher. path, facts: of the model. reader: learner or scorer, as a
    person is told. precision: the coarser of the two, a key of LIMITS. torch_logprobs: float32 [T]
    for each trajectory, nats, at temperature 1.
    """

    role: str
    path: str
    facts: ModelFacts
    reader: str
    precision: str
    trajectories: Sequence[Trajectory]
    torch_logprobs: Sequence[npt.NDArray[np.float32]]

    def gaps(self) -> npt.NDArray[np.float64]:
        """|engine - torch| of every token, nats, in the order of the trajectories, float64 [N]."""
        pairs = zip(self.trajectories, self.torch_logprobs, strict=True)
        return np.concatenate(
            [np.abs(t.behaviour_logprobs.astype(np.float64) - torch) for t, torch in pairs]
        )

    def metrics(self) -> dict[str, float]:
        """The median and the largest gap, under their metric names."""
        gaps = self.gaps()
        return {
            f"start_check/{self.role}_logprob_gap": float(np.median(gaps)),
            f"start_check/{self.role}_max_logprob_gap": float(gaps.max()),
        }

    def judge(self, allowed_mean: float | None = None) -> str:
        """A line for the person: both read alike.

        allowed_mean: rollout.max_logprob_gap, which widens both limits where it is the larger.
        Raises: ModelError where a gap is above its limit or no number.
        """
        gaps, limits = self.gaps(), LIMITS[self.precision]
        widened = max(1.0, (allowed_mean or 0.0) / limits.median)
        limits = GapLimits(limits.median * widened, limits.largest * widened)
        median, largest = float(np.median(gaps)), float(gaps.max())
        if median <= limits.median and largest <= limits.largest:  # a NaN is on neither side
            return (
                f"start check: engine and {self.reader} read the {self.role} alike: "
                f"{largest:.1e} nats apart at most, over {gaps.size} tokens{self._say_untested()}"
            )
        raise ModelError(
            f"start check: the {self.role}'s engine and its torch model, the {self.reader}, read "
            f"the same tokens differently: {self._say_worst(gaps)}. Over {gaps.size} tokens the "
            f"median difference is {median:.3g} nats and the largest {largest:.3g}; rounding in "
            f"{self.precision} explains {limits.median:.3g} and {limits.largest:.3g}. Nothing was "
            f"learned. A setting in config.json of {self.path!r} that vLLM and transformers "
            "compute differently is the usual cause (docs/models-and-data.md, One model, one "
            "reading): remove it, or choose another model. If the difference is the engine's "
            f"precision, raise {self._dtype_key}, or set rollout.max_logprob_gap to the mean that "
            "you accept"
        )

    def _say_untested(self) -> str:
        if self.facts.untested is None:
            return ""
        return (
            f"; model_type={self.facts.untested!r} is in no table of tested families and runs on "
            "this agreement, padded (docs/models-and-data.md)"
        )

    @property
    def _dtype_key(self) -> str:
        model = "teacher" if self.role == "teacher" else "student"
        return f"rollout.{model}_engine.dtype"

    def _say_worst(self, gaps: npt.NDArray[np.float64]) -> str:
        """The token on which they differ most: where it stands, and what each says of it."""
        at = int(np.nan_to_num(gaps, nan=np.inf).argmax())
        ends = np.cumsum([trajectory.num_response_tokens for trajectory in self.trajectories])
        which = int(np.searchsorted(ends, at, side="right"))
        trajectory, said = self.trajectories[which], self.torch_logprobs[which]
        place = at - int(ends[which]) + said.size
        position = trajectory.num_prompt_tokens + place
        return (
            f"token {trajectory.token_ids[position]} at position {position} of "
            f"{trajectory.prompt_id!r} (response token {place + 1} of {said.size}) has log-"
            f"probability {trajectory.behaviour_logprobs[place]:.6g} in the engine and "
            f"{said[place]:.6g} in torch"
        )


class StartCheck:
    """Compares every pool of engines with the torch model that reads its text."""

    def __init__(
        self,
        context: RunContext,
        pools: Pools,
        data: RunData,
        *,
        teacher_text: Sequence[Trajectory] = (),
    ) -> None:
        """teacher_text: what the teacher's engines wrote for this, where they have ended."""
        self.context = context
        self.pools = pools
        self.data = data
        self._teacher_text = teacher_text

    def run(self) -> dict[str, float]:
        """Write, read, compare; shows a line per pool and returns the gaps as metrics.

        The engines hold the learner's weights. Nothing that the run writes or learns later depends
        on it: the samples have seeds of their own and are forgotten.
        Raises: ModelError where two readings differ by more than rounding.
        """
        started, metrics = time.perf_counter(), dict[str, float]()
        config = self.context.config
        for reading in self._readings():
            line = reading.judge(config.rollout.max_logprob_gap)
            seconds = time.perf_counter() - started
            self.context.view.note(f"{line} ({seconds:.1f} s since the check began)")
            metrics |= reading.metrics()
        return metrics

    def _readings(self) -> Iterator[EngineReading]:
        pools = {"student": self.pools.students}
        if self.pools.evaluation is not self.pools.students:
            pools["evaluation"] = self.pools.evaluation
        if self.pools.scorers.workers.count:  # or nobody reads the teacher's
            pools["teacher"] = self.pools.teachers
        # All engines write at the same time; what is left to wait for is the slowest.
        pending = {
            role: start_writing(pool, self.context.config, self.data)
            for role, pool in pools.items()
            if pool.workers.count
        }
        for role, calls in pending.items():
            yield self._read(role, pools[role].finish(calls))
        if self._teacher_text:
            yield self._read("teacher", self._teacher_text)

    def _read(self, role: str, written: Sequence[Trajectory]) -> EngineReading:
        is_teacher = role == "teacher"
        if is_teacher:
            written = [each.as_teacher_reads for each in written]
        read = self.pools.scorers if is_teacher else self.pools.learner
        path = self.context.teacher_path if is_teacher else self.context.student_path
        config = self.context.config
        trust = (config.teacher if is_teacher else config.student).trust_remote_code
        facts = read_facts(path, trust_remote_code=trust)
        return EngineReading(
            role=role,
            path=path,
            facts=facts,
            reader="scorer" if is_teacher else "learner",
            precision=find_precision(config, role, is_quantised=facts.is_quantised),
            trajectories=written,
            torch_logprobs=read.read_logprobs(written),
        )


def start_writing(pool: RolloutPool, config: RunConfig, data: RunData) -> PendingRollouts:
    """Let every engine of a pool write a few tokens."""
    longest = min(MAX_RESPONSE_TOKENS, config.rollout.sampling.max_response_tokens)
    sampling = Sampling(temperature=1.0, top_p=1.0, max_response_tokens=longest)
    prompts = choose_by_length(data.prompts, max(NUM_PROMPTS, pool.workers.count))
    return pool.start(prompts, sampling, config.seed, LABEL)


def find_precision(config: RunConfig, role: str, *, is_quantised: bool = False) -> str:
    """The coarser precision of a role's engine and of its torch reader, a key of LIMITS.

    is_quantised: each of the two unpacks the weights in its own way, to bfloat16 or finer.
    """
    if is_quantised:
        return _ORDER[-1]
    if role == "teacher":
        engine, reader = config.rollout.teacher_engine.dtype, config.scoring.dtype
    else:
        engine, reader = config.rollout.student_engine.dtype, config.learner.compute_dtype
    pool = config.pools.by_name["evaluation" if role == "evaluation" else f"{role}_rollout"]
    in_fact = "tf32" if pool.gpus > 0 and engine == "float32" else engine
    return max(in_fact, reader, key=_ORDER.index)


def choose_by_length(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """So many of the first prompts, or all if there are fewer: the shortest, the longest and evenly
    spaced ones between, so that what only long texts show is seen too."""
    looked_at = sorted(islice(prompts, NUM_LOOKED_AT), key=lambda prompt: prompt.token_ids.size)
    places = np.linspace(0, len(looked_at) - 1, min(count, len(looked_at))).round().astype(int)
    return [looked_at[place] for place in places]

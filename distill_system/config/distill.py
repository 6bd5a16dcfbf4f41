"""Configuration of the distillation: objective, streams, staleness, optimizer, measurements."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from distill_system.config.base import ConfigModel
from distill_system.config.model import FullUpdate, OptimizerConfig, UpdateConfig
from distill_system.config.objective import AmmdConfig, ObjectiveConfig, StreamName

OffPolicySource = Literal["teacher", "store", "dataset", "preferences"]
"""Sources of the off-policy stream, in the order in which several take turns."""


Factor = Annotated[float, Field(gt=0.0, lt=1.0)]
"""Of a reference, below which a figure is too low."""


def _check_metric(name: str) -> str:
    if not re.fullmatch(r"(held_out|evaluation)/.+", name):
        raise ValueError(
            "expected the name of a metric that begins with held_out/ or evaluation/, such as "
            f"held_out/cross_entropy or evaluation/test/rouge_l_greedy, got {name!r}"
        )
    return name


HeldOutMetric = Annotated[str, AfterValidator(_check_metric)]
"""Name of a metric that is measured on data which nothing was learned from."""


class ReplayConfig(ConfigModel):
    """DistiLLM's adaptive schedule (arXiv 2402.03898): each step learns from rows of data or from
    the student's text; the student's share grows as the held-out loss rises, and its text is used
    again."""

    capacity: PositiveInt = 1000
    """Student trajectories that are kept; the oldest are dropped first."""
    initial_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Probability that a step learns from the student's text, at the beginning."""
    increase: PositiveFloat = 0.1
    """What a rise of the held-out loss adds to that probability."""
    tolerance: NonNegativeFloat = 0.1
    """A rise of the held-out loss up to this, in nats per token, counts as none."""


class BestConfig(ConfigModel):
    """Which checkpoints are kept besides the newest ones: the best by a metric of held-out data."""

    metric: HeldOutMetric
    """Name of the metric, as in docs/metrics.md; a checkpoint's value is the last that was measured
    before it."""
    mode: Literal["min", "max"]
    """Whether lower or higher values are better."""
    count: PositiveInt = 1
    """How many are kept."""


class EarlyStoppingConfig(ConfigModel):
    """When a distillation ends before distill.steps: a metric of held-out data no longer gets
    better. The run then ends as after its last step, with the evaluation and the export."""

    metric: HeldOutMetric
    """Name of the metric, as in docs/metrics.md."""
    mode: Literal["min", "max"]
    """Whether lower or higher values are better."""
    patience: PositiveInt
    """Measurements of the metric in a row without a gain after which the run ends."""
    min_gain: NonNegativeFloat = 0.0
    """A measurement counts as better if it is so by more than this, in the metric's unit."""


class StalenessConfig(ConfigModel):
    """How far the student's text may lag behind the student that learns from it."""

    max_staleness: NonNegativeInt = 0
    """Most weight versions between the oldest token of a trajectory and the student that learns
    from it. 0: synchronous; the pools take turns, and a run is reproducible bit for bit. S > 0:
    asynchronous; up to S + 1 batches are under way, and a pool waits only at that limit."""
    too_old: Literal["wait", "reissue", "weigh"] = "wait"
    """wait: a step learns from its own prompts, in the order in which they were given out, and
    waits for the last of them, so that nothing gets too old. reissue: a step learns from the
    trajectories that are finished; one that is too old is dropped, and its prompt given out once
    more. weigh: as reissue, but a step also learns from what is too old, by importance weights."""
    importance: Literal["none", "token", "state"] = "none"
    """Weight of a token in the on-policy loss. none: 1; the ratios are only reported. token: the
    ratio of the student's probability of the token to its probability when it was sampled. state:
    the product of the ratios of the tokens before it."""
    importance_cap: Annotated[float, Field(ge=1.0)] = 2.0
    """Largest importance weight."""
    tokens_per_step: PositiveInt | None = None
    """Response tokens that a step should learn from. If its own sequences have fewer, it also takes
    finished trajectories of the student that the next step would learn from. null: only its own."""
    min_on_policy_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """A step may start with this share of its on-policy sequences if the others are late;
    off-policy sequences take their place. Both losses are means over their own tokens, so that
    their weights keep their meaning."""

    @model_validator(mode="after")
    def _check(self) -> StalenessConfig:
        if self.too_old == "weigh" and self.importance == "none":
            raise ValueError(
                "too_old=weigh learns from what is too old by importance weights: expected "
                "importance=token or importance=state, got none"
            )
        others = (self.too_old, self.importance, self.min_on_policy_share, self.tokens_per_step)
        if self.max_staleness == 0 and others != ("wait", "none", 1.0, None):
            raise ValueError(
                "max_staleness=0 waits for everything, so that nothing is too old, weighted or "
                "left for later: expected too_old=wait, importance=none, min_on_policy_share=1 "
                f"and tokens_per_step=null, got {others}"
            )
        if self.tokens_per_step is not None and self.too_old == "wait":
            raise ValueError(
                "tokens_per_step takes in the next step's sequences, which too_old=wait ties to "
                "their step: expected too_old=reissue or too_old=weigh"
            )
        if self.min_on_policy_share < 1.0 and self.too_old == "wait":
            raise ValueError(
                "min_on_policy_share lets a step go on without late sequences, which are then "
                "too old for too_old=wait: expected too_old=reissue or too_old=weigh"
            )
        return self


class CollapseConfig(ConfigModel):
    """When the student's text is said to collapse, and what follows. Each limit is a factor: the
    mean over the last window of steps is out of it where it has left both the mean over the run's
    first window and the teacher's own text of the same steps (where the teacher writes) by more
    than that. null does not judge."""

    action: Literal["note", "alarm", "stop"] = "note"
    """note: a line when it begins. alarm: the line again after every window while it lasts. stop:
    the run writes a checkpoint and ends with an error."""
    window: PositiveInt = 20
    """Steps whose mean is judged, and first steps that it is held against. Of what is measured on
    data.held_out alone, the mean of two measurements is held against the one before step 0."""
    min_length: Factor | None = 0.4
    """Of the mean length of the student's responses."""
    max_length: Annotated[float, Field(gt=1.0)] | None = 2.5
    """Of the mean length of the student's responses."""
    min_ended_share: Factor | None = 0.6
    """Of the share of responses that end by themselves."""
    min_entropy: Factor | None = 0.2
    """Of the entropy of the student's text, estimated by the log-probabilities that it was sampled
    with."""
    max_entropy: Annotated[float, Field(gt=1.0)] | None = 3.0
    """Of the same."""
    min_distinct: Factor | None = 0.5
    """Of the share of different trigrams in the student's text of a step."""
    min_overlap: Factor | None = 0.6
    """Of the share of the 16 most likely tokens that student and teacher have in common, on the
    student's held-out text (arXiv 2604.13016)."""


class LanguageModelConfig(ConfigModel):
    """Next-token loss on plain text, added to the objective's in every step: what MiniLLM (arXiv
    2306.08543) adds on a pre-training corpus. The text is data.plain_text."""

    weight: NonNegativeFloat = 1.0
    """Times this, the mean cross-entropy of the text's tokens is added; 0 reads no text."""
    sequences_per_step: PositiveInt = 8
    """Texts, or pieces of long ones, in each step."""


class DistillConfig(ConfigModel):
    """The distillation: objective, streams, optimizer, measurements and checkpoints."""

    steps: PositiveInt
    """Learner steps."""
    student_prompts_per_step: NonNegativeInt = 32
    """Prompts the student answers in each step (the on-policy stream). A stream that the objective
    does not read gives its number to the other, so that objectives compare at equal batch sizes."""
    teacher_prompts_per_step: NonNegativeInt = 32
    """Sequences of the off-policy stream in each step: prompts the teacher answers, or rows."""
    off_policy_source: OffPolicySource | dict[OffPolicySource, PositiveFloat] = "teacher"
    """Source of the off-policy stream. teacher: the teacher generates it during the run. store: the
    samples of data.trajectory_store. dataset: the rows of data.student_sft. preferences: the pairs
    of data.preferences, for objective.type=preference alone. Several by weights:
    {teacher: 1, store: 3} takes a quarter of the sequences from the teacher."""
    staleness: StalenessConfig = StalenessConfig()
    replay: ReplayConfig | None = None
    """Learn from one stream a step, and from the student's earlier text again; null learns from
    every stream in every step."""
    objective: ObjectiveConfig = AmmdConfig()
    """What the student learns to match, and on which of the two streams."""
    language_model: LanguageModelConfig | None = None
    """A loss on plain text beside the objective's; null adds none."""
    update: UpdateConfig = FullUpdate()
    """Which weights of the student are trained: all, or adapters."""
    action_dimension: PositiveInt | None = 256
    """Most dimensions of an action embedding that critics see. Wider ones are projected onto a
    fixed random subspace: a smaller class of critics, for less computation, memory and transfer.
    null: no projection. Applies to the game and to the measured distances."""
    optimizer: OptimizerConfig
    measure_every: PositiveInt | None = 25
    """Steps between measurements of both distances on data.held_out. null: nothing is measured
    there, and neither the teacher's engines nor its scorers are started for it; a teacher that
    writes for no step is not evaluated either."""
    evaluate_every: PositiveInt | Literal["epoch"] | None = None
    """Steps between evaluations during training, a multiple of measure_every. epoch: at the end of
    every pass over data.prompts, by the student, or by the teacher where the student does not
    write. null: only before and after."""
    checkpoint_every: PositiveInt = 100
    """Steps between checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """How many of the newest checkpoints are kept on disk."""
    keep_best: BestConfig | None = None
    """Checkpoints that are kept besides them; null keeps only the newest."""
    early_stopping: EarlyStoppingConfig | None = None
    """End before distill.steps once a held-out metric no longer gets better; null never does."""
    collapse: CollapseConfig = CollapseConfig()
    """What is said, or done, where the student's text collapses."""

    @field_validator("off_policy_source", mode="before")
    @classmethod
    def _check_source(cls, given: Any) -> Any:
        """Checked before pydantic, whose message would describe each alternative separately."""
        weights = (
            given if isinstance(given, dict) else {given: 1.0} if isinstance(given, str) else {}
        )
        if not weights or not all(_is_weighted(*item) for item in weights.items()):
            raise ValueError(
                "expected 'teacher', 'store', 'dataset' or 'preferences', or weights > 0 of some "
                f"of them such as {{teacher: 1, store: 3}}, got {given!r}"
            )
        return given

    @model_validator(mode="after")
    def _check(self) -> DistillConfig:
        if isinstance(self.evaluate_every, int) and self.evaluate_every % (self.measure_every or 1):
            raise ValueError(
                "evaluate_every must be a multiple of measure_every, got "
                f"{self.evaluate_every} and {self.measure_every}"
            )
        for stream in ("on_policy", "off_policy"):
            if self.objective.reads(stream) and self.sequences(stream) == 0:
                raise ValueError(
                    f"objective.type={self.objective.type} reads the {stream} stream: expected "
                    f"{'student' if stream == 'on_policy' else 'teacher'}_prompts_per_step > 0, "
                    "got 0"
                )
        sources = tuple(self.off_policy_mixture)
        if "dataset" in sources and self.objective.refuses_data is not None:
            raise ValueError(
                f"{self.objective.refuses_data}: expected off_policy_source without dataset, got "
                f"{self.off_policy_source}"
            )
        self._check_pairs()
        if self.replay is not None and self.staleness.max_staleness > 0:
            raise ValueError(
                "replay chooses the stream of each step as it begins, the streams may not run "
                "ahead: expected staleness.max_staleness=0, got "
                f"{self.staleness.max_staleness}"
            )
        if self.replay is not None and self.measure_every is None:
            raise ValueError(
                "replay follows the loss on data.held_out: expected measure_every > 0, got null"
            )
        both = self.objective.reads("on_policy") and self.objective.reads("off_policy")
        if self.replay is not None and not (both and sources == ("dataset",)):
            raise ValueError(
                "replay chooses between rows of data and the student's text: expected an objective "
                "that reads both streams and off_policy_source=dataset, got "
                f"objective.type={self.objective.type}, off_policy_source={self.off_policy_source}"
            )
        return self

    def _check_pairs(self) -> None:
        """What an objective on pairs asks of the streams."""
        objective, needed, sources = (
            self.objective,
            self.objective.needs_source,
            self.off_policy_mixture,
        )
        if needed is None and "preferences" in sources:
            raise ValueError(
                "off_policy_source=preferences brings pairs: expected objective={type: preference, "
                f"pairs: data}}, got objective.type={objective.type}"
            )
        if needed is None:
            return
        if tuple(sources) != (needed,):
            raise ValueError(
                f"objective.type={objective.type} with these pairs reads one source: expected "
                f"off_policy_source={needed}, got {self.off_policy_source}"
            )
        better, other = self.teacher_prompts_per_step, self.student_prompts_per_step
        if objective.pairs_streams and better != other:
            raise ValueError(
                "objective.pairs=teacher_over_student has an answer of each to every prompt: "
                f"expected teacher_prompts_per_step={other}, as many as the student's, got {better}"
            )
        if not objective.pairs_streams and self.sequences("off_policy") % 2:
            raise ValueError(
                "objective.pairs=data reads two sequences a pair: expected an even sum of "
                f"teacher_prompts_per_step and student_prompts_per_step, got {better + other}"
            )
        late = self.staleness
        if late.max_staleness > 0 and not objective.pairs_streams:
            raise ValueError(
                "objective.pairs=data learns from rows alone, which do not age: expected "
                f"staleness.max_staleness=0, got {late.max_staleness}"
            )
        if (late.too_old, late.importance) != ("wait", "none"):
            raise ValueError(
                "objective.type=preference needs both answers to a prompt in one step and weighs "
                f"none: expected staleness.too_old=wait and importance=none, got {late.too_old} "
                f"and {late.importance}"
            )

    @property
    def off_policy_mixture(self) -> dict[OffPolicySource, float]:
        """Each source of the off-policy stream with its share; shares sum to 1."""
        given = self.off_policy_source
        weights = given if isinstance(given, dict) else {given: 1.0}
        total = sum(weights.values())
        return {
            source: weights[source] / total
            for source in get_args(OffPolicySource)
            if source in weights
        }

    @property
    def plain_text_sequences(self) -> int:
        """Sequences of plain text in each step; 0 where no loss reads them."""
        own = self.language_model
        return own.sequences_per_step if own is not None and own.weight > 0 else 0

    def evaluates_after(self, done: int, *, num_prompts: int) -> bool:
        """Whether evaluate_every asks for an evaluation after so many steps.

        An epoch is a pass over num_prompts by the student, or by the teacher if it writes alone.
        """
        if self.evaluate_every == "epoch":
            count = self.sequences("on_policy") or self.sequences("off_policy")
            return done * count // num_prompts > (done - 1) * count // num_prompts
        return self.evaluate_every is not None and done % self.evaluate_every == 0

    def sequences(self, stream: StreamName) -> int:
        """Sequences of a stream in each step.

        A stream that the objective does not read gives its number to the other. With replay each
        step reads one of the two streams, which then has the number of both.
        """
        own = {
            "on_policy": self.student_prompts_per_step,
            "off_policy": self.teacher_prompts_per_step,
        }
        if not self.objective.reads(stream):
            return 0
        alone = not (self.objective.reads("on_policy") and self.objective.reads("off_policy"))
        return sum(own.values()) if alone or self.replay is not None else own[stream]


def _is_weighted(source: object, weight: Any) -> bool:
    """Whether this is a source's name with a finite weight > 0."""
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    known = isinstance(source, str) and source in get_args(OffPolicySource)
    return known and is_number and math.isfinite(weight) and weight > 0

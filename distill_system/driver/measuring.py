"""Scores of a model's generations, and both moment-matching distances on held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from distill_system.config import RunConfig
from distill_system.config.evaluation import MetricName
from distill_system.config.objective import HELD_OUT, MOMENTS
from distill_system.data import RunData
from distill_system.driver.engine_drift import EngineDrift
from distill_system.errors import TransferError
from distill_system.evaluation import SplitEvaluation, evaluate_splits
from distill_system.observe import write_evaluation
from distill_system.records import (
    OBJECTIVE_STREAMS,
    FloatArray,
    Prompt,
    ScoredChunk,
    Stream,
    Trajectory,
)
from distill_system.rollout import RolloutPool, Sampling
from distill_system.run.context import RunContext
from distill_system.run.pools import Pools
from distill_system.weights import GapAlarm, explain_gap

STEP_GAP = "learner/logprob_gap"
"""The metric of a step that its alarm reads; left out where no text of the step tells."""


def score_splits(
    pool: RolloutPool,
    splits: Mapping[str, Sequence[Prompt]],
    config: RunConfig,
    tokenizer: Any,
    *,
    metrics: Sequence[MetricName],
) -> dict[str, SplitEvaluation]:
    """Let a pool's model answer every split's prompts, greedily and by sampling; score them.

    tokenizer: a transformers tokenizer.  Raises: as evaluate_splits does.
    """

    def generate(prompts: Sequence[Prompt], temperature: float, label: str) -> list[Trajectory]:
        longest = config.rollout.sampling.max_response_tokens
        sampling = Sampling(temperature=temperature, top_p=1.0, max_response_tokens=longest)
        return pool.generate(prompts, sampling, config.seed, f"evaluation_{label}")

    def decode(token_ids: Sequence[int]) -> str:
        return str(tokenizer.decode(token_ids, skip_special_tokens=True))

    wanted = config.evaluation
    return evaluate_splits(
        splits,
        generate,
        decode,
        metrics,
        wanted.num_shown,
        rouge=wanted.rouge,
        bleu=wanted.bleu,
    )


def _mean_logprob(scored: Sequence[ScoredChunk]) -> float:
    """Mean log-probability per response token that the text's own author gave it, in nats."""
    trajectories = [t for part in scored for t in part.chunk.trajectories]
    total = sum(float(t.behaviour_logprobs.sum(dtype=np.float64)) for t in trajectories)
    return total / sum(t.num_response_tokens for t in trajectories)


class Evaluating:
    """Lets a pool's model answer, and writes down how well it did."""

    def __init__(
        self, context: RunContext, data: RunData, *, metrics: Sequence[MetricName] | None = None
    ) -> None:
        self.context = context
        self.data = data
        self.metrics = context.config.evaluation.metrics if metrics is None else metrics

    def evaluate_teacher_of(self, pool: RolloutPool, *, again: bool = False) -> None:
        """Write evaluations/teacher.json unless it stands.  again: even if it does."""
        if again or not self.context.run.evaluation_path("teacher").exists():
            splits = self.evaluate(pool, self.data.evaluation)
            self.write("teacher", step=0, version=None, splits=splits, distances=None)

    def evaluate(
        self, pool: RolloutPool, splits: Mapping[str, Sequence[Prompt]]
    ) -> dict[str, SplitEvaluation]:
        """The scores of a pool's model."""
        config, tokenizer = self.context.config, self.context.tokenizer
        return score_splits(pool, splits, config, tokenizer, metrics=self.metrics)

    def write_held_out(self, pool: RolloutPool) -> list[Trajectory]:
        """Text to measure on: the same prompts and seeds each time, so that a distance moves with
        the weights alone."""
        config = self.context.config
        longest = config.rollout.sampling.max_response_tokens
        sampling = Sampling(temperature=1.0, top_p=1.0, max_response_tokens=longest)
        return pool.generate(self.data.held_out, sampling, config.seed, "held_out")

    def write(
        self,
        label: str,
        *,
        step: int,
        version: int | None,
        splits: Mapping[str, SplitEvaluation],
        distances: Mapping[str, float] | None,
    ) -> None:
        """Write evaluations/<label>.json.  version: of the student; None for the teacher."""
        write_evaluation(
            self.context.run,
            label,
            step=step,
            weight_version=version,
            weights=self._describe_weights(is_student=version is not None),
            splits=splits,
            distances=distances,
            writes=self.context.writes,
        )

    def _describe_weights(self, *, is_student: bool) -> dict[str, str]:
        """In which precision an engine held the weights that were evaluated."""
        config = self.context.config
        if is_student:
            return {"dtype": config.rollout.student_engine.dtype, "rounding": config.rounding}
        dtype = config.rollout.teacher_engine.dtype  # read from the teacher's own files
        return {"dtype": dtype, "rounding": "none" if dtype == "float32" else "nearest"}


class Measuring(Evaluating):
    """Evaluates through the run's own pools; the teacher's held-out part is made once.

    teacher_text: what its engines wrote of it, where they have ended.
    """

    def __init__(
        self,
        context: RunContext,
        pools: Pools,
        data: RunData,
        *,
        metrics: Sequence[MetricName] | None = None,
        drift: EngineDrift | None = None,
        teacher_text: Sequence[Trajectory] = (),
    ) -> None:
        super().__init__(context, data, metrics=metrics)
        self.pools = pools
        self._drift = drift
        self._teacher_text = teacher_text
        self._teacher_held_out: list[ScoredChunk] = []
        self._teacher_losses: dict[str, float] = {}
        self._held_out_alarm = _make_alarm(context.config, "held-out prompts")
        self._step_alarm = _make_alarm(context.config, "text of the step")

    def measure_distances(self) -> dict[str, float]:
        """d_on, d_off, cross-entropy and forward KL of the student as it is now, by their names.

        The KL is estimated on the text that the teacher sampled: the cross-entropy there, less the
        teacher's own. Empty where nothing is measured (distill.measure_every=null).
        """
        if self.context.config.distill.measure_every is None:
            return {}
        distances = self._measure_held_out()
        try:
            self._judge_held_out(distances)
        except TransferError as error:
            self._mend(error)
            distances = self._measure_held_out()
            self._judge_held_out(distances)
        return {f"held_out/{name}": value for name, value in distances.items()}

    def _measure_held_out(self) -> dict[str, float]:
        if not self._teacher_held_out:
            written = self._teacher_text or self.write_held_out(self.pools.teachers)
            self._teacher_held_out = self._score(written, Stream.OFF_POLICY)
        student_held_out = self._score(self.write_held_out(self.pools.evaluation), Stream.ON_POLICY)
        distances = self.pools.learner.measure([*self._teacher_held_out, *student_held_out])
        own = _mean_logprob(self._teacher_held_out)
        return {**distances, "forward_kl": distances["cross_entropy"] + own}

    def _judge_held_out(self, distances: Mapping[str, float]) -> None:
        gap, largest = distances["logprob_gap"], distances["max_logprob_gap"]
        self._tell(self._held_out_alarm.judge(gap, largest))

    def _mend(self, error: TransferError) -> None:
        if self._drift is None:
            raise error
        self._drift.mend(error)

    def check_step(self, metrics: Mapping[str, float]) -> None:
        """Tell of engines that wrote a step's text with other weights than the learner's, or mend
        them.

        metrics: the step's.  Raises: TransferError where nothing replaces a worker.
        """
        gap = metrics.get(STEP_GAP)
        # Truncated sampling says another number of each token than the whole distribution does.
        if gap is not None and self.context.config.rollout.sampling.can_be_read_again:
            try:
                self._tell(self._step_alarm.judge(gap))
            except TransferError as error:
                self._mend(error)

    def _tell(self, note: str | None) -> None:
        if note is not None:
            self.context.view.note(note)

    def measure_sources(self) -> dict[str, float]:
        """Perplexity of the student over the teacher's on the held-out rows of each source."""
        rows, theirs = self.data.source_held_out, self._teacher_losses
        for name in rows.keys() - theirs.keys():
            theirs[name] = self._loss(self.pools.scorers.read_logprobs, rows[name])
        read = self.pools.learner.read_logprobs
        return {name: math.exp(self._loss(read, rows[name]) - theirs[name]) for name in rows}

    def _loss(
        self,
        read: Callable[[Sequence[Trajectory]], Sequence[FloatArray]],
        rows: Sequence[Trajectory],
    ) -> float:
        """Mean cross-entropy per token, nats; as many rows at once as a step has."""
        distill = self.context.config.distill
        count = distill.student_prompts_per_step + distill.teacher_prompts_per_step
        parts = [each for at in range(0, len(rows), count) for each in read(rows[at : at + count])]
        total = sum(float(each.sum(dtype=np.float64)) for each in parts)
        return -total / sum(each.size for each in parts)

    def evaluate_teacher(self, *, again: bool = False) -> None:
        """See evaluate_teacher_of; engines that are not there now have been evaluated, or are not
        asked."""
        if self.pools.teachers.workers.count:
            self.evaluate_teacher_of(self.pools.teachers, again=again)

    def evaluate_student(
        self, label: str, *, step: int, num_examples: int | None = None
    ) -> dict[str, float]:
        """Write evaluations/<label>.json; returns its figures as metrics.

        num_examples: the first so many of each split; None takes all.
        """
        chosen = {name: split[:num_examples] for name, split in self.data.evaluation.items()}
        splits = self.evaluate(self.pools.evaluation, chosen)
        distances = self.measure_distances()
        self.write(
            label,
            step=step,
            version=step,
            splits=splits,
            distances=_recorded(distances) if distances else None,
        )
        scores = {
            f"evaluation/{split}/{metric}": estimate.mean
            for split, evaluation in splits.items()
            for metric, estimate in evaluation.scores.items()
        }
        return scores | distances

    def _score(self, trajectories: Sequence[Trajectory], stream: Stream) -> list[ScoredChunk]:
        ranks = self.context.config.pools.learner.count
        needs = HELD_OUT if stream is Stream.ON_POLICY else MOMENTS
        return self.pools.scorers.score(trajectories, stream, needs=needs, num_shares=ranks)


def _recorded(distances: Mapping[str, float]) -> dict[str, float]:
    """Of what was measured, what an evaluation keeps, under its names there."""
    losses = {name: distances[f"held_out/{name}"] for name in ("cross_entropy", "forward_kl")}
    return losses | {str(s): distances[f"held_out/{s}_distance"] for s in OBJECTIVE_STREAMS}


def _make_alarm(config: RunConfig, text: str) -> GapAlarm:
    engine, learner = config.rollout.student_engine.dtype, config.learner.compute_dtype
    return GapAlarm(
        text,
        limit=config.rollout.max_logprob_gap,
        lower_precision={engine, learner} != {"float32"},
        cause=explain_gap(engine=engine, rounding=config.rounding, learner=learner),
    )

"""A run's configuration and its models' shapes in -> what each kind of worker holds and reads.

Every prompt and every response is taken at its limit, so what comes out is the most that a step can
bring; real sequences are shorter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from distill_system.config.distill import StalenessConfig
from distill_system.config.model import (
    FullUpdate,
    LearnerConfig,
    LoraUpdate,
    OptimizerConfig,
    SupervisedConfig,
)
from distill_system.config.objective import ObjectiveConfig, TeacherNeeds
from distill_system.config.run import RunConfig
from distill_system.planning.shapes import ModelShape
from distill_system.records import (
    OBJECTIVE_STREAMS,
    Author,
    Finish,
    Stream,
    Trajectory,
    TrajectoryChunk,
    VersionSpan,
)

NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerLoad:
    """What one learner rank holds and reads.

    chunks: of the rank's step. objective, teacher: None in supervised fine-tuning.
    action_columns: of the action embeddings. teacher_dtype: in which the scorers multiply.
    sets_aside: it computes with its engines' weights, and keeps its own beside them.
    """

    student: ModelShape
    config: LearnerConfig
    optimizer: OptimizerConfig
    chunks: Sequence[TrajectoryChunk]
    num_ranks: int = 1
    on_gpu: bool = False
    update: FullUpdate | LoraUpdate = field(default_factory=FullUpdate)
    staleness: StalenessConfig = field(default_factory=StalenessConfig)
    objective: ObjectiveConfig | None = None
    teacher: ModelShape | None = None
    action_columns: int = 0
    teacher_dtype: str = "float32"
    sets_aside: bool = False


def longest_sequence(config: RunConfig) -> int:
    """Tokens of a prompt and a response at their limits."""
    return config.max_model_length


def streams_read(config: RunConfig) -> list[Stream]:
    """The streams that the objective reads."""
    return [stream for stream in OBJECTIVE_STREAMS if config.distill.sequences(stream.side)]


def dealt_sequences(config: RunConfig) -> dict[Stream, int]:
    """Of each stream on the fullest learner rank: they are dealt as evenly as they go."""
    ranks = config.pools.learner.count
    return {s: -(-config.distill.sequences(s.side) // ranks) for s in streams_read(config)}


def _learned_sequences(config: RunConfig) -> dict[Stream, int]:
    """With plain text, which no teacher reads."""
    texts = -(-config.distill.plain_text_sequences // config.pools.learner.count)
    return dealt_sequences(config) | ({Stream.PLAIN_TEXT: texts} if texts else {})


def make_chunks(config: RunConfig, sequences: Mapping[Stream, int]) -> list[TrajectoryChunk]:
    """So many trajectories of each stream, at their limits."""
    return [
        TrajectoryChunk(stream=stream, trajectories=(_longest_of(config, stream),) * count)
        for stream, count in sequences.items()
    ]


def _longest_of(config: RunConfig, stream: Stream) -> Trajectory:
    if stream is Stream.PLAIN_TEXT:
        prompt, response = 1, longest_sequence(config) - 1
    else:
        prompt = config.data.max_prompt_tokens
        response = config.rollout.sampling.longest(stream.side)
    return Trajectory(
        trajectory_id="any",
        prompt_id="any",
        author=Author.STUDENT,
        token_ids=np.zeros(prompt + response, dtype=np.int32),
        num_prompt_tokens=prompt,
        behaviour_logprobs=np.zeros(response, dtype=np.float32),
        temperature=1.0,
        finish=Finish.STOP,
        weight_versions=(VersionSpan(version=0, start=0, end=response),),
    )


def teacher_needs(config: RunConfig) -> TeacherNeeds:
    """What the teacher is asked for at a token, of all streams together."""
    needs = TeacherNeeds()
    for stream in streams_read(config):
        needs = needs | config.distill.objective.teacher_needs(stream.side)
    return needs


def action_columns(config: RunConfig, teacher: ModelShape) -> int:
    """R: of the action embeddings that learner and scorers hold."""
    most = config.distill.action_dimension
    return teacher.embedding_size if most is None else min(most, teacher.embedding_size)


def distillation_load(config: RunConfig, student: ModelShape, teacher: ModelShape) -> LearnerLoad:
    """One learner rank of the distillation."""
    pool, distill = config.pools.learner, config.distill
    return LearnerLoad(
        student=student,
        config=config.learner,
        optimizer=distill.optimizer,
        chunks=make_chunks(config, _learned_sequences(config)),
        num_ranks=pool.count,
        on_gpu=pool.gpus > 0,
        update=distill.update,
        staleness=distill.staleness,
        objective=distill.objective,
        teacher=teacher,
        action_columns=action_columns(config, teacher),
        teacher_dtype=config.scoring.dtype,
        sets_aside=config.learner.compute_dtype == "bfloat16"
        and config.rounding == "stochastic"
        and isinstance(distill.update, FullUpdate),
    )


def supervised_load(config: RunConfig, shape: ModelShape, sft: SupervisedConfig) -> LearnerLoad:
    """One learner rank of a model's supervised fine-tuning."""
    pool = config.pools.learner
    return LearnerLoad(
        student=shape,
        config=config.learner.model_copy(update={"compute_dtype": sft.compute_dtype}),
        optimizer=sft.optimizer,
        chunks=make_chunks(config, {Stream.OFF_POLICY: -(-sft.batch_size // pool.count)}),
        num_ranks=pool.count,
        on_gpu=pool.gpus > 0,
    )


def scored_at_once(config: RunConfig) -> list[TrajectoryChunk]:
    """One call of a scorer: a stream's sequences are dealt to the learner's ranks."""
    (chunk,) = make_chunks(config, {Stream.OFF_POLICY: max(dealt_sequences(config).values())})
    if not config.context_tokens:
        return [chunk]
    count = config.data.max_prompt_tokens + config.context_tokens
    prompt = np.zeros(count, dtype=np.int32)
    read = [
        replace(each, teacher_prompt_ids=prompt).as_teacher_reads for each in chunk.trajectories
    ]
    return [replace(chunk, trajectories=tuple(read))]


def wire_bytes_per_token(config: RunConfig, teacher: ModelShape) -> int:
    """What a scorer sends of one response token."""
    return teacher_needs(config).bytes_per_token(
        hidden=teacher.row_size,
        actions=action_columns(config, teacher),
        half=config.scoring.dtype == "bfloat16",
    )

"""A run's configuration and its models' shapes in -> what each kind of worker holds and reads.

Every prompt and every response is taken at its limit, so what comes out is the most that a step can
bring; real sequences are shorter.
"""

from __future__ import annotations

from distill_system.config.model import LearnerConfig, LoraUpdate, OptimizerConfig, SupervisedConfig
from distill_system.config.objective import TeacherNeeds
from distill_system.config.objective.needs import StreamName
from distill_system.config.run import RunConfig
from distill_system.planning.activations import BFLOAT16, FLOAT32
from distill_system.planning.learner_memory import LearnerLoad
from distill_system.planning.memory import ScorerLoad
from distill_system.planning.shapes import ModelShape

STREAMS: tuple[StreamName, ...] = ("off_policy", "on_policy")
NUMBER_BYTES = {"float32": FLOAT32, "bfloat16": BFLOAT16, "float16": BFLOAT16}


def longest_sequence(config: RunConfig) -> int:
    """Tokens of a prompt and a response at their limits."""
    return config.data.max_prompt_tokens + config.rollout.sampling.max_response_tokens


def streams_read(config: RunConfig) -> list[StreamName]:
    """The streams that the objective reads."""
    return [stream for stream in STREAMS if config.distill.sequences(stream)]


def teacher_needs(config: RunConfig) -> TeacherNeeds:
    """What the teacher is asked for at a token, of all streams together."""
    objective, needs = config.distill.objective, TeacherNeeds()
    for stream in streams_read(config):
        needs = needs | objective.teacher_needs(stream)
    return needs


def action_columns(config: RunConfig, teacher: ModelShape) -> int:
    """R: of the action embeddings that learner and scorers hold."""
    most = config.distill.action_dimension
    return teacher.embedding_size if most is None else min(most, teacher.embedding_size)


def distillation_load(config: RunConfig, student: ModelShape, teacher: ModelShape) -> LearnerLoad:
    """One learner rank of the distillation."""
    distill, needs = config.distill, teacher_needs(config)
    ranks = config.pools.learner.count
    # The fullest rank: sequences are dealt as evenly as they go.
    sequences = sum(-(-distill.sequences(stream) // ranks) for stream in streams_read(config))
    reads_softmax = needs.expected_embedding
    streams = len(streams_read(config))
    rebuilds = distill.objective.needs_teacher_distribution
    return _learner_load(
        config,
        student,
        sequences=sequences,
        compute_dtype=config.learner.compute_dtype,
        optimizer=distill.optimizer,
        feature_columns=teacher.row_size if needs.features else 0,
        action_columns=action_columns(config, teacher),
        softmax_reads=streams if reads_softmax else 0,
        token_sums=streams if rebuilds or not reads_softmax else 0,
        teacher_columns=teacher.row_size if rebuilds else 0,
        num_adapter=_count_adapter(config, student),
    )


def supervised_load(config: RunConfig, shape: ModelShape, sft: SupervisedConfig) -> LearnerLoad:
    """One learner rank of a model's supervised fine-tuning."""
    return _learner_load(
        config,
        shape,
        sequences=-(-sft.batch_size // config.pools.learner.count),
        compute_dtype=sft.compute_dtype,
        optimizer=sft.optimizer,
        token_sums=1,
    )


def _learner_load(
    config: RunConfig,
    shape: ModelShape,
    *,
    sequences: int,
    compute_dtype: str,
    optimizer: OptimizerConfig,
    feature_columns: int = 0,
    action_columns: int = 0,
    softmax_reads: int = 0,
    token_sums: int = 0,
    teacher_columns: int = 0,
    num_adapter: int = 0,
) -> LearnerLoad:
    learner, pool = config.learner, config.pools.learner
    part_tokens, num_parts = _cut(learner, sequences, longest_sequence(config))
    return LearnerLoad(
        student=shape,
        compute_dtype=compute_dtype,
        optimizer=optimizer.type,
        num_ranks=pool.count,
        shard_ranks=learner.shard_size(pool.count),
        step_tokens=sequences * config.rollout.sampling.max_response_tokens,
        part_tokens=part_tokens,
        num_parts=num_parts,
        chunk_tokens=learner.vocabulary_chunk_tokens,
        feature_columns=feature_columns,
        action_columns=action_columns,
        softmax_reads=softmax_reads,
        token_sums=token_sums,
        teacher_columns=teacher_columns,
        teacher_number_bytes=NUMBER_BYTES[config.scoring.dtype],
        num_adapter=num_adapter,
        checkpointing=learner.activation_checkpointing,
        offload=learner.offload,
        on_gpu=pool.gpus > 0,
    )


def _cut(learner: LearnerConfig, sequences: int, longest: int) -> tuple[int, int]:
    """Tokens of one part and number of parts; a sequence is never cut."""
    limit = learner.max_tokens_per_microbatch
    if limit is None or limit >= sequences * longest:
        return sequences * longest, 1
    together = max(1, limit // longest)
    return together * longest, -(-sequences // together)


def _count_adapter(config: RunConfig, student: ModelShape) -> int:
    update = config.distill.update
    if not isinstance(update, LoraUpdate):
        return 0
    wanted = update.target_modules or tuple(student.adapter_rows)
    return update.rank * sum(student.adapter_rows.get(name, 0) for name in wanted)


def scorer_load(config: RunConfig, teacher: ModelShape) -> ScorerLoad:
    """One scorer; a stream's sequences are dealt to the learner's ranks, a chunk to each call."""
    needs, ranks = teacher_needs(config), config.pools.learner.count
    calls = [-(-config.distill.sequences(stream) // ranks) for stream in streams_read(config)]
    sequences, longest = max(calls), longest_sequence(config)
    limit = max(longest, config.scoring.max_tokens_per_batch)
    return ScorerLoad(
        teacher=teacher,
        number_bytes=NUMBER_BYTES[config.scoring.dtype],
        batch_tokens=min(limit, sequences * longest),
        row_tokens=sequences * config.rollout.sampling.max_response_tokens,
        chunk_tokens=config.learner.vocabulary_chunk_tokens,
        action_columns=action_columns(config, teacher),
        reads_vocabulary=needs.expected_embedding or needs.logprobs or needs.top_k > 0,
    )


def wire_bytes_per_token(config: RunConfig, teacher: ModelShape) -> int:
    """What a scorer sends of one response token."""
    return teacher_needs(config).bytes_per_token(
        hidden=teacher.row_size,
        actions=action_columns(config, teacher),
        half=config.scoring.dtype == "bfloat16",
    )

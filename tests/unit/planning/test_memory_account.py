from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from torch.distributed._tools.mem_tracker import MemTracker
from trajectories import make_trajectory

from distill_system.config.model import ArchitectureConfig, LearnerConfig, OptimizerConfig
from distill_system.config.objective import AmmdConfig
from distill_system.learner import Learner, ModelSource
from distill_system.learner.collate import StreamTotals
from distill_system.planning import (
    LearnerLoad,
    Memory,
    ScorerLoad,
    architecture_shape,
    engine_memory,
    learner_memory,
    scorer_memory,
)
from distill_system.records import Author, Stream, TeacherTargets, TrajectoryChunk

STUDENT = ArchitectureConfig(hidden_size=64, intermediate_size=176, num_layers=4, num_heads=2)
SHAPE = architecture_shape(STUDENT, vocabulary=3000)
LOAD = LearnerLoad(
    student=SHAPE,
    step_tokens=1000,
    part_tokens=2000,
    chunk_tokens=64,
    feature_columns=96,
    action_columns=32,
    softmax_reads=2,
)
TEACHER_HIDDEN, ACTIONS, CHUNK = 96, 32, 64


def _part(memory: Memory, name: str) -> float:
    return sum(part.num_bytes for part in memory.parts if part.name == name)


@pytest.mark.filterwarnings("ignore")  # the tracker's own
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_holds_what_is_predicted(tiny_model_folder, checkpointing: bool) -> None:
    """The peak of live tensors, by torch's own tracker, in a real learner's second step."""
    teacher = tiny_model_folder(hidden_size=TEACHER_HIDDEN, num_heads=3, vocab_size=3000)
    learner = Learner(
        rank=0,
        world_size=1,
        source=ModelSource(
            architecture=STUDENT,
            vocabulary_size=3000,
            teacher_path=str(teacher),
            action_dimension=ACTIONS,
        ),
        objective=AmmdConfig(),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        config=LearnerConfig(vocabulary_chunk_tokens=CHUNK, activation_checkpointing=checkpointing),
        total_steps=10,
        max_response_tokens=100,
        seed=0,
        uses_gpu=False,
        timeout_seconds=60.0,
    )
    batch = _make_batch(sequences=8)
    learner.step(0, *batch)
    tracker = MemTracker()
    tracker.track_external(learner.model, *learner.optimizers, learner.teacher.action_embeddings_VE)
    with tracker:
        learner.step(1, *batch)
    (held,) = tracker.get_tracker_snapshot("peak").values()
    load = replace(
        LOAD, step_tokens=16 * 60, part_tokens=16 * 100, chunk_tokens=CHUNK,
        checkpointing=checkpointing,
    )  # fmt: skip
    assert learner_memory(load).num_bytes == pytest.approx(held["Total"], rel=0.15)


def _make_batch(*, sequences: int):
    """So many of each stream, of 40 + 60 tokens."""
    generator = np.random.default_rng(0)
    chunks, targets = [], []
    for stream, author in ((Stream.OFF_POLICY, Author.TEACHER), (Stream.ON_POLICY, Author.STUDENT)):
        trajectories = tuple(make_trajectory(i, 40, 60, author) for i in range(sequences))
        chunks.append(TrajectoryChunk(stream=stream, trajectories=trajectories))
        targets.append(
            [
                TeacherTargets(
                    trajectory_id=trajectory.trajectory_id,
                    num_tokens=60,
                    features=generator.standard_normal((60, TEACHER_HIDDEN), dtype=np.float32),
                    expected_embedding=generator.standard_normal((60, ACTIONS), dtype=np.float32),
                )
                for trajectory in trajectories
            ]
        )
    totals = {chunk.stream: StreamTotals.of(chunk.trajectories) for chunk in chunks}
    return chunks, totals, *targets


def test_adamw_holds_sixteen_bytes_a_parameter_and_muon_twelve_a_matrix_element() -> None:
    long = replace(LOAD, part_tokens=10, step_tokens=5, softmax_reads=0, token_sums=1)
    adamw, muon = (learner_memory(replace(long, optimizer=o)) for o in ("adamw", "muon"))
    state = _part(adamw, "weights") + _part(adamw, "optimizer state") + _part(adamw, "gradients")
    assert state == 16 * SHAPE.num_parameters
    saved = _part(adamw, "optimizer state") - _part(muon, "optimizer state")
    assert saved == 4 * SHAPE.num_matrix_parameters


def test_ranks_that_share_a_student_each_hold_a_part_of_it() -> None:
    ranks = replace(LOAD, num_ranks=8)
    whole, shared = learner_memory(ranks), learner_memory(replace(ranks, shard_ranks=8))
    for name in ("weights", "optimizer state", "action embeddings"):
        assert _part(shared, name) == pytest.approx(_part(whole, name) / 8)
    assert _part(shared, "gathered blocks") > 0
    assert _part(shared, "activations") == _part(whole, "activations")


def test_adapters_shrink_what_learns_and_not_what_is_held() -> None:
    adapters = 4 * sum(SHAPE.adapter_rows.values())
    full, lora = learner_memory(LOAD), learner_memory(replace(LOAD, num_adapter=adapters))
    assert _part(lora, "weights") == _part(full, "weights") + 4 * adapters
    assert _part(lora, "optimizer state") == 8 * adapters
    assert _part(lora, "gradients of the unembedding") == 0


def test_the_chunk_grows_with_its_tokens_and_not_with_the_step() -> None:
    def chunk(tokens: int, step_tokens: int = 100_000) -> float:
        load = replace(LOAD, chunk_tokens=tokens, step_tokens=step_tokens, part_tokens=10)
        return _part(learner_memory(load), "chunk over the vocabulary")

    # From a block's size on a chunk adds its two copies alone.
    assert chunk(2000) - chunk(1000) == 2 * 1000 * 3000 * 4
    assert chunk(1000, 200_000) == chunk(1000)


def test_microbatches_bound_activations_and_bring_the_gradients_forward() -> None:
    whole = learner_memory(replace(LOAD, part_tokens=8000))
    parts = learner_memory(replace(LOAD, part_tokens=1000, num_parts=8))
    assert _part(parts, "activations") == pytest.approx(_part(whole, "activations") / 8)
    assert _part(parts, "rows of the step") == _part(whole, "rows of the step")


def test_offload_leaves_weights_and_optimizer_to_the_cpu_where_there_is_a_gpu() -> None:
    gpu = replace(LOAD, on_gpu=True, num_ranks=2)
    here, offloaded = learner_memory(gpu), learner_memory(replace(gpu, offload=True))
    assert _part(offloaded, "weights") == 0
    assert offloaded.host_bytes >= 12 * SHAPE.num_parameters
    assert offloaded.num_bytes < here.num_bytes
    on_cpu = replace(gpu, on_gpu=False)
    assert learner_memory(replace(on_cpu, offload=True)).host_bytes == 0


def test_bfloat16_halves_a_scorer() -> None:
    load = ScorerLoad(
        teacher=SHAPE,
        number_bytes=4,
        batch_tokens=4000,
        row_tokens=2000,
        chunk_tokens=64,
        action_columns=0,
        reads_vocabulary=False,
    )
    half = scorer_memory(replace(load, number_bytes=2))
    assert half.num_bytes == pytest.approx(scorer_memory(load).num_bytes / 2)


def test_tensor_parallelism_divides_an_engines_weights() -> None:
    def weights(size: int) -> float:
        memory = engine_memory(
            SHAPE, number_bytes=2, tensor_parallel_size=size, cache_bytes=5.0, key="student_engine"
        )
        return _part(memory, "weights")

    assert weights(1) == 2 * SHAPE.num_parameters == 2 * weights(2)

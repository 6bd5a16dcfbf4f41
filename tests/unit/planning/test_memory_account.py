from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from trajectories import make_trajectory

from distill_system.config.model import (
    ArchitectureConfig,
    LearnerConfig,
    LoraUpdate,
    OptimizerConfig,
)
from distill_system.config.objective import AmmdConfig, TokenMatchingConfig
from distill_system.config.objective.token_losses import ReverseKlConfig
from distill_system.learner import Learner, ModelSource
from distill_system.learner.collate import StreamTotals
from distill_system.planning import LearnerLoad, Memory, architecture_shape, learner_memory
from distill_system.planning.learner_memory import SizedLearner
from distill_system.planning.shapes import build_empty
from distill_system.planning.sizes import SizeTracker
from distill_system.records import Author, Stream, TeacherTargets, TrajectoryChunk
from distill_system.weights import WireFormat
from distill_system.weights.rounding import AS_THEY_ARE

STUDENT = ArchitectureConfig(hidden_size=64, intermediate_size=176, num_layers=4, num_heads=2)
TEACHER = ArchitectureConfig(hidden_size=96, intermediate_size=176, num_layers=2, num_heads=3)
SHAPE = architecture_shape(STUDENT, vocabulary=3000)
NUM_MATRIX = 4 * (4 * 64 * 64 + 3 * 64 * 176)
ACTIONS = 32
ADAMW = OptimizerConfig(learning_rate=1e-3)
REVERSE_KL = TokenMatchingConfig(
    type="token_matching",
    on_policy=ReverseKlConfig(type="reverse_kl"),
    off_policy=ReverseKlConfig(type="reverse_kl"),
)


def _make_chunks(sequences: int) -> list[TrajectoryChunk]:
    """So many of each stream, of 31 to 40 + 51 to 60 tokens."""
    return [
        TrajectoryChunk(
            stream=stream,
            trajectories=tuple(
                make_trajectory(i, 40 - i % 10, 51 + i % 10, Author.STUDENT)
                for i in range(sequences)
            ),
        )
        for stream in (Stream.OFF_POLICY, Stream.ON_POLICY)
    ]


PLAIN_TEXT = TrajectoryChunk(
    stream=Stream.PLAIN_TEXT,
    trajectories=tuple(make_trajectory(i, 1, 90, Author.DATASET) for i in range(8)),
)
LOAD = LearnerLoad(
    student=SHAPE,
    config=LearnerConfig(vocabulary_chunk_tokens=64),
    optimizer=ADAMW,
    chunks=_make_chunks(8),
    objective=AmmdConfig(),
    teacher=architecture_shape(TEACHER, vocabulary=3000),
    action_columns=ACTIONS,
)


def _with(load: LearnerLoad = LOAD, **settings: object) -> LearnerLoad:
    """The load under another learner configuration."""
    return replace(load, config=load.config.model_copy(update=settings))


CASES = {
    "plain": LOAD,
    "checkpointing": _with(activation_checkpointing=True),
    "autocast": _with(compute_dtype="bfloat16"),
    "weights set aside": replace(_with(compute_dtype="bfloat16"), sets_aside=True),
    "muon": replace(LOAD, optimizer=OptimizerConfig(type="muon", learning_rate=1e-3)),
    "token losses": replace(LOAD, objective=REVERSE_KL),
    "plain text": replace(LOAD, chunks=[*LOAD.chunks, PLAIN_TEXT]),
}

LORA = replace(
    LOAD, update=LoraUpdate(type="lora", rank=4)
)  # torch's tracker refuses frozen weights


@pytest.mark.filterwarnings("ignore")  # the tracker's own
@pytest.mark.parametrize("name", CASES)
def test_a_step_holds_what_is_predicted(tiny_model_folder, name: str) -> None:
    """The peak of live tensors, by torch's own tracker, in a real learner's second step."""
    load = CASES[name]
    teacher = tiny_model_folder(hidden_size=96, num_heads=3, vocab_size=3000)
    learner = Learner(
        rank=0,
        world_size=1,
        source=ModelSource(
            architecture=STUDENT,
            vocabulary_size=3000,
            teacher_path=str(teacher),
            action_dimension=ACTIONS,
            update=load.update,
        ),
        objective=load.objective,
        optimizer=load.optimizer,
        config=load.config,
        total_steps=10,
        max_response_tokens=100,
        seed=0,
        uses_gpu=False,
        timeout_seconds=60.0,
        language_model_weight=0.5,
        wire=WireFormat(dtype=torch.bfloat16, seed=0) if load.sets_aside else AS_THEY_ARE,
    )
    totals = {chunk.stream: StreamTotals.of(chunk.trajectories) for chunk in load.chunks}
    targets = [_make_targets(chunk) for chunk in load.chunks]
    learner.step(0, load.chunks, totals, *targets)
    tracker = MemTracker()
    matrices = (learner.teacher.action_embeddings_VE, learner.teacher.unembedding_VF)
    tracker.track_external(
        learner.model, *learner.optimizers, *(each for each in matrices if each is not None)
    )
    with tracker:
        learner.step(1, load.chunks, totals, *targets)
    (held,) = tracker.get_tracker_snapshot("peak").values()
    assert learner_memory(load).num_bytes == pytest.approx(held["Total"], rel=0.03)


def _make_targets(chunk: TrajectoryChunk) -> Sequence[TeacherTargets] | None:
    if chunk is PLAIN_TEXT:
        return None
    generator = np.random.default_rng(0)
    return [
        TeacherTargets(
            trajectory_id=each.trajectory_id,
            num_tokens=each.num_response_tokens,
            features=generator.standard_normal((each.num_response_tokens, 96), dtype=np.float32),
            expected_embedding=generator.standard_normal(
                (each.num_response_tokens, ACTIONS), dtype=np.float32
            ),
        )
        for each in chunk.trajectories
    ]


def test_adamw_holds_sixteen_bytes_a_parameter_and_muon_twelve_a_matrix_element() -> None:
    few = replace(LOAD, chunks=_make_chunks(1))
    adamw = learner_memory(few).parts
    muon = learner_memory(replace(few, optimizer=CASES["muon"].optimizer)).parts
    assert adamw["weights"] == pytest.approx(4 * SHAPE.num_parameters, rel=0.01)
    assert adamw["optimizer state"] == pytest.approx(8 * SHAPE.num_parameters, rel=0.01)
    saved = adamw["optimizer state"] - muon["optimizer state"]
    assert saved == pytest.approx(4 * NUM_MATRIX, rel=0.01)


def test_ranks_that_share_a_student_each_hold_a_part_of_it() -> None:
    ranks = replace(LOAD, num_ranks=8)
    whole, shared = learner_memory(ranks), learner_memory(_with(ranks, shard_ranks=8))
    for name in ("weights", "optimizer state", "teacher's matrices"):
        assert shared.parts[name] == pytest.approx(whole.parts[name] / 8, rel=0.05)
    assert shared.parts["gathered weights"] > 0
    assert shared.parts["activations"] == pytest.approx(whole.parts["activations"], rel=0.01)


def test_adapters_shrink_what_learns_and_not_what_is_held() -> None:
    rank = 4
    # q, k, v, o: 64 + 64; gate, up, down: 64 + 176
    adapters = rank * 4 * (4 * 128 + 3 * 240)
    full, lora = learner_memory(LOAD), learner_memory(LORA)
    assert lora.parts["weights"] == pytest.approx(full.parts["weights"] + 4 * adapters, rel=0.01)
    assert lora.parts["optimizer state"] == pytest.approx(8 * adapters, rel=0.01)
    assert lora.num_bytes < full.num_bytes


def test_each_token_of_a_chunk_costs_rows_of_the_vocabulary() -> None:
    def held(tokens: int) -> float:
        return learner_memory(_with(vocabulary_chunk_tokens=tokens)).num_bytes

    # Logits, their gradient, and a softmax of a block, which at this size is a chunk.
    assert held(256) - held(128) == pytest.approx(3 * 128 * 3000 * 4, rel=0.02)


def test_a_gpu_has_chunks_of_its_own_size_where_none_is_given() -> None:
    def held(load: LearnerLoad, tokens: int | None) -> float:
        return learner_memory(_with(load, vocabulary_chunk_tokens=tokens)).num_bytes

    there = replace(LOAD, on_gpu=True, chunks=_make_chunks(40))  # more tokens than one chunk has
    assert held(there, None) == held(there, 4096) > held(there, 512)
    assert held(LOAD, None) == held(LOAD, 512)


def _workspace_of_the_update(load: LearnerLoad) -> float:
    sizes, model = SizeTracker(), build_empty(load.student)
    with sizes:
        moments = SizedLearner(load, model, sizes, None).measure_step(load.chunks)
    return moments["optimizer's workspace"].get("optimizer's workspace", 0.0)


def test_adamw_is_fused_on_a_gpu_and_has_no_workspace() -> None:
    largest_matrix = 4 * 3000 * 64
    assert _workspace_of_the_update(LOAD) >= largest_matrix
    assert _workspace_of_the_update(replace(LOAD, on_gpu=True)) < 0.01 * largest_matrix


def test_microbatches_bound_activations() -> None:
    whole = learner_memory(LOAD)
    parts = learner_memory(_with(max_tokens_per_microbatch=100))
    assert parts.parts["activations"] < whole.parts["activations"] / 8
    assert parts.parts["rows of the step"] < 1.2 * whole.parts["rows of the step"]


def test_many_microbatches_are_drawn_from_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    def memory() -> Memory:
        return learner_memory(_with(max_tokens_per_microbatch=200))

    drawn = memory()
    module = import_module("distill_system.planning.learner_memory")
    monkeypatch.setattr(module, "FEW_PARTS", (2, 100))
    assert drawn.num_bytes == pytest.approx(memory().num_bytes, rel=0.01)


def test_offload_leaves_weights_and_optimizer_to_the_cpu_where_there_is_a_gpu() -> None:
    gpu = replace(LOAD, on_gpu=True, num_ranks=2)
    here, offloaded = learner_memory(gpu), learner_memory(_with(gpu, offload=True))
    assert "weights" not in offloaded.parts
    assert offloaded.host_bytes >= 12 * SHAPE.num_parameters
    assert offloaded.num_bytes < here.num_bytes
    on_cpu = replace(gpu, on_gpu=False)
    assert learner_memory(_with(on_cpu, offload=True)).host_bytes == 0

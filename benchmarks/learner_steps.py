"""The learner's step under AMMD, both streams, against plain on-policy reverse KL, in one process.

The real Learner on a small Llama; what the teacher would have sent is drawn at random. Steps of
the two objectives take turns, so that a busy machine slows both.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from objective_forms import ACTION_DIMENSION, CLOCKS
from transformers import LlamaConfig, LlamaForCausalLM

from distill_system.config.model import ArchitectureConfig, LearnerConfig, OptimizerConfig
from distill_system.config.objective import AmmdConfig, TokenMatchingConfig
from distill_system.learner import Learner, ModelSource
from distill_system.learner.collate import StreamTotals
from distill_system.records import (
    Author,
    Finish,
    Stream,
    TeacherTargets,
    Trajectory,
    TrajectoryChunk,
    VersionSpan,
)

PROMPT_TOKENS, RESPONSE_TOKENS = 32, 64
STUDENT = ArchitectureConfig(
    hidden_size=512, intermediate_size=1536, num_layers=8, num_heads=8, tie_word_embeddings=True
)
TEACHER_HIDDEN = 768
OBJECTIVES: dict[str, dict[str, Any]] = {
    "reverse_kl": {
        "type": "token_matching",
        "on_policy": {"type": "reverse_kl"},
        "on_policy_weight": 1.0,
    },
    "ammd": {"type": "ammd"},
    "ammd, whole action embeddings": {"type": "ammd"},
}


@dataclass(frozen=True)
class StepCase:
    """sequences: of one step, over both streams."""

    vocabulary: int
    sequences: int
    repeats: int
    chunk_tokens: int
    device: str
    threads: int
    clock: str

    @property
    def tokens(self) -> int:
        """Response tokens of one step."""
        return self.sequences * RESPONSE_TOKENS


def serve(case: StepCase, pipe: Connection) -> None:
    """Send the median seconds of a step under each objective, the first one of each left out."""
    with tempfile.TemporaryDirectory() as folder:
        save_teacher(folder, case.vocabulary, TEACHER_HIDDEN)
        learners = {name: _build_learner(case, name, folder) for name in OBJECTIVES}
    batches = {name: _make_batch(case, name) for name in OBJECTIVES}
    read_clock = CLOCKS[case.clock]
    seconds: dict[str, list[float]] = {name: [] for name in OBJECTIVES}
    for step in range(case.repeats + 1):
        for name, learner in learners.items():
            chunks, totals, targets = batches[name]
            started = read_clock()
            learner.step(step, chunks, totals, *targets)
            seconds[name].append(read_clock() - started)
    pipe.send({name: statistics.median(times[1:]) for name, times in seconds.items()})


def save_teacher(folder: str, vocabulary: int, hidden_size: int) -> None:
    """One block: the learner reads its embeddings alone."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def _build_learner(case: StepCase, objective: str, teacher: str) -> Learner:
    cuda = case.device == "cuda"
    settings = OBJECTIVES[objective]
    model = AmmdConfig if settings["type"] == "ammd" else TokenMatchingConfig
    return Learner(
        rank=0,
        world_size=1,
        source=ModelSource(
            architecture=STUDENT,
            vocabulary_size=case.vocabulary,
            teacher_path=teacher,
            action_dimension=_action_dimension(objective),
        ),
        objective=model(**settings),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        config=LearnerConfig(
            threads=case.threads,
            compute_dtype="bfloat16" if cuda else "float32",
            vocabulary_chunk_tokens=case.chunk_tokens,
        ),
        total_steps=1000,
        max_response_tokens=RESPONSE_TOKENS,
        seed=0,
        uses_gpu=cuda,
        timeout_seconds=60.0,
    )


def _action_dimension(objective: str) -> int | None:
    return None if "whole" in objective else ACTION_DIMENSION


def _make_batch(
    case: StepCase, objective: str
) -> tuple[list[TrajectoryChunk], dict[Stream, StreamTotals], list[list[TeacherTargets]]]:
    """All sequences on-policy, or half of them in each stream."""
    both = OBJECTIVES[objective]["type"] == "ammd"
    streams = [Stream.OFF_POLICY, Stream.ON_POLICY] if both else [Stream.ON_POLICY]
    generator = np.random.default_rng(0)
    chunks, targets = [], []
    for stream in streams:
        number = case.sequences // len(streams)
        trajectories = tuple(
            _write(generator, f"{stream}-{index}", case.vocabulary, stream)
            for index in range(number)
        )
        chunks.append(TrajectoryChunk(stream=stream, trajectories=trajectories))
        width = min(TEACHER_HIDDEN, _action_dimension(objective) or TEACHER_HIDDEN) if both else 0
        targets.append([_target(generator, t, width=width) for t in trajectories])
    totals = {chunk.stream: StreamTotals.of(chunk.trajectories) for chunk in chunks}
    return chunks, totals, targets


def _write(
    generator: np.random.Generator, name: str, vocabulary: int, stream: Stream
) -> Trajectory:
    length = PROMPT_TOKENS + RESPONSE_TOKENS
    return Trajectory(
        trajectory_id=name,
        prompt_id=name,
        author=Author.STUDENT if stream is Stream.ON_POLICY else Author.TEACHER,
        token_ids=generator.integers(4, vocabulary, length).astype(np.int32),
        num_prompt_tokens=PROMPT_TOKENS,
        behaviour_logprobs=np.full(RESPONSE_TOKENS, -10.0, dtype=np.float32),
        temperature=1.0,
        finish=Finish.LENGTH,
        weight_versions=(
            (VersionSpan(version=0, start=0, end=RESPONSE_TOKENS),)
            if stream is Stream.ON_POLICY
            else ()
        ),
    )


def _target(
    generator: np.random.Generator, trajectory: Trajectory, *, width: int
) -> TeacherTargets:
    """width: of the expected embeddings; 0 leaves them out."""
    shape = (RESPONSE_TOKENS, TEACHER_HIDDEN)
    embeddings = generator.standard_normal((RESPONSE_TOKENS, width), dtype=np.float32) / 30
    expected = embeddings if width else None
    return TeacherTargets(
        trajectory_id=trajectory.trajectory_id,
        num_tokens=RESPONSE_TOKENS,
        features=generator.standard_normal(shape, dtype=np.float32),
        expected_embedding=expected,
    )

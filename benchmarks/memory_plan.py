"""The plan's memory: measured against predicted, and what fits where by it.

    python benchmarks/memory_plan.py [--quick] [--only-tables]

First steps of the real learner (AMMD on both streams, float32, one rank) at three sizes of student
and with each key that lowers memory, each in a process of its own: the peak of resident memory
above what the process held once its libraries were warm, against `learner_memory`. glibc is told to
give every large tensor back at once, as a GPU's allocator counts; by itself it keeps freed pieces
of its heap, which on a CPU are some hundred MiB more. Then the tables of docs/scaling.md, predicted
for GPUs of 80 and 141 GiB.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from learner_case import SEED, Case, begin_memory, deal_steps
from learner_ours import to_trajectory
from learner_steps import save_teacher
from memory_tables import format_markdown, student_rows, teacher_rows
from record import write_result

from distill_system.config.model import (
    ArchitectureConfig,
    FullUpdate,
    LearnerConfig,
    LoraUpdate,
    OptimizerConfig,
)
from distill_system.config.objective import AmmdConfig
from distill_system.learner import Learner, ModelSource
from distill_system.learner.collate import StreamTotals
from distill_system.planning import LearnerLoad, architecture_shape, learner_memory
from distill_system.records import Author, Stream, TeacherTargets, Trajectory, TrajectoryChunk

MIB = 2**20
PROCESSES = multiprocessing.get_context("spawn")
TEACHER_HIDDEN, ACTION_COLUMNS, CHUNK_TOKENS = 512, 256, 256


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One process: a student's size and batch, and what is asked of the learner."""

    name: str
    case: Case
    checkpointing: bool = False
    microbatch_tokens: int | None = None
    lora_rank: int = 0
    optimizer: str = "adamw"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the smallest size alone")
    parser.add_argument("--only-tables", action="store_true", help="print the predictions alone")
    arguments = parser.parse_args()
    if not arguments.only_tables:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # read by glibc as a process starts
        trials = list(_trials())
        rows = [_compare(trial) for trial in (trials[:1] if arguments.quick else trials)]
        errors = [abs(float(row["error"])) for row in rows]
        write_result("memory_plan", rows, {"largest_error": max(errors)}, seeds={"seed": SEED})
    for title, table in (("Students", student_rows()), ("Teachers", teacher_rows())):
        print(f"\n{title}\n{format_markdown(table)}")


def _trials() -> Iterable[Trial]:
    sizes = {
        "8 M": (256, 8, 8_000, 64, 256),
        "55 M": (512, 12, 32_000, 24, 256),
        "185 M": (1024, 12, 32_000, 8, 256),
    }
    for name, (hidden, layers, vocabulary, sequences, longest) in sizes.items():
        case = Case(
            form="packed",
            longest=longest,
            sequences=sequences,
            steps=1,
            hidden_size=hidden,
            num_layers=layers,
            vocabulary=vocabulary,
            dtype="float32",
            device="cpu",
            threads=1,
            clock="wall",
        )
        yield Trial(name=name, case=case)
        if name == "8 M":
            yield Trial(name=f"{name}, activation checkpointing", case=case, checkpointing=True)
            yield Trial(name=f"{name}, microbatches", case=case, microbatch_tokens=1024)
        if name == "55 M":
            yield Trial(name=f"{name}, Muon", case=case, optimizer="muon")
            yield Trial(name=f"{name}, LoRA of rank 16", case=case, lora_rank=16)


def _compare(trial: Trial) -> dict[str, Any]:
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=_serve, args=(trial, theirs))
    process.start()
    theirs.close()
    measured = ours.recv()
    process.join()
    load = _load(trial)
    predicted = learner_memory(load)
    row = {
        "student": trial.name,
        "parameters": load.student.num_parameters,
        "tokens": sum(chunk.num_tokens for chunk in load.chunks),
        "measured_mib": measured / MIB,
        "predicted_mib": predicted.num_bytes / MIB,
        "error": predicted.num_bytes / measured - 1.0,
        "moment": predicted.moment,
        "largest": predicted.by_size[0],
    }
    print(row, flush=True)
    return row


def _serve(trial: Trial, pipe: Connection) -> None:
    """Two steps; send the peak above the base."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    case = trial.case
    with tempfile.TemporaryDirectory() as folder:
        save_teacher(folder, case.vocabulary, TEACHER_HIDDEN)
        _take_steps(replace(trial, case=case.alone_and_tiny, microbatch_tokens=None), None)
        batch = _make_batch(case, teacher=True)
        memory = begin_memory(case)
        learner = _build(trial, folder)
        memory_base, memory = memory.base_bytes, begin_memory(case)
        memory.base_bytes = memory_base  # building holds things that no step does
        for step in range(2):
            learner.step(step, *batch)
    pipe.send(memory.above_base())


def _take_steps(trial: Trial, folder: str | None) -> None:
    learner = _build(trial, folder)
    for step in range(2):
        learner.step(step, *_make_batch(trial.case, teacher=folder is not None))


def _build(trial: Trial, folder: str | None) -> Learner:
    return Learner(
        rank=0,
        world_size=1,
        source=ModelSource(
            architecture=trial.case.architecture,
            vocabulary_size=trial.case.vocabulary,
            teacher_path=folder,
            action_dimension=ACTION_COLUMNS,
            update=_update(trial) if folder else FullUpdate(),
        ),
        objective=None if folder is None else AmmdConfig(),
        optimizer=OptimizerConfig(type=trial.optimizer, learning_rate=1e-4),
        config=_learner_config(trial),
        total_steps=10,
        max_response_tokens=trial.case.longest,
        seed=SEED,
        uses_gpu=False,
        timeout_seconds=60.0,
    )


def _make_batch(case: Case, *, teacher: bool) -> tuple[Any, ...]:
    """The sequences of one step, half of them in each stream, and what the teacher says of them."""
    generator = np.random.default_rng(SEED)
    trajectories = [to_trajectory(s, str(i)) for i, s in enumerate(deal_steps(case)[0])]
    half = len(trajectories) // 2
    streams = {
        Stream.OFF_POLICY: tuple(trajectories[:half]),
        Stream.ON_POLICY: tuple(_sampled(t) for t in trajectories[half:]),
    }
    if not teacher:
        streams = {Stream.OFF_POLICY: tuple(trajectories)}
    chunks = [TrajectoryChunk(stream=s, trajectories=each) for s, each in streams.items()]
    totals = {s: StreamTotals.of(each) for s, each in streams.items()}
    targets = [[_target(generator, t) for t in chunk.trajectories] for chunk in chunks]
    return chunks, totals, *(targets if teacher else ())


def _sampled(trajectory: Trajectory) -> Trajectory:
    """The same as if the student had written it."""
    logprobs = np.full(trajectory.num_response_tokens, -9.0, dtype=np.float32)
    return replace(trajectory, author=Author.STUDENT, behaviour_logprobs=logprobs)


def _target(generator: np.random.Generator, trajectory: Trajectory) -> TeacherTargets:
    tokens = trajectory.num_response_tokens
    return TeacherTargets(
        trajectory_id=trajectory.trajectory_id,
        num_tokens=tokens,
        features=generator.standard_normal((tokens, TEACHER_HIDDEN), dtype=np.float32),
        expected_embedding=generator.standard_normal((tokens, ACTION_COLUMNS), dtype=np.float32),
    )


def _load(trial: Trial) -> LearnerLoad:
    """What is measured, for the prediction: the same text, and a teacher of the same sizes."""
    case = trial.case
    teacher = ArchitectureConfig(
        hidden_size=TEACHER_HIDDEN, intermediate_size=TEACHER_HIDDEN, num_layers=1, num_heads=1
    )
    return LearnerLoad(
        student=architecture_shape(case.architecture, vocabulary=case.vocabulary),
        config=_learner_config(trial),
        optimizer=OptimizerConfig(type=trial.optimizer, learning_rate=1e-4),
        chunks=_make_batch(case, teacher=True)[0],
        update=_update(trial),
        objective=AmmdConfig(),
        teacher=architecture_shape(teacher, vocabulary=case.vocabulary),
        action_columns=ACTION_COLUMNS,
    )


def _learner_config(trial: Trial) -> LearnerConfig:
    return LearnerConfig(
        vocabulary_chunk_tokens=CHUNK_TOKENS,
        max_tokens_per_microbatch=trial.microbatch_tokens,
        activation_checkpointing=trial.checkpointing,
    )


def _update(trial: Trial) -> FullUpdate | LoraUpdate:
    return LoraUpdate(type="lora", rank=trial.lora_rank) if trial.lora_rank else FullUpdate()


if __name__ == "__main__":
    main()

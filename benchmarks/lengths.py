"""Answers of thousands of tokens: time and memory of each worker by the length of an answer.

Every step has as many tokens, in few long answers or many short ones, so that a column that rises
with the length shows what grows faster than the length itself: attention's products do, memory
should not. Each worker runs in a process of its own, at each length; models are the quickstart's
sizes with random weights, and no response ends before the length (see pipeline_models.py).

    python benchmarks/lengths.py [--lengths 256 512 1024 2048] [--tokens 16384] [--steps 2]
    python benchmarks/lengths.py --run [--lengths 2048]

engine: vLLM writes the step's answers. scorer: the teacher reads them, with what AMMD asks for.
learner: a step of AMMD on both streams, half of the tokens each. evaluation: ROUGE-L of them all.
peak: the process's most resident memory; step: how much of it came with the steps.
--run: whole runs of the command line, in lockstep and asynchronous, as many steps and tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from pipeline_models import SEED, Workload, make_models, write_configuration
from record import write_result

MIB = 2**20
WORKERS = ("engine", "scorer", "learner", "evaluation")
NUM_PROMPT_TOKENS = 24
STALENESS = (0, 1)
RUN_STEPS = 3
"""Of a whole run; the first is left out."""


def main() -> None:
    arguments = _parse_arguments()
    if arguments.worker is not None:
        print(json.dumps(measure_worker(arguments)), flush=True)
        return
    with tempfile.TemporaryDirectory() as temporary:
        arguments.folder = arguments.folder or Path(temporary)
        if arguments.run:
            rows = [measure_run(arguments, n, s) for n in arguments.lengths for s in STALENESS]
            name = "lengths_run"
        else:
            rows = [measure_length(arguments, length) for length in arguments.lengths]
            name = "lengths"
    headline = {
        f"{column}, longest over shortest": rows[-1][column] / rows[0][column]
        for column, value in rows[0].items()
        if isinstance(value, float) and value > 0.0
    }
    write_result(name, rows, headline, seeds={"everything": SEED})


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--tokens", type=int, default=16384, help="response tokens of a step")
    parser.add_argument("--steps", type=int, default=2, help="counted, after one that is not")
    parser.add_argument("--folder", type=Path, help="keeps models here; else a temporary folder")
    parser.add_argument("--run", action="store_true", help="whole runs")
    parser.add_argument("--worker", choices=WORKERS, help="one worker, in this process")
    return parser.parse_args()


def measure_length(arguments: argparse.Namespace, length: int) -> dict[str, Any]:
    """A row of the table: every worker in a process of its own."""
    row: dict[str, Any] = {"length": str(length)}
    given = ["--lengths", str(length), "--tokens", str(arguments.tokens)]
    given += ["--steps", str(arguments.steps), "--folder", str(arguments.folder)]
    make_models(arguments.folder, _workload(arguments, length))
    for worker in WORKERS:
        done = subprocess.run(
            [sys.executable, __file__, *given, "--worker", worker],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
        row |= {f"{worker} {name}": value for name, value in found.items()}
        print(f"{length}: {worker} {found}", flush=True)
    return row


def _workload(arguments: argparse.Namespace, length: int) -> Workload:
    return Workload(lengths="fixed", longest=length, sequences=max(2, arguments.tokens // length))


def measure_worker(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds a step, and MiB, of one worker at one length."""
    [length] = arguments.lengths
    workload = _workload(arguments, length)
    models = make_models(arguments.folder, workload)
    make = {"engine": _engine, "scorer": _scorer, "learner": _learner, "evaluation": _evaluation}
    step = make[arguments.worker](models, workload)
    before = _peak_mib()
    step()
    began = time.perf_counter()
    for _ in range(arguments.steps):
        step()
    seconds = (time.perf_counter() - began) / arguments.steps
    peak = _peak_mib()
    return {"s": seconds, "peak MiB": peak, "step MiB": peak - before}


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _engine(models: Path, workload: Workload) -> Callable[[], object]:
    """vLLM writes all answers of a step at once."""
    from distill_system.config.rollout import EngineConfig
    from distill_system.rollout import Sampling, engine_environment
    from distill_system.rollout.engine import EngineSpecification, build_engine

    os.environ.update(engine_environment(uses_gpu=False))
    engine = build_engine(
        EngineSpecification(
            model_path=str(models / "student"),
            config=EngineConfig(kv_cache_mebibytes=128, max_num_sequences=256),
            config_key="rollout.student_engine",
            max_model_length=workload.max_model_length,
            uses_gpu=False,
            tensor_parallel_size=1,
            weight_transfer_backend=None,
            trust_remote_code=False,
        )
    )
    sampling = Sampling(temperature=1.0, top_p=1.0, max_response_tokens=workload.longest)
    generator = np.random.default_rng(SEED)
    prompts = [
        generator.integers(4, 90, NUM_PROMPT_TOKENS).astype(np.int32)
        for _ in range(workload.sequences)
    ]

    def step() -> None:
        written = engine.complete(prompts, sampling, list(range(len(prompts))))
        assert {len(each.token_ids) for each in written} == {workload.longest}

    return step


def _scorer(models: Path, workload: Workload) -> Callable[[], object]:
    """The teacher reads all answers of a step in one call."""
    from distill_system.config.objective import MOMENTS
    from distill_system.config.rollout import ScoringConfig
    from distill_system.records import Stream, TrajectoryChunk
    from distill_system.scoring import TeacherScorer

    scorer = TeacherScorer(
        model_path=str(models / "teacher"),
        config=ScoringConfig(),
        vocabulary_chunk_tokens=512,
        uses_gpu=False,
    )
    texts = tuple(_make_texts(workload, workload.sequences))
    chunk = TrajectoryChunk(stream=Stream.ON_POLICY, trajectories=texts)
    return lambda: scorer.score(chunk, MOMENTS)


def _learner(models: Path, workload: Workload) -> Callable[[], object]:
    """One rank learns from both streams; what the teacher says of them is drawn."""
    from distill_system.config.model import LearnerConfig, OptimizerConfig
    from distill_system.config.objective import AmmdConfig
    from distill_system.learner import Learner, ModelSource
    from distill_system.learner.collate import StreamTotals
    from distill_system.records import Stream, TeacherTargets, TrajectoryChunk

    learner = Learner(
        rank=0,
        world_size=1,
        source=ModelSource(path=str(models / "student"), teacher_path=str(models / "teacher")),
        objective=AmmdConfig(),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        config=LearnerConfig(),
        total_steps=100,
        max_response_tokens=workload.longest,
        seed=SEED,
        uses_gpu=False,
        timeout_seconds=60.0,
    )
    texts = _make_texts(workload, workload.sequences)
    half = len(texts) // 2
    chunks = [
        TrajectoryChunk(stream=Stream.OFF_POLICY, trajectories=tuple(texts[:half])),
        TrajectoryChunk(stream=Stream.ON_POLICY, trajectories=tuple(texts[half:])),
    ]
    generator = np.random.default_rng(SEED)
    width = learner.teacher.action_embeddings_VE.shape[1]
    targets = [
        [
            TeacherTargets(
                trajectory_id=text.trajectory_id,
                num_tokens=workload.longest,
                features=generator.standard_normal((workload.longest, 128), np.float32),
                expected_embedding=generator.standard_normal((workload.longest, width), np.float32),
            )
            for text in chunk.trajectories
        ]
        for chunk in chunks
    ]
    totals = {chunk.stream: StreamTotals.of(chunk.trajectories) for chunk in chunks}
    return lambda: learner.step(0, chunks, totals, *targets)


def _evaluation(models: Path, workload: Workload) -> Callable[[], object]:
    """ROUGE-L of answers against references as long as they are; a word for each token."""
    from distill_system.evaluation.scores import rouge_l

    generator = np.random.default_rng(SEED)

    def text() -> str:
        return " ".join(f"w{each}" for each in generator.integers(0, 500, workload.longest))

    pairs = [(text(), text()) for _ in range(workload.sequences)]
    return lambda: [rouge_l(answer, [reference]) for answer, reference in pairs]


def _make_texts(workload: Workload, count: int) -> list[Any]:
    """Trajectories of the student, of drawn tokens."""
    from distill_system.records import Author, Finish, Trajectory, VersionSpan

    generator = np.random.default_rng(SEED)
    length = NUM_PROMPT_TOKENS + workload.longest
    return [
        Trajectory(
            trajectory_id=f"t{index}",
            prompt_id=f"p{index}",
            author=Author.STUDENT,
            token_ids=generator.integers(4, 90, length).astype(np.int32),
            num_prompt_tokens=NUM_PROMPT_TOKENS,
            behaviour_logprobs=np.full(workload.longest, -4.0, np.float32),
            temperature=1.0,
            finish=Finish.LENGTH,
            weight_versions=(VersionSpan(version=0, start=0, end=workload.longest),),
        )
        for index in range(count)
    ]


def measure_run(arguments: argparse.Namespace, length: int, staleness: int) -> dict[str, Any]:
    """A row of whole runs: AMMD, both streams, every worker."""
    from distill_system.observe import RunDirectory
    from distill_system.observe.metrics import read_metrics

    workload = Workload(
        lengths="fixed",
        longest=length,
        sequences=max(2, arguments.tokens // length),
        steps=1 + RUN_STEPS,
    )
    models = make_models(arguments.folder, workload)
    path = arguments.folder / f"S{staleness}_{length}.yaml"
    settings = {
        "distill.objective": {"type": "ammd"},
        "distill.staleness": {"max_staleness": staleness},
    }
    write_configuration(path, models, workload, settings)
    command = [sys.executable, "-m", "distill_system", "distill", str(path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    directory = RunDirectory(path.with_suffix(""))
    rows = [r for r in read_metrics(directory) if r.stage == "distill" and r.step > 0]
    seconds = [later.time - row.time for row, later in pairwise(rows)]
    last = {name: float(value or 0.0) for name, value in rows[-1].metrics.items()}
    assert last["learner/mean_student_response_tokens"] == length
    row = {
        "run": f"S = {staleness}, {length} tokens",
        "s a step": sum(seconds) / len(seconds),
        "learner MiB": last["learner/peak_memory_bytes"] / MIB,
        "held-out gap, nats": last["held_out/logprob_gap"],
    }
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()

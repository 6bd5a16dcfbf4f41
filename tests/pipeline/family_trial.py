"""One family's way through the system, in one process: a real vLLM engine, learner and scorer."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distill_system.config.model import FullUpdate, LoraUpdate

NUM_TOKENS, MAX_RESPONSE = 64, 24


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A student and a teacher of one family.

    rows: of their matrices. ends: end-of-sequence ids of the student's generation config;
    teacher_ends: of the teacher's, which the student stops at too.
    """

    family: str
    student_rows: int = NUM_TOKENS
    teacher_rows: int = NUM_TOKENS
    ends: tuple[int, ...] = (2,)
    teacher_ends: tuple[int, ...] = (2,)
    update: FullUpdate | LoraUpdate = field(default_factory=FullUpdate)

    @property
    def all_ends(self) -> frozenset[int]:
        """Where both models stop."""
        return frozenset((*self.ends, *self.teacher_ends))


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a trial saw; errors are the largest differences of log-probabilities, in nats.

    gap_in_step: mean over tokens of the same, as the learner tells it of the packed batch.
    moved: share of the trained tensors that the step changed.
    responses: token ids and how each ended. greedy: what engine and learner decode, after publish.
    """

    error_before: float
    gap_in_step: float
    error_of_teacher: float
    error_after: float
    error_of_export: float
    moved: float
    responses: list[tuple[list[int], str]]
    greedy: tuple[list[list[int]], list[list[int]]]
    exported: dict[str, Any]


def set_environment(variables: dict[str, str]) -> None:
    """For the process that trials run in, before it imports torch and vLLM."""
    os.environ.update(variables)


def run_program(program: str) -> str:
    """What a program prints, run in this process, whose imports it finds made."""
    with redirect_stdout(io.StringIO()) as said:
        exec(program, {})
    return said.getvalue()


def run_trial(variant: Variant, folder: Path) -> Seen:
    """Rollout, scoring, one step, publish into the running engine, export, each told apart."""
    from tiny_families import save_family

    from distill_system.rollout.sampling import Sampling

    save_family(
        folder / "student",
        variant.family,
        num_rows=variant.student_rows,
        end_ids=list(variant.ends),
        seed=1,
    )
    save_family(folder / "teacher", variant.family, num_rows=variant.teacher_rows, seed=2)
    warm = Sampling(temperature=1.0, max_response_tokens=MAX_RESPONSE)
    worker = _build_worker(folder / "student", variant)
    try:
        _start(worker, folder / "student")
        learner = _build_learner(folder, variant)
        written = worker.generate(_prompts(), warm, 0, "first")
        before = _error(learner.model, written)
        _connect(learner, worker)
        moved, teacher_error, gap = _learn(learner, folder / "teacher", written)
        [received] = learner.start_publish(1)
        received.result(timeout=30.0)
        rewritten = worker.generate(_prompts(), warm, 0, "second")
        after = _error(learner.model, rewritten)
        cold = Sampling(temperature=0.0, max_response_tokens=MAX_RESPONSE)
        greedy = worker.generate(_prompts(4), cold, 0, "greedy")
        export_error, exported = _export(learner, folder / "export", rewritten)
        return Seen(
            error_before=before,
            gap_in_step=gap,
            error_of_teacher=teacher_error,
            error_after=after,
            error_of_export=export_error,
            moved=moved,
            responses=[(t.response_ids.tolist(), str(t.finish)) for t in [*written, *rewritten]],
            greedy=(
                [t.response_ids.tolist() for t in greedy],
                [_decode_greedily(learner.model, t, variant.all_ends) for t in greedy],
            ),
            exported=exported,
        )
    finally:
        _shut_down(worker)


def run_teacher_trial(family: str, folder: Path) -> float:
    """A teacher's own engine against its scorer: the largest difference in nats."""
    from tiny_families import save_family

    from distill_system.rollout.sampling import Sampling

    save_family(folder, family)
    worker = _build_worker(folder, Variant(family=family))
    try:
        _start(worker, folder)
        warm = Sampling(temperature=1.0, max_response_tokens=MAX_RESPONSE)
        written = worker.generate(_prompts(), warm, 0, "first")
        read = _build_scorer(folder).read_logprobs(written)
        pairs = zip(written, read, strict=True)
        return float(max(np.abs(t.behaviour_logprobs - logprobs).max() for t, logprobs in pairs))
    finally:
        _shut_down(worker)


def _start(worker: Any, model: Path) -> None:
    """Build the engine, and leave transformers' classes as they were.

    Where vLLM has no code of its own for a family it takes the library's, and decorates its class
    for its own compilation: no other instance of it could be made in this process.
    """
    import torch
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        kind = type(AutoModel.from_config(AutoConfig.from_pretrained(model)))
    before = {name: getattr(kind, name) for name in ("__init__", "__call__")}
    bases = kind.__bases__
    worker.ready()
    if kind.__bases__ != bases:
        kind.__bases__ = bases
        for name, method in before.items():
            setattr(kind, name, method)


def _build_scorer(teacher: Path) -> Any:
    from distill_system.config.rollout import ScoringConfig
    from distill_system.scoring import TeacherScorer

    return TeacherScorer(
        model_path=str(teacher),
        config=ScoringConfig(),
        vocabulary_chunk_tokens=50,
        uses_gpu=False,
        vocabulary_size=NUM_TOKENS,
    )


def _build_worker(model: Path, variant: Variant) -> Any:
    from distill_system.config.rollout import EngineConfig
    from distill_system.records import Author
    from distill_system.rollout import RolloutWorker

    return RolloutWorker(
        name="student_rollout-0",
        model_path=str(model),
        author=Author.STUDENT,
        engine=EngineConfig(max_num_sequences=16, kv_cache_mebibytes=16),
        max_model_length=64,
        uses_gpu=False,
        weight_transfer_backend="gloo",
        vocabulary_size=NUM_TOKENS,
        stop_token_ids=sorted(variant.all_ends),
    )


def _build_learner(folder: Path, variant: Variant) -> Any:
    from one_rank import one_rank

    from distill_system.config.model import OptimizerConfig
    from distill_system.config.objective import AmmdConfig
    from distill_system.learner import ModelSource

    return one_rank(
        ModelSource(
            path=str(folder / "student"),
            teacher_path=str(folder / "teacher"),
            vocabulary_size=NUM_TOKENS,
            update=variant.update,
        ),
        objective=AmmdConfig(),
        optimizer=OptimizerConfig(learning_rate=3e-2, warmup_steps=0),
        total_steps=1,
        max_response_tokens=MAX_RESPONSE,
        timeout_seconds=30.0,
    )


def _connect(learner: Any, worker: Any) -> None:
    from fakes.threaded_calls import ThreadedCalls

    from distill_system.weights import FanOutClient

    address, port = learner.address()
    client = FanOutClient(ThreadedCalls([worker]), [1])
    learner.connect_rollouts("gloo", client, address, port, 1, 30.0)


def _learn(learner: Any, teacher: Path, written: list[Any]) -> tuple[float, float, float]:
    """One step on both streams: what moved, the scorer's error, the learner's gap."""
    from dataclasses import replace

    import torch

    from distill_system.config.objective import TeacherNeeds
    from distill_system.learner.collate import StreamTotals
    from distill_system.records import Author, Stream, TrajectoryChunk

    scorer = _build_scorer(teacher)
    needs = TeacherNeeds(features=True, expected_embedding=True, logprobs=True)
    off = [replace(t, author=Author.TEACHER, weight_versions=()) for t in written]
    chunks = [
        TrajectoryChunk(stream=Stream.OFF_POLICY, trajectories=tuple(off)),
        TrajectoryChunk(stream=Stream.ON_POLICY, trajectories=tuple(written)),
    ]
    targets = [scorer.score(chunk, needs) for chunk in chunks]
    plain = _load_plain(teacher)
    truth = [_logprobs(plain, trajectory) for trajectory in written]
    said = [target.logprobs for target in targets[1]]
    trained = [p for p in learner.model.parameters() if p.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    totals = {chunk.stream: StreamTotals.of(chunk.trajectories) for chunk in chunks}
    result = learner.step(0, chunks, totals, *targets)
    assert np.isfinite(result.metrics["learner/loss"])
    moved = [not torch.equal(*pair) for pair in zip(trained, before, strict=True)]
    gaps = (np.abs(a - b).max() for a, b in zip(said, truth, strict=True))
    return float(np.mean(moved)), float(max(gaps)), result.metrics["learner/logprob_gap"]


def _export(learner: Any, folder: Path, written: list[Any]) -> tuple[float, dict[str, Any]]:
    from transformers import GenerationConfig

    learner.export(str(folder))
    reloaded = _load_plain(folder)
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    rows = int(reloaded.get_output_embeddings().weight.shape[0])
    return _error(reloaded, written), {"ends": ends, "rows": rows}


def _load_plain(folder: Path) -> Any:
    """As transformers reads it, with its attention written out."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def _prompts(count: int = 16) -> list[Any]:
    from distill_system.records import Prompt

    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 20, count)
    tokens = (rng.integers(4, NUM_TOKENS, length).astype(np.int32) for length in lengths)
    return [Prompt(prompt_id=f"p{i}", token_ids=ids, text="") for i, ids in enumerate(tokens)]


def _error(model: Any, trajectories: list[Any]) -> float:
    """Of the engine's log-probabilities, against a softmax over the tokens alone."""
    gaps = (np.abs(t.behaviour_logprobs - _logprobs(model, t)) for t in trajectories)
    return float(max(gap.max() for gap in gaps))


def _logprobs(model: Any, trajectory: Any) -> np.ndarray:
    import torch

    ids = torch.tensor(trajectory.token_ids.tolist())
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, trajectory.num_prompt_tokens - 1 : -1]
    rows = logits[:, :NUM_TOKENS].log_softmax(-1)
    response = ids[trajectory.num_prompt_tokens :, None]
    return np.asarray(rows.gather(-1, response)[:, 0])


def _decode_greedily(model: Any, trajectory: Any, ends: frozenset[int]) -> list[int]:
    import torch

    ids = trajectory.token_ids[: trajectory.num_prompt_tokens].tolist()
    response: list[int] = []
    while len(response) < MAX_RESPONSE and not ends & {*response[-1:]}:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + response])).logits[0, -1, :NUM_TOKENS]
        response.append(int(logits.argmax()))
    return response


def _shut_down(worker: Any) -> None:
    """Leave nothing of this engine to the next one of this process."""
    from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

    worker._engine._engine.engine_core.shutdown()
    destroy_model_parallel()
    destroy_distributed_environment()

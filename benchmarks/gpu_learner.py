"""The learner on one GPU: a step of a 1B student in every form, offload, and equal bits.

The student is a Llama of random weights, what the teacher says is drawn at random: neither changes
the time of a step or its memory.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from gpu_findings import GIB, H100_FLOPS, Findings, count_synchronisations, relative_error
from learner_case import SEED, count_flops
from transformers import LlamaConfig, LlamaForCausalLM

from distill_system.config.model import (
    ArchitectureConfig,
    FullUpdate,
    LearnerConfig,
    LoraUpdate,
    OptimizerConfig,
)
from distill_system.config.objective import AmmdConfig, ObjectiveConfig, TokenMatchingConfig
from distill_system.config.objective.token_losses import ReverseKlConfig
from distill_system.language_model import build_language_model
from distill_system.learner import Learner, ModelSource
from distill_system.learner import student as student_module
from distill_system.learner.collate import StreamTotals
from distill_system.learner.microbatches import Microbatches
from distill_system.learner.sharding import gather
from distill_system.planning import LearnerLoad, architecture_shape, learner_memory
from distill_system.records import (
    Author,
    Finish,
    Stream,
    TeacherTargets,
    Trajectory,
    TrajectoryChunk,
    VersionSpan,
)
from distill_system.weights.digest import Digest

FORK = multiprocessing.get_context("fork")
CPU = torch.device("cpu")
REVERSE_KL = TokenMatchingConfig(
    type="token_matching",
    on_policy=ReverseKlConfig(type="reverse_kl"),
    on_policy_weight=1.0,
)
AMMD = AmmdConfig()
THREADS = 8
UTILISATION_AIM, PLAN_AIM = 0.45, 0.10
AIMED = ("reverse KL", "ammd", "ammd, compiled")
"""The forms that are to be fast."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A student, its teacher's sizes, and the sequences of one step."""

    architecture: ArchitectureConfig
    vocabulary: int
    teacher_hidden: int
    actions: int
    sequences: int
    prompt_tokens: int
    response_tokens: int

    @property
    def teacher(self) -> ArchitectureConfig:
        """As large as the learner sees it: its embeddings alone."""
        return ArchitectureConfig(
            hidden_size=self.teacher_hidden,
            intermediate_size=64,
            num_layers=1,
            num_heads=1,
            tie_word_embeddings=True,
        )


def _shape(hidden: int, inner: int, layers: int, heads: int, **sizes: int) -> Shape:
    return Shape(
        architecture=ArchitectureConfig(
            hidden_size=hidden,
            intermediate_size=inner,
            num_layers=layers,
            num_heads=heads,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
        ),
        **sizes,
    )


ONE_BILLION = _shape(
    2048, 8192, 16, 32, vocabulary=128_256, teacher_hidden=2048, actions=256, sequences=20,
    prompt_tokens=256, response_tokens=512,
)  # fmt: skip
MEDIUM = _shape(
    1024, 4096, 12, 16, vocabulary=32_000, teacher_hidden=1024, actions=256, sequences=16,
    prompt_tokens=128, response_tokens=384,
)  # fmt: skip
TINY = _shape(
    64, 96, 2, 2, vocabulary=128, teacher_hidden=32, actions=16, sequences=4,
    prompt_tokens=5, response_tokens=7,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One form of the step."""

    name: str
    objective: ObjectiveConfig = AMMD
    config: LearnerConfig = field(default_factory=LearnerConfig)
    optimizer: str = "adamw"
    update: FullUpdate | LoraUpdate = field(default_factory=FullUpdate)


def prove_steps(findings: Findings) -> None:
    """A 1B student's step in every form: speed, losses against float32, memory against the plan."""
    shape = TINY if findings.small else ONE_BILLION
    variants = make_variants(shape, findings)
    predictions = _start_predictions(shape, variants, findings)  # forks: before CUDA begins
    peak_flops = _measure_matmul(findings)
    first: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        save_teacher(folder, shape, findings.device)
        for variant in variants:
            with findings.part(variant.name):
                first[variant.name] = _run_variant(
                    findings, shape, variant, folder, peak_flops, predictions.get(variant.name)
                )
    _compare_first_steps(findings, first)


def make_variants(shape: Shape, findings: Findings) -> list[Variant]:
    """What the step is run as; float32 last but for the compiled form, which may take long."""
    limit = shape.sequences // 4 * (shape.prompt_tokens + shape.response_tokens)
    low = LearnerConfig(compute_dtype="bfloat16", threads=THREADS if findings.on_gpu else 1)
    chunk = 64 if findings.small else 4096
    low = low.model_copy(update={"vocabulary_chunk_tokens": chunk})

    def changed(**keys: Any) -> LearnerConfig:
        return low.model_copy(update=keys)

    lora = LoraUpdate(type="lora", rank=16)
    parts = {"max_tokens_per_microbatch": limit}
    variants = [
        Variant(name="reverse KL", objective=REVERSE_KL, config=low),
        Variant(name="ammd", config=low),
        Variant(name="ammd, chunks of 512", config=changed(vocabulary_chunk_tokens=512)),
        Variant(name="ammd, microbatches", config=changed(**parts)),
        Variant(name="ammd, checkpointing", config=changed(activation_checkpointing=True)),
        Variant(name="reverse KL, LoRA", objective=REVERSE_KL, config=low, update=lora),
        Variant(name="reverse KL, Muon", objective=REVERSE_KL, config=low, optimizer="muon"),
    ]
    exact = changed(compute_dtype="float32", activation_checkpointing=True, **parts)
    variants += [
        Variant(name="reverse KL, float32", objective=REVERSE_KL, config=exact),
        Variant(name="ammd, float32", config=exact),
    ]
    if findings.on_gpu:  # a CPU's compiler is not everywhere, and takes minutes
        compiled = changed(compile=True)
        variants.append(Variant(name="ammd, compiled", config=compiled))
    return variants


def _run_variant(
    findings: Findings,
    shape: Shape,
    variant: Variant,
    folder: str,
    peak_flops: float,
    prediction: Connection | None,
) -> dict[str, float]:
    """Steps of one form; returns the metrics of the first."""
    batch = make_batch(shape, variant.objective)
    with connected(shape, variant, folder, findings, drawn_on=findings.device) as learner:
        number = iter(range(10_000))

        def step() -> Any:
            return learner.step(next(number), *batch)

        first: dict[str, float] = step().metrics
        row: dict[str, Any] = {
            "first_loss": first["learner/loss"],
            "first_gradient_norm": first["learner/gradient_norm"],
        }
        if variant.config.compute_dtype == "bfloat16":
            step()
            row |= _measure_steps(findings, shape, variant, batch, learner, step, peak_flops)
    row["plan"] = {} if prediction is None else prediction.recv()
    if "peak_gib" in row and "gib" in row["plan"]:
        row["plan_over_peak"] = row["plan"]["gib"] / row["peak_gib"]
        if not variant.config.compile:  # the plan knows nothing of what a compiler fuses
            error = abs(row["plan_over_peak"] - 1.0)
            what = f"{variant.name}: the plan's memory against the peak"
            findings.demand(what, error, at_most=PLAN_AIM, is_aim=True)
    findings.note(variant.name, row)
    if "share_of_data_sheet" in row and findings.on_gpu and variant.name in AIMED:
        what = f"{variant.name}: model FLOP utilisation, of the data sheet's bfloat16"
        findings.demand(what, row["share_of_data_sheet"], at_least=UTILISATION_AIM, is_aim=True)
    return first


def _measure_steps(
    findings: Findings,
    shape: Shape,
    variant: Variant,
    batch: tuple[Any, ...],
    learner: Learner,
    step: Callable[[], Any],
    peak_flops: float,
) -> dict[str, Any]:
    """Time, memory and kernels of steps after the second."""
    plain = variant.name in AIMED
    milliseconds = findings.time(step, repeats=4 if plain else 2, warm_up=1 if plain else 0)
    peak_mib = findings.peak_mib(step)
    tokens = sum(chunk.num_tokens for chunk in batch[0])
    every = [t for chunk in batch[0] for t in chunk.trajectories]
    rate = count_flops(shape, every) / milliseconds * 1e3
    row: dict[str, Any] = {
        "step_ms": milliseconds,
        "tokens_per_second": tokens / milliseconds * 1e3,
        "tflops": rate / 1e12,
        "share_of_data_sheet": rate / H100_FLOPS,
        "share_of_matmul": rate / peak_flops,
    }
    if peak_mib is not None:
        held = torch.cuda.memory_allocated(findings.device)
        row["peak_gib"] = peak_mib / 1024 + held / GIB
    if plain:
        row["phases_ms"] = _time_phases(findings, learner, step)
        row["kernels_ms"] = findings.kernels(step, count=24)
    if plain and findings.on_gpu:
        row["host_waits"] = count_synchronisations(step)
    if variant.name == "ammd":
        row["adamw_ms"] = _time_optimizers(findings, learner)
    return row


def _time_phases(findings: Findings, learner: Learner, step: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of a step's phases, the GPU waited for after each."""
    phases: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            findings.synchronise()
            started = time.perf_counter()
            result = function(*arguments, **keywords)
            findings.synchronise()
            phases[name] = 1e3 * (time.perf_counter() - started)
            return result

        return call

    with ExitStack() as stack:
        for owner, name in (
            (learner, "_collate"),
            (Microbatches, "read"),
            (learner.objective, "compute_loss"),
            (Microbatches, "backward"),
            (learner, "_update"),
        ):
            slow = timed(name.removeprefix("_"), getattr(owner, name))
            stack.enter_context(patch.object(owner, name, slow))
        timed("step", step)()
    return phases


def _time_optimizers(findings: Findings, learner: Learner) -> dict[str, float]:
    """AdamW's own step in torch's three forms, on these parameters."""
    parameters = list(learner.model.parameters())
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-4)
    times = {}
    forms: dict[str, dict[str, bool]] = {
        "default": {},
        "fused": {"fused": True},
        "one by one": {"foreach": False},
    }
    learner.optimizers = []  # makes room for the states of these
    for name, form in forms.items():
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, **form)
        times[name] = findings.time(optimizer.step, repeats=3)
        del optimizer
        findings.release()
    for parameter in parameters:
        parameter.grad = None
    return times


def _compare_first_steps(findings: Findings, first: dict[str, dict[str, float]]) -> None:
    """The first step starts from equal weights in every form."""
    for name, metrics in first.items():
        exact = first.get(f"{name.split(',')[0]}, float32")
        if exact is None or name.endswith("float32"):
            continue
        for key, limit in (("learner/loss", 2e-2), ("learner/gradient_norm", 5e-2)):
            if "LoRA" in name and key == "learner/gradient_norm":
                continue  # of other parameters
            error = abs(metrics[key] - exact[key]) / abs(exact[key])
            what = f"{name}: first {key.removeprefix('learner/')} against float32, relative"
            findings.demand(what, error, at_most=limit)


def _start_predictions(
    shape: Shape, variants: list[Variant], findings: Findings
) -> dict[str, Connection]:
    """The plan of every form, each in a process of its own beside the measurements.

    In the small form of two, since each takes a processor for seconds.
    """
    pipes = {}
    for variant in variants[:2] if findings.small else variants:
        ours, theirs = FORK.Pipe(duplex=False)
        arguments = (shape, variant, findings.on_gpu, theirs)
        FORK.Process(target=_predict, args=arguments, daemon=True).start()
        theirs.close()
        pipes[variant.name] = ours
    return pipes


def _predict(shape: Shape, variant: Variant, on_gpu: bool, pipe: Connection) -> None:
    torch.set_num_threads(1)
    load = LearnerLoad(
        student=architecture_shape(shape.architecture, vocabulary=shape.vocabulary),
        config=variant.config.model_copy(update={"compile": False}),
        optimizer=_optimizer(variant),
        chunks=make_batch(shape, variant.objective)[0],
        on_gpu=on_gpu,
        update=variant.update,
        objective=variant.objective,
        teacher=architecture_shape(shape.teacher, vocabulary=shape.vocabulary),
        action_columns=min(shape.actions, shape.teacher_hidden),
        teacher_dtype="bfloat16",
    )
    try:
        memory = learner_memory(load)
    except Exception as error:
        pipe.send({"problem": repr(error)[:500]})
        return
    parts = {name: memory.parts[name] / GIB for name in memory.by_size}
    pipe.send({"gib": memory.num_bytes / GIB, "moment": memory.moment, "parts": parts})


def _optimizer(variant: Variant) -> OptimizerConfig:
    return OptimizerConfig(type=variant.optimizer, learning_rate=1e-5, warmup_steps=0)


def build_learner(
    shape: Shape,
    variant: Variant,
    teacher: str,
    device: torch.device,
    *,
    drawn_on: torch.device | None = None,
) -> Learner:
    """The learner of one rank. drawn_on: where its random weights come from; None: its device.

    A CPU takes 15 s to draw a billion.
    """

    def build_here(architecture: ArchitectureConfig, **keywords: Any) -> Any:
        with drawn_on or device:
            return build_language_model(architecture, **keywords)

    with patch.object(student_module, "build_language_model", build_here):
        return Learner(
            rank=0,
            world_size=1,
            source=ModelSource(
                architecture=shape.architecture,
                vocabulary_size=shape.vocabulary,
                teacher_path=teacher,
                teacher_dtype="bfloat16",
                action_dimension=shape.actions,
                update=variant.update,
            ),
            objective=variant.objective,
            optimizer=_optimizer(variant),
            config=variant.config,
            total_steps=10_000,
            max_response_tokens=shape.response_tokens,
            seed=SEED,
            uses_gpu=device.type == "cuda",
            timeout_seconds=120.0,
        )


def save_teacher(folder: str, shape: Shape, device: torch.device) -> None:
    """One block in bfloat16: the learner reads its embeddings alone."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.teacher_hidden,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(SEED)
    with device:
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)


def make_batch(shape: Shape, objective: ObjectiveConfig) -> tuple[Any, ...]:
    """Chunks, totals and targets of one step: all on-policy, or half of it in each stream."""
    streams = [stream for stream in Stream if objective.reads(stream.value)]
    generator = np.random.default_rng(SEED)
    chunks, targets = [], []
    for stream in streams:
        needs = objective.teacher_needs(stream.value)
        trajectories = tuple(
            write_trajectory(generator, shape, stream, index)
            for index in range(shape.sequences // len(streams))
        )
        chunks.append(TrajectoryChunk(stream=stream, trajectories=trajectories))
        targets.append([_target(generator, shape, needs, t) for t in trajectories])
    totals = {chunk.stream: StreamTotals.of(chunk.trajectories) for chunk in chunks}
    return chunks, totals, *targets


def write_trajectory(generator: Any, shape: Shape, stream: Stream, index: int) -> Trajectory:
    responses = shape.response_tokens
    length = shape.prompt_tokens + responses
    ours = stream is Stream.ON_POLICY
    uniform = -float(np.log(shape.vocabulary))
    return Trajectory(
        trajectory_id=f"{stream.value}-{index}",
        prompt_id=f"{stream.value}-{index}",
        author=Author.STUDENT if ours else Author.TEACHER,
        token_ids=generator.integers(4, shape.vocabulary, length).astype(np.int32),
        num_prompt_tokens=shape.prompt_tokens,
        behaviour_logprobs=np.full(responses, uniform, dtype=np.float32),
        temperature=1.0,
        finish=Finish.LENGTH,
        weight_versions=(VersionSpan(version=0, start=0, end=responses),) if ours else (),
    )


def _target(generator: Any, shape: Shape, needs: Any, trajectory: Trajectory) -> TeacherTargets:
    """As a scorer in bfloat16 sends it."""
    tokens = trajectory.num_response_tokens
    columns = min(shape.actions, shape.teacher_hidden)

    def draw(width: int) -> np.ndarray:
        return generator.standard_normal((tokens, width), dtype=np.float32).astype(np.float16)

    return TeacherTargets(
        trajectory_id=trajectory.trajectory_id,
        num_tokens=tokens,
        features=draw(shape.teacher_hidden) if needs.features else None,
        expected_embedding=draw(columns) / np.float16(30) if needs.expected_embedding else None,
    )


def _measure_matmul(findings: Findings) -> float:
    """Operations per second of a large square product in bfloat16."""
    size = 8192 if findings.on_gpu else 256
    left, right = (
        torch.randn(size, size, device=findings.device, dtype=torch.bfloat16) for _ in range(2)
    )
    flops = 2e3 * size**3 / findings.time(lambda: left @ right, repeats=10, warm_up=3)
    findings.note("matmul_tflops", flops / 1e12)
    return flops


def prove_offload(findings: Findings) -> None:
    """learner.offload on one rank: FSDP2, NCCL, pinned copies; step, save, load, equal weights."""
    shape = TINY if findings.small else MEDIUM
    config = LearnerConfig(
        compute_dtype="bfloat16",
        offload=True,
        threads=THREADS if findings.on_gpu else 1,
        vocabulary_chunk_tokens=64 if findings.small else 4096,
    )
    away = Variant(name="offload", config=config)
    here = replace(away, config=config.model_copy(update={"offload": False}))
    predictions = _start_predictions(shape, [away], findings)
    batch = make_batch(shape, AMMD)
    with tempfile.TemporaryDirectory() as folder:
        save_teacher(f"{folder}/teacher", shape, findings.device)
        with connected(shape, away, f"{folder}/teacher", findings) as learner:
            _step_offloaded(findings, learner, batch, predictions["offload"])
            learner.start_save(f"{folder}/checkpoint")
            learner.finish_save(True)
            kept = _weights(learner)
            after = learner.step(3, *batch).metrics
            expected = _weights(learner)
        with connected(shape, away, f"{folder}/teacher", findings) as learner:
            learner.load(f"{folder}/checkpoint")
            loaded = _weights(learner)
            same = all(torch.equal(loaded[name], kept[name]) for name in kept)
            findings.require("weights that are loaded are those that were saved", same)
            again = learner.step(3, *batch).metrics
            error = max(relative_error(w, expected[n]) for n, w in _weights(learner).items())
            findings.demand("weights a step after: saved and loaded, relative", error, at_most=1e-4)
            losses = (after["learner/loss"], again["learner/loss"])
            gap = abs(losses[0] - losses[1]) / abs(losses[0])
            findings.demand("loss a step after: saved and loaded, relative", gap, at_most=1e-3)
        with findings.part("against a learner that stays on the GPU"):
            _compare_with_resident(findings, shape, here, f"{folder}/teacher", batch, kept)


def _step_offloaded(
    findings: Findings, learner: Learner, batch: tuple[Any, ...], prediction: Connection
) -> None:
    for parameter in learner.model.parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        assert local.device.type == "cpu", "at rest in CPU memory"
    if findings.on_gpu:
        pinned = all(p.to_local().is_pinned() for p in learner.model.parameters())
        findings.require("parameters at rest are in pinned CPU memory", pinned)
    number = iter(range(3))
    learner.step(next(number), *batch)
    peak_mib = findings.peak_mib(lambda: learner.step(next(number), *batch))
    held = torch.cuda.memory_allocated(findings.device) / GIB if findings.on_gpu else 0.0
    seconds = findings.time(lambda: learner.step(next(number), *batch), repeats=1, warm_up=0) / 1e3
    row: dict[str, Any] = {"step_seconds": seconds, "plan": prediction.recv()}
    if peak_mib is not None and "gib" in row["plan"]:
        row["peak_gib"] = peak_mib / 1024 + held
        error = abs(row["plan"]["gib"] / row["peak_gib"] - 1.0)
        what = "offload: the plan's memory against the peak"
        findings.demand(what, error, at_most=PLAN_AIM, is_aim=True)
    findings.note("offload", row)


def _compare_with_resident(
    findings: Findings,
    shape: Shape,
    variant: Variant,
    teacher: str,
    batch: tuple[Any, ...],
    kept: dict[str, torch.Tensor],
) -> None:
    with connected(shape, variant, teacher, findings) as learner:
        before = _weights(learner)
        for step in range(3):
            learner.step(step, *batch)
        after = _weights(learner)
        milliseconds = findings.time(lambda: learner.step(3, *batch), repeats=2, warm_up=0)
    moved = {name: kept[name] - before[name] for name in kept}
    ours = {name: weight - before[name] for name, weight in after.items()}
    joined = [torch.cat([each[name].ravel() for name in kept]) for each in (ours, moved)]
    # AdamW's first steps go by the signs of gradients: where these are near zero bfloat16 decides.
    error = relative_error(*joined)
    findings.demand("way of three steps: resident and offloaded, relative", error, at_most=0.3)
    findings.note("resident_step_seconds", milliseconds / 1e3)


@contextmanager
def connected(
    shape: Shape,
    variant: Variant,
    teacher: str,
    findings: Findings,
    *,
    drawn_on: torch.device = CPU,
) -> Iterator[Learner]:
    """The learner, in a process group of its rank alone where FSDP2 wraps its model."""
    learner = build_learner(shape, variant, teacher, findings.device, drawn_on=drawn_on)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    learner.connect("127.0.0.1", port)
    try:
        yield learner
    finally:
        learner.close()


def _weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {
        name: gather(parameter.detach()).cpu().clone()
        for name, parameter in learner.model.named_parameters()
    }


def prove_equal_bits(findings: Findings) -> None:
    """Two runs of three steps under deterministic algorithms end in the same bits."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read as CUDA begins
    shape = TINY if findings.small else MEDIUM
    config = LearnerConfig(
        compute_dtype="bfloat16",
        threads=THREADS if findings.on_gpu else 1,
        vocabulary_chunk_tokens=64 if findings.small else 4096,
    )
    parts = {
        "max_tokens_per_microbatch": shape.sequences
        // 2
        * (shape.prompt_tokens + shape.response_tokens),
        "activation_checkpointing": True,
    }
    variants = [
        Variant(name="ammd", config=config),
        Variant(name="reverse KL", objective=REVERSE_KL, config=config),
        Variant(name="ammd, microbatches", config=config.model_copy(update=parts)),
    ]
    with tempfile.TemporaryDirectory() as folder:
        save_teacher(folder, shape, findings.device)
        for variant in variants:
            for deterministic in (True, False):
                name = f"{variant.name}, {'deterministic' if deterministic else 'as it is'}"
                with findings.part(name):
                    torch.use_deterministic_algorithms(deterministic)
                    run = _run_of(shape, variant, folder, findings)
                    same = len({run() for _ in range(2)}) == 1
                    findings.note(f"{name}: equal bits", same)
                    if deterministic:
                        findings.require(f"{name}: two runs end in the same bits", same)
    torch.use_deterministic_algorithms(False)


def _run_of(shape: Shape, variant: Variant, folder: str, findings: Findings) -> Callable[[], int]:
    batch = make_batch(shape, variant.objective)

    def run() -> int:
        with connected(shape, variant, folder, findings, drawn_on=findings.device) as learner:
            for step in range(3):
                learner.step(step, *batch)
            digest = Digest()
            for parameter in learner.model.parameters():
                whole = gather(parameter.detach()).contiguous()
                digest.add(whole.view(-1).view(torch.uint8))
        findings.release()
        return digest.value

    return run

"""The scorer and the vocabulary on a GPU: what a teacher's targets cost, and chunks of all sizes.

Axes: N tokens, H hidden size, F teacher feature size, V vocabulary, E action-embedding size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from gpu_findings import H100_FLOPS, Findings
from gpu_learner import TINY, write_trajectory
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from distill_system.config.objective import MOMENTS
from distill_system.config.objective.needs import SIGNALS
from distill_system.config.rollout import ScoringConfig
from distill_system.language_model import (
    PACKED_ATTENTION,
    SequenceBatch,
    check_linear_read,
    check_packed_read,
    read_hidden,
)
from distill_system.objectives import make_action_embeddings, read_vocabulary
from distill_system.objectives.divergences import kl_divergence
from distill_system.objectives.vocabulary import TeacherDistribution, sum_over_vocabulary
from distill_system.records import Stream, TrajectoryChunk
from distill_system.scoring import TeacherScorer
from distill_system.scoring import scorer as scorer_module

CHUNKS = (512, 1024, 2048, 4096, 8192)
ACTIONS = 256


def prove_scorer(findings: Findings) -> None:
    """A 3B teacher in bfloat16: tokens per second, and what its targets' conversion takes."""
    config = _teacher_config(findings.small)
    scorer = _build_scorer(findings, config)
    chunk, batch = _make_chunk(findings, config.vocab_size)
    tokens = chunk.num_tokens
    with torch.inference_mode():
        scorer.score(chunk, MOMENTS)
        whole = findings.time(lambda: scorer.score(chunk, MOMENTS), repeats=3, warm_up=0)
        forward = findings.time(lambda: read_hidden(scorer.model, batch), repeats=3)
        hidden_NH = read_hidden(scorer.model, batch)
        vocabulary = findings.time(lambda: _read(scorer, hidden_NH, batch), repeats=3)
        expected_NE = _read(scorer, hidden_NH, batch)
        rows = {"features": hidden_NH, "expected_embedding": expected_NE}
        ways = {"scorer": lambda: _to_wire(scorer, rows), "host": lambda: _convert_on_host(rows)}
        ways["device"] = lambda: _convert_on_device(rows)
        made = {name: way() for name, way in ways.items()}
        times = {name: findings.time(way, repeats=3) for name, way in ways.items()}
    for name in rows:
        same = all(np.array_equal(each[name], made["host"][name]) for each in made.values())
        findings.require(f"{name}: every way of conversion gives the same bits", same)
    parameters = sum(p.numel() for p in scorer.model.parameters())
    flops = 2.0 * parameters * tokens  # the unembedding is read once for each token as well
    findings.note(
        "scorer",
        {
            "parameters": parameters,
            "tokens": tokens,
            "response_tokens": chunk.num_response_tokens,
            "score_ms": whole,
            "tokens_per_second": tokens / whole * 1e3,
            "share_of_data_sheet": flops / whole * 1e3 / H100_FLOPS,
            "forward_ms": forward,
            "vocabulary_ms": vocabulary,
            "conversion_share": times["scorer"] / whole,
            "conversion_ms": times,
            "peak_mib": findings.peak_mib(lambda: scorer.score(chunk, MOMENTS)),
            "kernels_ms": findings.kernels(lambda: scorer.score(chunk, MOMENTS), count=10),
        },
    )
    if findings.on_gpu:
        what = "share of a scorer's call that converts its targets"
        findings.demand(what, times["scorer"] / whole, at_most=0.1, is_aim=True)


def _teacher_config(small: bool) -> LlamaConfig:
    sizes = (64, 96, 2, 4, 2, 128) if small else (3072, 8192, 28, 24, 8, 128_256)
    hidden, inner, layers, heads, groups, vocabulary = sizes
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
    )


def _build_scorer(findings: Findings, config: LlamaConfig) -> TeacherScorer:
    """The scorer on a model that is drawn where it computes, checked as a loaded one is."""

    def build(path: str, *, dtype: torch.dtype, device: torch.device, **rest: Any) -> Any:
        torch.manual_seed(0)
        with findings.device:
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=PACKED_ATTENTION
            )
        model = model.eval()
        check_linear_read(model, path)
        check_packed_read(model, path)
        return model

    with patch.object(scorer_module, "load_language_model", build):
        return TeacherScorer(
            model_path="random weights",
            config=ScoringConfig(dtype="bfloat16", max_tokens_per_batch=16_384),
            vocabulary_chunk_tokens=64 if findings.small else 4096,
            uses_gpu=findings.on_gpu,
            action_dimension=ACTIONS,
        )


def _make_chunk(findings: Findings, vocabulary: int) -> tuple[TrajectoryChunk, SequenceBatch]:
    sizes = (
        {"prompt_tokens": 3, "response_tokens": 5, "sequences": 3}
        if findings.small
        else {"prompt_tokens": 256, "response_tokens": 768, "sequences": 16}
    )
    shape = replace(TINY, vocabulary=vocabulary, **sizes)
    generator = np.random.default_rng(0)
    written = tuple(
        write_trajectory(generator, shape, Stream.OFF_POLICY, i) for i in range(sizes["sequences"])
    )
    chunk = TrajectoryChunk(stream=Stream.OFF_POLICY, trajectories=written)
    return chunk, SequenceBatch.collate(written, findings.device, max_tokens=16_384)


def _read(scorer: TeacherScorer, hidden_NH: Tensor, batch: SequenceBatch) -> Tensor:
    return read_vocabulary(
        hidden_NH,
        batch.token_ids_N,
        scorer._unembedding(),
        scorer._actions(),
        chunk_tokens=scorer.chunk_tokens,
    ).expected_embedding_NE


def _to_wire(scorer: TeacherScorer, rows: dict[str, Tensor]) -> dict[str, np.ndarray]:
    signals = {signal.name: signal for signal in SIGNALS}
    return {name: scorer._to_wire(tensor, signals[name]) for name, tensor in rows.items()}


def _convert_on_host(rows: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """float32 through pageable memory, then numpy on one thread."""
    made = {}
    for name, tensor in rows.items():
        values = tensor.float().cpu().numpy()
        assert np.abs(values).max() < np.finfo(np.float16).max, "random weights stay small"
        made[name] = values.astype(np.float16)
    return made


def _convert_on_device(rows: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Cast and looked at where it is made, through pinned memory."""
    halves = {name: tensor.half() for name, tensor in rows.items()}
    finite = torch.stack([half.isfinite().all() for half in halves.values()])
    made = {}
    for name, half in halves.items():
        pinned = half.is_cuda
        made[name] = torch.empty(half.shape, dtype=half.dtype, pin_memory=pinned)
        made[name].copy_(half, non_blocking=True)
    assert bool(finite.all()), "waits for the copies before it, too"
    if halves["features"].is_cuda:
        torch.cuda.current_stream().synchronize()
    return {name: tensor.numpy() for name, tensor in made.items()}


def prove_chunks(findings: Findings) -> None:
    """Milliseconds and memory of both reads of the vocabulary, forward and backward, by chunk."""
    tokens, vocabulary, hidden = (40, 96, 32) if findings.small else (8192, 128_256, 4096)
    chunks = (16, 32) if findings.small else CHUNKS
    generator = torch.Generator(findings.device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=findings.device)

    hidden_NH = draw(tokens, hidden).requires_grad_()
    unembedding_VH = (draw(vocabulary, hidden) / hidden**0.5).requires_grad_()
    actions_VE = make_action_embeddings(draw(vocabulary, 64), ACTIONS)
    teacher = TeacherDistribution(
        features_NF=draw(tokens, hidden).half().float(),
        unembedding_VF=(draw(vocabulary, hidden) / hidden**0.5).bfloat16(),
    )
    ids_N = torch.randint(vocabulary, (tokens,), generator=generator, device=findings.device)
    weights_N = torch.full((tokens,), 1.0 / tokens, device=findings.device)

    def moments(chunk: int) -> Tensor:
        rows = read_vocabulary(hidden_NH, ids_N, unembedding_VH, actions_VE, chunk_tokens=chunk)
        return rows.expected_embedding_NE.square().mean() + rows.logprobs_N.mean()

    def divergence(chunk: int) -> Tensor:
        return sum_over_vocabulary(
            hidden_NH,
            ids_N,
            unembedding_VH,
            weights_N,
            lambda part: kl_divergence(part.student_logprobs_cV, part.teacher_logprobs_cV),
            teacher=teacher,
            chunk_tokens=chunk,
        ).total

    losses = {"moments": moments, "reverse_kl": divergence}
    for name, loss in losses.items():
        totals: list[float] = []
        for chunk in chunks:
            with findings.part(f"{name}, chunks of {chunk}"):
                step = partial(_step, findings, partial(loss, chunk), (hidden_NH, unembedding_VH))
                totals.append(step())
                row = {"ms": findings.time(step, repeats=2), "peak_mib": findings.peak_mib(step)}
                findings.note(f"{name}, chunks of {chunk}", row)
        spread = (max(totals) - min(totals)) / abs(totals[0])
        findings.demand(f"{name}: spread of the loss over chunk sizes", spread, at_most=1e-3)
        with findings.part(f"kernels of {name}"):
            findings.note(f"{name}_kernels_ms", findings.kernels(step, count=12))


def _step(findings: Findings, loss: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> float:
    with torch.autocast(findings.device.type, dtype=torch.bfloat16):
        total = loss()
    total.backward()
    for leaf in leaves:
        leaf.grad = None
    return float(total)

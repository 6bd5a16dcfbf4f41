"""Attention inside packed lines on a GPU: against a dense reference, and what float32 costs there.

Axes: T tokens of a line, L of one sequence, h heads, g key and value heads, d head size.
"""

from __future__ import annotations

import contextlib
import io
import os
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_findings import Findings, relative_error
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from distill_system.config.model import ArchitectureConfig, LearnerConfig
from distill_system.language_model import build_language_model
from distill_system.language_model.packed_attention import (
    PackedLayout,
    packed_attention,
    read_line,
)
from distill_system.learner.sharding import prepare_blocks

TESTS = Path(__file__).parents[1] / "tests/gpu"
HEAD_SIZES = (64, 96, 128, 256)
HEADS, KEY_HEADS = 8, (8, 2)
WINDOWS = (None, 100)
LENGTHS = (1, 2, 7, 40, 41, 130, 300, 511)
SMALL_LENGTHS = (1, 2, 7, 24)
BFLOAT16_LIMIT = 2e-2
"""Relative error of what bfloat16 factors make; 4e-3 is usual."""


def prove_attention(findings: Findings) -> None:
    """Packed attention in bfloat16 against float64; its speed; tests/gpu."""
    _run_gpu_tests(findings)
    lengths = SMALL_LENGTHS if findings.small else LENGTHS
    worst = 0.0
    for size, groups, window in product(HEAD_SIZES, KEY_HEADS, WINDOWS):
        name = f"heads of {size}, {HEADS} over {groups}, window {window}"
        with findings.part(name):
            for autocast in (False, True):
                errors = _compare(findings, lengths, size, groups, window, autocast=autocast)
                worst = max(worst, *errors.values())
                for what, error in errors.items():
                    label = f"{name}, {'autocast, ' if autocast else ''}{what}: relative error"
                    findings.demand(label, error, at_most=BFLOAT16_LIMIT)
    findings.note("largest_relative_error", worst)
    with findings.part("checkpointing"):
        _compare_checkpointing(findings, lengths)
    with findings.part("grouped heads in the kernel itself"):
        _try_grouped_kernel(findings, lengths)
    with findings.part("speed"):
        _time_attention(findings)


def prove_float32_attention(findings: Findings) -> None:
    """Which kernel float32 gets at 2,048 tokens with grouped queries, and what it holds."""
    length, sequences, heads, groups, size = (16, 2, 4, 2, 8) if findings.small else (
        2048, 4, 32, 8, 128
    )  # fmt: skip
    square_mib = sequences * heads * length**2 * 4 / 2**20
    findings.note("one_square_of_scores_mib", square_mib)
    forms: dict[str, Any] = {
        "grouped, enable_gqa": (groups, _attend_grouped),
        "grouped, heads repeated": (groups, _attend_repeated),
        "equal heads, enable_gqa": (heads, _attend_grouped),
    }
    for name, (key_heads, attend) in forms.items():
        with findings.part(name):
            shape = (sequences, heads, length, size)
            states = _draw_states(findings, shape, key_heads)
            _measure_float32(findings, name, lambda s=states, a=attend: a(*s), states)
    with findings.part("packed attention as it is"):
        lengths = [length] * sequences
        query, key, value = _draw(findings, lengths, heads, groups, size, torch.float32)
        layout = PackedLayout.build(lengths, findings.device)

        def attend() -> Tensor:
            return _attend(query, key, value, layout, None)

        peak = _measure_float32(findings, "packed attention", attend, (query, key, value))
        if peak is not None:
            findings.demand(
                "packed attention in float32 with grouped queries: memory over one square of "
                "scores", peak / square_mib, at_most=0.9,
            )  # fmt: skip


def _measure_float32(
    findings: Findings, name: str, attend: Any, states: tuple[Tensor, ...]
) -> float | None:
    def step() -> None:
        attend().sum().backward()
        for each in states:
            each.grad = None

    peak = findings.peak_mib(step)
    findings.note(
        name,
        {
            "ms": findings.time(step, repeats=3),
            "peak_mib": peak,
            "kernels": findings.kernels(step, count=4),
        },
    )
    return peak


def _attend_grouped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def _attend_repeated(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = (heads.repeat_interleave(group, dim=1) for heads in (key, value))
    return scaled_dot_product_attention(query, key, value, is_causal=True)


def _draw_states(
    findings: Findings, shape: tuple[int, int, int, int], key_heads: int
) -> tuple[Tensor, ...]:
    sequences, heads, length, size = shape
    return tuple(
        torch.randn(sequences, number, length, size, device=findings.device).requires_grad_()
        for number in (heads, key_heads, key_heads)
    )


def _run_gpu_tests(findings: Findings) -> None:
    """tests/gpu in this process, so that they see what adapt_to_older_torch has done."""
    with findings.part("tests/gpu"):
        if not TESTS.is_dir():
            raise FileNotFoundError(f"{TESTS}: bring tests/gpu along")
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            # No configuration of ours: its options ask for packages that a bare machine lacks.
            options = ["-q", "-rfE", "-c", os.devnull, "--noconftest", "-p", "no:cacheprovider"]
            code = pytest.main([str(TESTS), *options, "-W", "ignore"])
        findings.note("tests_gpu", said.getvalue().strip().splitlines()[-12:])
        findings.require("tests/gpu pass, or are skipped where there is no GPU", code == 0)


def _draw(
    findings: Findings, lengths: Any, heads: int, groups: int, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, [1, h, T, d], with gradients."""
    generator = torch.Generator(findings.device).manual_seed(size + groups)
    query, key, value = (
        torch.randn(1, number, sum(lengths), size, generator=generator, device=findings.device)
        .to(dtype)
        .requires_grad_()
        for number in (heads, groups, groups)
    )
    return query, key, value


def _attend(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, window: int | None
) -> Tensor:
    """[1, T, h, d]."""
    return packed_attention(
        torch.nn.Module(), query, key, value, None, sliding_window=window, packed_layout=layout
    )[0]


def _compare(
    findings: Findings,
    lengths: Any,
    size: int,
    groups: int,
    window: int | None,
    *,
    autocast: bool,
) -> dict[str, float]:
    """Relative errors of the output and of the three gradients."""
    low = _draw(findings, lengths, HEADS, groups, size, torch.bfloat16)
    given = low
    if autocast:  # as rotary embeddings leave them
        given = (low[0].float(), low[1].float(), low[2])
        given = tuple(each.detach().requires_grad_() for each in given)
    exact = tuple(each.detach().double().requires_grad_() for each in low)
    layout = PackedLayout.build(list(lengths), findings.device)
    with torch.autocast(findings.device.type, dtype=torch.bfloat16, enabled=autocast):
        output = _attend(*given, layout, window)
    assert output.dtype is torch.bfloat16, "in the compute precision"
    expected = attend_densely(*exact, lengths, window)
    weights = torch.randn_like(expected)
    output.backward(weights.to(output.dtype))
    expected.backward(weights)
    errors = {"output": relative_error(output, expected)}
    for name, one, other in zip(("query", "key", "value"), given, exact, strict=True):
        errors[f"gradient of {name}"] = relative_error(one.grad, other.grad)
    return errors


def attend_densely(
    query: Tensor, key: Tensor, value: Tensor, lengths: Any, window: int | None
) -> Tensor:
    """The definition: each sequence by itself, a softmax over all pairs; [1, T, h, d]."""
    group = query.shape[1] // key.shape[1]
    key, value = (heads.repeat_interleave(group, dim=1) for heads in (key, value))
    outputs = []
    for parts in zip(*(each[0].split(list(lengths), dim=1) for each in (query, key, value))):  # noqa: B905
        query_hLd, key_hLd, value_hLd = parts
        scores_hLL = query_hLd @ key_hLd.transpose(1, 2) / query.shape[-1] ** 0.5
        places = torch.arange(scores_hLL.shape[-1], device=query.device)
        distance_LL = places[:, None] - places
        seen_LL = (distance_LL >= 0) & (distance_LL < (window or len(places) + 1))
        scores_hLL = scores_hLL.masked_fill(~seen_LL, float("-inf"))
        outputs.append((scores_hLL.softmax(-1) @ value_hLd).transpose(0, 1))
    return torch.cat(outputs)[None]


def _compare_checkpointing(findings: Findings, lengths: Any) -> None:
    """A small model's gradient with and without activation checkpointing, under autocast."""
    gradients = []
    for checkpointing in (False, True):
        model = build_language_model(
            ArchitectureConfig(hidden_size=256, intermediate_size=512, num_layers=2, num_heads=4),
            vocab_size=200,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            seed=0,
        ).to(findings.device)
        prepare_blocks(model, LearnerConfig(activation_checkpointing=checkpointing))
        ids_1T = torch.arange(sum(lengths), device=findings.device)[None] % 200
        with torch.autocast(findings.device.type, dtype=torch.bfloat16):
            hidden_TH = read_line(model, ids_1T, PackedLayout.build(lengths, findings.device))
        hidden_TH.float().square().mean().backward()
        gradients.append(torch.cat([p.grad.ravel() for p in model.parameters()]))
    error = relative_error(gradients[1], gradients[0])
    findings.demand("gradient with activation checkpointing: relative error", error, at_most=1e-2)


def _try_grouped_kernel(findings: Findings, lengths: Any) -> None:
    """Whether torch's kernel takes fewer key heads without being told (before torch 2.12)."""
    if not findings.on_gpu:
        findings.note("kernel_takes_grouped_heads", None)
        return
    states = _draw(findings, lengths, 8, 2, 128, torch.bfloat16)
    exact = tuple(each.detach().double().requires_grad_() for each in states)
    layout = PackedLayout.build(list(lengths), findings.device)
    bounds, longest = layout.boundaries, layout.longest
    lines = (each[0].transpose(0, 1) for each in states)
    keywords = {} if _has_gqa_check() is False else {"enable_gqa": True}
    output = varlen_attn(*lines, bounds, bounds, longest, longest, window_size=(-1, 0), **keywords)
    expected = attend_densely(*exact, lengths, None)[0]
    weights = torch.randn_like(expected)
    output.backward(weights.to(output.dtype))
    expected.backward(weights)
    errors = [relative_error(output, expected)]
    errors += [relative_error(a.grad, b.grad) for a, b in zip(states, exact, strict=True)]
    findings.note("kernel_takes_grouped_heads", {"relative_errors": errors})


def _has_gqa_check() -> bool:
    import inspect

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _time_attention(findings: Findings) -> None:
    """Forward, and forward with backward, of 16 sequences of 1,024 tokens."""
    length, sequences, heads, groups, size = (
        (16, 2, 4, 2, 64) if findings.small else (1024, 16, 32, 8, 128)
    )
    lengths = [length] * sequences
    states = _draw(findings, lengths, heads, groups, size, torch.bfloat16)
    layout = PackedLayout.build(lengths, findings.device)

    def step() -> None:
        _attend(*states, layout, None).sum().backward()
        for each in states:
            each.grad = None

    with torch.no_grad():
        forward = findings.time(lambda: _attend(*states, layout, None), repeats=10, warm_up=2)
    both = findings.time(step, repeats=10, warm_up=2)
    flops = 2.0 * sequences * heads * length**2 * size  # causal: half of 4 L^2 d
    findings.note(
        "speed",
        {
            "tokens": sum(lengths),
            "forward_ms": forward,
            "forward_backward_ms": both,
            "forward_tflops": flops / forward / 1e9,
            "forward_backward_tflops": 3.5 * flops / both / 1e9,
            "kernels": findings.kernels(step, count=5),
        },
    )

"""What a step does on CUDA alone: casts, copies, optimizers, float32 attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from distill_system.config.model import OptimizerConfig
from distill_system.config.objective.needs import SIGNALS
from distill_system.config.rollout import ScoringConfig
from distill_system.language_model.packed_attention import PackedLayout, packed_attention
from distill_system.learner.collate import _join
from distill_system.learner.optimizer import build_optimizers
from distill_system.records import TeacherTargets
from distill_system.scoring import TeacherScorer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
FEATURES = SIGNALS[0]


def _scorer(dtype):
    scorer = TeacherScorer.__new__(TeacherScorer)
    scorer.config = ScoringConfig(dtype=dtype)
    return scorer


@pytest.mark.parametrize("largest", [1.0, 65472.0, 65536.0, float("inf"), float("nan")])
def test_a_scorer_ships_the_numbers_that_numpy_would_make_of_them(largest):
    rows = torch.randn(300, 77, device="cuda").bfloat16()
    rows[5, 3] = largest
    shipped = _scorer("bfloat16")._to_wire(rows, FEATURES)
    full = rows.float().cpu().numpy()
    wanted = full.astype(np.float16) if np.abs(full).max() < 65504 else full
    assert shipped.dtype == wanted.dtype
    np.testing.assert_array_equal(shipped, wanted)


def test_targets_reach_the_gpu_as_they_reach_a_cpu():
    generator = np.random.default_rng(0)
    halves = [generator.standard_normal((5, 4)).astype(np.float16) for _ in range(3)]
    rows: list[Any] = [*halves, halves[0].astype(np.float32) / 3]
    targets = [TeacherTargets(trajectory_id="t", num_tokens=5, features=each) for each in rows]
    there = _join(FEATURES, targets, torch.device("cuda"))
    here = _join(FEATURES, targets, torch.device("cpu"))
    assert there.dtype == here.dtype == torch.float32
    assert torch.equal(there.cpu(), here)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize(("device", "fused"), [("cpu", None), ("cuda", True)])
def test_adamw_is_fused_on_a_gpu_alone(kind, device, fused):
    embedding = torch.nn.Embedding(7, 4)
    net = torch.nn.Sequential(embedding, torch.nn.Linear(4, 4)).to(device)
    config = OptimizerConfig(type=kind, learning_rate=0.1, weight_decay=0.0)
    [*_, adamw] = build_optimizers(net, [embedding.weight], config)
    assert {group["fused"] for group in adamw.param_groups} == {fused}
    before = embedding.weight.detach().clone()
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, -3.0)
    adamw.step()
    torch.testing.assert_close(embedding.weight, before + 0.1)  # Adam's first step: the rate


@pytest.mark.parametrize("window", [None, 40])
def test_float32_with_grouped_queries_makes_no_square_of_scores(window):
    lengths, heads, size = [512, 512], 8, 64
    query, key, value = (
        torch.randn(1, number, sum(lengths), size, device="cuda", requires_grad=True)
        for number in (heads, 2, 2)
    )
    layout = PackedLayout.build(lengths, torch.device("cuda"))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output, _ = packed_attention(
        torch.nn.Module(), query, key, value, None, sliding_window=window, packed_layout=layout
    )
    output.square().sum().backward()
    square = len(lengths) * heads * max(lengths) ** 2 * 4
    held = sum(each.nbytes for each in (query, key, value, output))
    assert torch.cuda.max_memory_allocated() - before < square + held

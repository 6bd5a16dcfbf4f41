from __future__ import annotations

import itertools
import math

import pytest
import torch

from distill_system.config.model import OptimizerConfig
from distill_system.errors import NonFiniteError
from distill_system.learner.optimizer import (
    build_optimizers,
    clip_gradients,
    learning_rate_at,
    set_learning_rate,
)

CONFIG = OptimizerConfig(learning_rate=2.0, warmup_steps=4, final_learning_rate_fraction=0.1)


def test_the_rate_rises_to_its_peak_and_falls_to_its_floor():
    rates = [learning_rate_at(step, config=CONFIG, total_steps=101) for step in range(101)]
    assert rates[0] == pytest.approx(2.0 / 5)
    assert max(rates) == pytest.approx(2.0, rel=0.02)
    assert rates[50] == pytest.approx(2.0 * 0.55)
    assert rates[-1] == pytest.approx(0.2)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


def _rates(config, total):
    return [learning_rate_at(step, config=config, total_steps=total) for step in range(total)]


@pytest.mark.parametrize("total", [1, 5, 10, 12, 20, 50])
def test_the_usual_warmup_lets_a_short_run_come_near_its_peak(total):
    config = OptimizerConfig(learning_rate=2.0)
    assert max(_rates(config, total)) > 0.8 * 2.0


@pytest.mark.parametrize("total", [80, 100, 500])
def test_the_usual_warmup_of_a_longer_run_is_20_steps(total):
    usual, asked = (
        OptimizerConfig(learning_rate=2.0),
        OptimizerConfig(learning_rate=2.0, warmup_steps=20),
    )
    assert _rates(usual, total) == _rates(asked, total)
    flat = OptimizerConfig(learning_rate=2.0, schedule="constant")
    assert _rates(flat, total).index(2.0) == 20


def test_an_asked_warmup_takes_at_most_half_of_the_run():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=20, schedule="constant")
    assert [_rates(config, total).index(2.0) for total in (10, 20, 40, 60)] == [5, 10, 20, 20]


def test_a_ratio_is_rounded_up_as_transformers_does():
    from transformers import TrainingArguments

    for ratio, total in ((0.1, 55), (0.03, 100), (0.0, 10), (0.5, 3)):
        config = OptimizerConfig(learning_rate=1.0, warmup_ratio=ratio)
        theirs = TrainingArguments(warmup_steps=ratio, use_cpu=True).get_warmup_steps(total)
        assert config.num_warmup_steps(total) == theirs


def test_linear_falls_by_equal_steps_to_its_floor():
    config = OptimizerConfig(
        learning_rate=2.0, warmup_steps=0, schedule="linear", final_learning_rate_fraction=0.25
    )
    rates = _rates(config, 4)
    assert rates == [pytest.approx(rate) for rate in (2.0, 1.5, 1.0, 0.5)]


def test_constant_stays_at_the_peak_after_warmup():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=2, schedule="constant")
    assert _rates(config, 6) == [pytest.approx(rate) for rate in (2 / 3, 4 / 3, 2, 2, 2, 2)]


def test_warmup_stable_decay_falls_in_its_last_share_alone():
    config = OptimizerConfig(
        learning_rate=2.0,
        warmup_steps=1,
        schedule="warmup_stable_decay",
        decay_ratio=0.4,
        final_learning_rate_fraction=0.0,
    )
    expected = [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0]
    assert _rates(config, 11) == [pytest.approx(rate) for rate in expected]


class _Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(7, 4)
        self.hidden = torch.nn.Linear(4, 4)
        self.norm = torch.nn.LayerNorm(4)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer_and_only_hidden_matrices_decay(kind):
    net = _Net()
    config = OptimizerConfig(type=kind, learning_rate=1.0, weight_decay=0.5)
    optimizers = build_optimizers(net, [net.embedding.weight], config)
    owned = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(map(id, owned)) == sorted(id(p) for p in net.parameters())
    decayed = [
        p for o in optimizers for g in o.param_groups if g["weight_decay"] > 0 for p in g["params"]
    ]
    assert [id(p) for p in decayed] == [id(net.hidden.weight)]
    muon = [
        p
        for o in optimizers
        if isinstance(o, torch.optim.Muon)
        for p in o.param_groups[0]["params"]
    ]
    assert [id(p) for p in muon] == ([id(net.hidden.weight)] if kind == "muon" else [])


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_cpus_optimizers_keep_the_form_and_so_the_bits_that_torch_chooses(kind):
    net = _Net()
    config = OptimizerConfig(type=kind, learning_rate=1.0)
    optimizers = build_optimizers(net, [net.embedding.weight], config)
    assert {group.get("fused") for each in optimizers for group in each.param_groups} == {None}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_what_is_frozen_has_no_optimizer(kind):
    net = _Net()
    net.hidden.weight.requires_grad_(False)
    net.second = torch.nn.Linear(4, 4, bias=False)
    config = OptimizerConfig(type=kind, learning_rate=1.0)
    optimizers = build_optimizers(net, [net.embedding.weight], config)
    owned = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]}
    assert owned == {id(p) for p in net.parameters()} - {id(net.hidden.weight)}


@pytest.mark.parametrize("shape", [(256, 64), (64, 256), (96, 96)])
def test_a_step_of_muon_is_as_long_as_one_of_adamw_and_both_follow_the_rate(shape):
    """0.2 x rate is AdamW's usual root mean square, so that one rate serves both."""
    rate, net = 0.03, torch.nn.Module()
    net.hidden = torch.nn.Parameter(torch.zeros(shape))
    net.embedding = torch.nn.Parameter(torch.zeros(7, 4))
    config = OptimizerConfig(type="muon", learning_rate=1.0, weight_decay=0.0)
    optimizers = build_optimizers(net, [net.embedding], config)
    set_learning_rate(optimizers, rate)
    torch.manual_seed(0)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape)
    for optimizer in optimizers:
        optimizer.step()
    assert float(net.hidden.detach().square().mean().sqrt()) == pytest.approx(0.2 * rate, rel=0.15)
    # The first step of Adam is the rate itself, whatever the gradient.
    torch.testing.assert_close(net.embedding.abs(), torch.full((7, 4), rate), rtol=1e-4, atol=0)


def test_adamw_takes_its_decay_rates_from_the_configuration():
    for kind in ("adamw", "muon"):
        config = OptimizerConfig(type=kind, learning_rate=1.0, adam_betas=(0.7, 0.8))
        net = _Net()
        adamw = build_optimizers(net, [net.embedding.weight], config)[-1]
        assert isinstance(adamw, torch.optim.AdamW)
        assert {group["betas"] for group in adamw.param_groups} == {(0.7, 0.8)}


def test_clipping_returns_the_norm_before_and_refuses_what_is_not_finite():
    net = torch.nn.Linear(2, 1, bias=False)
    net.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clip_gradients(net, 1.0, step=0) == pytest.approx(5.0)
    assert net.weight.grad.tolist() == [pytest.approx([0.6, 0.8], rel=1e-4)]
    net.weight.grad = torch.tensor([[math.nan, 0.0]])
    with pytest.raises(NonFiniteError, match="step 7"):
        clip_gradients(net, 1.0, step=7)

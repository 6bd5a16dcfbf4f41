"""The mask over rows behind the tokens, with stand-ins for the classes that vLLM gives it."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

BASES = {
    "vllm.v1.sample.logits_processor": ("BatchUpdate", "LogitsProcessor"),
    "vllm.v1.worker.gpu.sample.logits_processor": ("LogitsProcessor",),
    "vllm.config": ("VllmConfig",),
}


@pytest.fixture
def mask(monkeypatch):
    """A mask for 5 tokens."""
    for name, members in BASES.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            package = ".".join(parts[:end])
            monkeypatch.setitem(sys.modules, package, sys.modules.get(package, ModuleType(package)))
        module = ModuleType(name)
        vars(module).update({member: type(member, (), {}) for member in members})
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.find_spec("distill_system.rollout.padding_mask")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)  # of its own: others shall not find a mask of stand-ins
    return made.PaddingMask(SimpleNamespace(additional_config={"vocabulary_size": 5}), "cpu", False)


@pytest.mark.parametrize("others", [(), ("input_ids", "positions")])
def test_only_tokens_can_be_sampled_whichever_model_runner_asks(mask, others):
    logits = torch.arange(14.0).reshape(2, 7)
    before = logits.clone()
    masked = mask.apply(logits, *others)
    assert masked is logits, "in place"
    assert torch.equal(masked[:, :5], before[:, :5])
    assert torch.equal(masked[:, 5:], torch.full((2, 2), -torch.inf))
    # The largest logit stood behind the tokens: greedy decoding needs the mask.
    assert masked.argmax(dim=1).tolist() == [4, 4]
    assert not mask.is_argmax_invariant()

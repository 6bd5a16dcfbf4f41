"""A learner in bfloat16 computes with the numbers that its engines hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fakes.local_workers import LocalWorkers
from safetensors import safe_open
from tiny_families import save_family
from trajectories import make_trajectories

from distill_system.config.model import LearnerConfig, LoraUpdate, OptimizerConfig
from distill_system.config.objective import MOMENTS
from distill_system.learner import LearnerGroup, ModelSource
from distill_system.learner.adapters import merged_tensors
from distill_system.learner.sharding import gather
from distill_system.records import Author, Stream, VersionSpan
from distill_system.scoring import ScoringPool
from distill_system.weights import WireFormat

WIRE = WireFormat(dtype=torch.bfloat16, seed=11)
BFLOAT16 = LearnerConfig(compute_dtype="bfloat16")
SMALL_STEPS = OptimizerConfig(learning_rate=1e-6, warmup_steps=0)


def _scored(scorer, on_policy, *, shares=1):
    pool = ScoringPool(LocalWorkers([scorer]))
    streams = {Stream.OFF_POLICY: make_trajectories(4, Author.TEACHER), Stream.ON_POLICY: on_policy}
    return [
        chunk
        for stream, trajectories in streams.items()
        for chunk in pool.start(trajectories, stream, needs=MOMENTS, num_shares=shares)
    ]


def _weights(learner):
    """Of one rank, whole, as they are now."""
    named = learner.model.named_parameters()
    return {name: gather(parameter.detach()).clone() for name, parameter in named}


def _acting(learner):
    """Before, within and after a block in which the student acts as version 5."""
    before = _weights(learner)
    with learner._acting(5):
        within = _weights(learner)
    return before, within, _weights(learner)


def _require_sent(before, within, after):
    """Within the block: what is sent of the weights before it; after it: these, to the bit."""
    for name, sent in WIRE.convert(before.items(), version=5):
        assert torch.equal(within[name], sent.float())
        assert torch.equal(after[name], before[name])
    assert any(not torch.equal(within[name], before[name]) for name in before)


def test_it_reads_what_is_sent_and_keeps_its_own_weights(make_learner):
    _require_sent(*_acting(make_learner(config=BFLOAT16, wire=WIRE)))


@pytest.mark.parametrize("shards", ["all", 1])
def test_ranks_that_share_a_student_round_their_parts_as_the_whole_is_rounded(make_ranks, shards):
    config = LearnerConfig(compute_dtype="bfloat16", shard_ranks=shards)
    for states in make_ranks(2, config=config, wire=WIRE).ask(_acting):
        _require_sent(*states)


def test_its_own_weights_come_back_where_a_step_fails(make_learner):
    learner = make_learner(config=BFLOAT16, wire=WIRE)
    before = _weights(learner)
    with pytest.raises(ValueError, match="in the step"), learner._acting(1):
        raise ValueError("in the step")
    after = _weights(learner)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("compute_dtype", "wire", "update"),
    [
        ("float32", WIRE, None),
        ("bfloat16", WireFormat(dtype=torch.bfloat16), None),
        ("bfloat16", WireFormat(), None),
        ("bfloat16", WIRE, LoraUpdate(type="lora", rank=2)),
    ],
)
def test_else_it_reads_its_own_weights(
    make_learner, tiny_model_folder, compute_dtype, wire, update
):
    """In float32, where nothing is drawn, and with adapters, which follow small steps."""
    source = ModelSource(
        path=str(tiny_model_folder(seed=2)), **({"update": update} if update else {})
    )
    config = LearnerConfig(compute_dtype=compute_dtype)
    learner = make_learner(config=config, wire=wire, source=source, objective=None)
    before, within, _ = _acting(learner)
    assert all(torch.equal(within[name], before[name]) for name in before)


def test_text_of_an_engine_with_the_sent_weights_has_no_gap(make_learner, scorer):
    """In a step and in a measurement; the same weights of another draw have one."""
    learner = make_learner(config=BFLOAT16, wire=WIRE)
    group = LearnerGroup(LocalWorkers([learner]))
    texts = make_trajectories(6)
    written = {}
    for version in (5, 6):
        learner.version = version
        said = learner.read_logprobs(texts)
        span = [VersionSpan(version=5, start=0, end=t.num_response_tokens) for t in texts]
        written[version] = [
            replace(t, behaviour_logprobs=logprobs, weight_versions=(one,))
            for t, logprobs, one in zip(texts, said, span, strict=True)
        ]
    learner.version = 5
    assert group.measure(_scored(scorer, written[5]))["logprob_gap"] < 1e-6
    assert group.measure(_scored(scorer, written[6]))["logprob_gap"] > 1e-4
    assert group.learn(5, _scored(scorer, written[5])).metrics["learner/logprob_gap"] < 1e-6


@torch.no_grad()
def _take_weights_of_a_bfloat16_file(learner):
    for parameter in learner.model.parameters():
        own = getattr(parameter, "_local_tensor", parameter)
        own.copy_((own + own.sign() * 0.05).bfloat16())  # far from zero, where numbers lie close


def test_it_sees_steps_that_are_too_small_for_any_of_its_weights(make_ranks, scorer):
    """Rounded to the nearest they do not move at all, and the loss of a batch stays what it was."""
    scored = _scored(scorer, make_trajectories(6), shares=2)
    config = LearnerConfig(compute_dtype="bfloat16", shard_ranks="all")
    losses = {}
    for name, wire in {"nearest": WireFormat(dtype=torch.bfloat16), "drawn": WIRE}.items():
        ranks = make_ranks(2, config=config, wire=wire, optimizer=SMALL_STEPS)
        ranks.ask(_take_weights_of_a_bfloat16_file)
        group = LearnerGroup(ranks)
        losses[name] = [group.learn(step, scored).metrics["learner/loss"] for step in (0, 1)]
    assert losses["nearest"][0] == losses["nearest"][1]
    assert losses["drawn"][0] == losses["nearest"][0], "the first numbers are bfloat16's own"
    assert losses["drawn"][0] != losses["drawn"][1]


@pytest.mark.parametrize("update", [None, LoraUpdate(type="lora", rank=2)])
def test_a_bfloat16_export_is_what_engines_hold(make_learner, tmp_path, update):
    source = ModelSource(
        path=str(save_family(tmp_path / "student", "llama")),
        **({"update": update} if update else {}),
    )
    learner = make_learner(source=source, objective=None, wire=WIRE)
    with torch.no_grad():
        for name, parameter in learner.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    learner.version = 9
    sent = dict(WIRE.convert(merged_tensors(learner.model), version=9))
    learner.round_weights("bfloat16")
    again = dict(WIRE.convert(merged_tensors(learner.model), version=10))
    learner.export(str(tmp_path / "export"), "bfloat16")
    with safe_open(tmp_path / "export/model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            assert torch.equal(file.get_tensor(name), sent[name])
            assert torch.equal(again[name], sent[name]), "a bfloat16 number stays what it is"

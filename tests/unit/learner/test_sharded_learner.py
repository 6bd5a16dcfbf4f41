"""Ranks that share a student make the update of one rank that holds it whole."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from fakes.local_workers import LocalWorkers
from safetensors import safe_open
from tiny_families import save_family
from trajectories import make_trajectories

from distill_system.config.model import ArchitectureConfig, LearnerConfig, OptimizerConfig
from distill_system.config.objective import MOMENTS, AmmdConfig, TokenMatchingConfig
from distill_system.config.objective.token_losses import ReverseKlConfig
from distill_system.errors import RecordError
from distill_system.language_model import SequenceBatch
from distill_system.learner import LearnerGroup, ModelSource
from distill_system.learner.microbatches import Microbatches
from distill_system.learner.sharding import gather
from distill_system.records import Author, Stream
from distill_system.scoring import ScoringPool

ADAMW = OptimizerConfig(learning_rate=1e-2, warmup_steps=0)
MUON = OptimizerConfig(type="muon", learning_rate=1e-2, warmup_steps=0)


def weights_of(learner):
    """Of one rank, by the names under which they are published."""
    named = learner.model.named_parameters()
    return {name: gather(parameter.detach()).clone() for name, parameter in named}


def numbers_held_by(learner):
    """Elements of parameters and optimizer state that lie in one rank's memory."""
    states = [t for o in learner.optimizers for s in o.state.values() for t in s.values()]
    tensors = [*learner.model.parameters(), *states]
    return sum(getattr(tensor, "_local_tensor", tensor).numel() for tensor in tensors)


def _scored(scorer, *, shares, needs=MOMENTS, count=12):
    pool = ScoringPool(LocalWorkers([scorer]))
    how = {"needs": needs, "num_shares": shares}
    off = pool.start(make_trajectories(count, Author.TEACHER), Stream.OFF_POLICY, **how)
    on = pool.start(make_trajectories(count, first=100), Stream.ON_POLICY, **how)
    return [*off, *on]


def _learn(workers, scored, *, steps=3):
    group = LearnerGroup(workers)
    return [group.learn(step, scored).metrics for step in range(steps)]


def _require_close(metrics, expected, *, rel=2e-3):
    for ours, theirs in zip(metrics, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], rel=rel, abs=1e-5), name


def _distance(weights, others):
    assert weights.keys() == others.keys()
    gaps = [(weights[name] - others[name]).flatten() for name in weights]
    return float(torch.cat(gaps).norm())


@pytest.mark.parametrize(
    ("count", "shard", "optimizer", "tolerance"),
    [
        (2, 1, ADAMW, 1e-3),
        (2, "all", ADAMW, 1e-3),
        (4, 2, ADAMW, 1e-3),
        # torch's Muon orthogonalises in bfloat16, which turns a rounding of the gradient into 2^-8.
        (2, "all", MUON, 3e-2),
    ],
    ids=["replicas", "shards", "replicas_of_shards", "muon_in_shards"],
)
def test_ranks_make_the_update_of_one(
    make_learner, make_ranks, scorer, count, shard, optimizer, tolerance
):
    scored = _scored(scorer, shares=count)
    alone, before = make_learner(optimizer=optimizer), weights_of(make_learner())
    expected = _learn(LocalWorkers([alone]), scored)
    ranks = make_ranks(count, optimizer=optimizer, config=LearnerConfig(shard_ranks=shard))
    _require_close(_learn(ranks, scored), expected)
    moved = _distance(weights_of(alone), before)
    assert moved > 0.1
    for weights in ranks.ask(weights_of):
        assert _distance(weights, weights_of(alone)) < tolerance * moved
    held = ranks.ask(numbers_held_by)
    parts = count if shard == "all" else shard
    assert sum(held) == pytest.approx(count / parts * numbers_held_by(alone), rel=0.02)


def test_ranks_read_the_log_probabilities_of_one(make_learner, make_ranks):
    """Fewer sequences than would give each rank one: all ranks read all of them."""
    written = make_trajectories(1)
    [expected] = LearnerGroup(LocalWorkers([make_learner()])).read_logprobs(written)
    group = LearnerGroup(make_ranks(2, config=LearnerConfig(shard_ranks="all")))
    [read] = group.read_logprobs(written)
    np.testing.assert_allclose(read, expected, atol=1e-5)


TOKEN_MATCHING = TokenMatchingConfig(
    type="token_matching",
    off_policy=ReverseKlConfig(type="reverse_kl"),
    on_policy=ReverseKlConfig(type="reverse_kl"),
)


@pytest.mark.parametrize("objective", [AmmdConfig(), TOKEN_MATCHING], ids=["ammd", "tokens"])
def test_microbatches_make_the_update_of_the_whole_batch(make_learner, scorer, objective):
    scored = _scored(scorer, shares=1, needs=objective.teacher_needs("on_policy"))
    learners = {
        limit: make_learner(
            objective=objective,
            optimizer=ADAMW,
            config=LearnerConfig(max_tokens_per_microbatch=limit),
        )
        for limit in (None, 40)
    }
    metrics = {limit: _learn(LocalWorkers([it]), scored) for limit, it in learners.items()}
    assert [step.pop("learner/microbatches") >= 5 for step in metrics[40]] == [True] * 3
    _require_close(metrics[40], metrics[None], rel=1e-4)
    whole, split = weights_of(learners[None]), weights_of(learners[40])
    assert _distance(split, whole) < 1e-3 * _distance(whole, weights_of(make_learner()))


@pytest.mark.parametrize("shard", [1, "all"])
@pytest.mark.parametrize("objective", [AmmdConfig(), TOKEN_MATCHING], ids=["ammd", "tokens"])
def test_ranks_of_unequal_work_go_through_the_same_microbatches(
    make_learner, make_ranks, scorer, tiny_model_folder, objective, shard
):
    """With all else that saves memory at once, on a model whose two embeddings differ."""
    source = ModelSource(
        path=str(tiny_model_folder(seed=3, tie_word_embeddings=False)),
        teacher_path=str(tiny_model_folder(hidden_size=96, num_heads=3, seed=1)),
    )
    how = {"objective": objective, "optimizer": ADAMW, "source": source}
    # Two of three sequences of each stream go to rank 0; rank 1 has parts without any.
    needs = objective.teacher_needs("on_policy")
    scored = _scored(scorer, shares=3, needs=needs, count=3)
    alone = make_learner(**how)
    before = weights_of(alone)
    expected = _learn(LocalWorkers([alone]), scored)
    config = LearnerConfig(
        shard_ranks=shard, max_tokens_per_microbatch=8, activation_checkpointing=True, offload=True
    )
    ranks = make_ranks(2, config=config, **how)
    metrics = _learn(ranks, scored)
    assert {step.pop("learner/microbatches") for step in metrics} == {4}
    _require_close(metrics, expected)
    for weights in ranks.ask(weights_of):
        assert _distance(weights, weights_of(alone)) < 1e-3 * _distance(weights_of(alone), before)


def test_blocks_that_are_run_again_change_nothing(make_learner, scorer):
    scored = _scored(scorer, shares=1)
    metrics = [
        _learn(
            LocalWorkers([make_learner(config=LearnerConfig(activation_checkpointing=again))]),
            scored,
        )
        for again in (False, True)
    ]
    assert metrics[0] == metrics[1]


def test_what_saves_memory_keeps_fewer_activations(make_learner):
    rows = make_trajectories(40)
    kept = {}
    for name, config in {
        "all": LearnerConfig(),
        "checkpointing": LearnerConfig(activation_checkpointing=True),
        "microbatches": LearnerConfig(max_tokens_per_microbatch=100),
    }.items():
        learner, sizes = make_learner(config=config), []
        limit = learner.config.max_tokens_per_microbatch
        batch = SequenceBatch.collate(rows, learner.device, max_tokens=limit)
        pack = partial(_weigh, sizes)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            Microbatches(learner.policy, batch).read()
        kept[name] = sum(sizes)
    assert kept["checkpointing"] < 0.3 * kept["all"]
    assert kept["microbatches"] < 0.4 * kept["all"]


def _weigh(sizes, tensor):
    if not isinstance(tensor, torch.nn.Parameter):
        sizes.append(tensor.nbytes)
    return tensor


def test_shards_compute_in_bfloat16_over_float32_weights(make_learner, make_ranks, scorer):
    scored = _scored(scorer, shares=2)
    exact = _learn(LocalWorkers([make_learner()]), scored)
    ranks = make_ranks(2, config=LearnerConfig(shard_ranks="all", compute_dtype="bfloat16"))
    metrics = _learn(ranks, scored)
    losses = [[step["learner/loss"] for step in steps] for steps in (metrics, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1]
    assert all(dtypes == {torch.float32} for dtypes in ranks.ask(dtypes_of))


def dtypes_of(learner):
    states = [t for o in learner.optimizers for s in o.state.values() for t in s.values()]
    return {tensor.dtype for tensor in (*learner.model.parameters(), *states)}


def test_one_rank_may_keep_everything_in_cpu_memory(make_learner, make_ranks, scorer):
    scored = _scored(scorer, shares=1)
    expected = _learn(LocalWorkers([make_learner()]), scored)
    ranks = make_ranks(1, config=LearnerConfig(offload=True))
    _require_close(_learn(ranks, scored), expected)
    assert ranks.ask(devices_of) == [{"cpu"}]


def devices_of(learner):
    return {parameter.device.type for parameter in learner.model.parameters()}


def test_measuring_leaves_shards_as_they_were(make_learner, make_ranks, scorer):
    scored = _scored(scorer, shares=2)
    expected = LearnerGroup(LocalWorkers([make_learner()])).measure(scored)
    ranks = make_ranks(2, config=LearnerConfig(shard_ranks="all", max_tokens_per_microbatch=40))
    held = ranks.ask(numbers_held_by)
    measured = LearnerGroup(ranks).measure(scored)
    assert measured == pytest.approx(expected, rel=1e-3)
    assert ranks.ask(numbers_held_by) == held


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_export_of_shards_is_the_plain_model(
    make_learner, make_ranks, scorer, tiny_model_folder, tmp_path, tied
):
    source = ModelSource(
        path=str(tiny_model_folder(seed=3, tie_word_embeddings=tied)),
        teacher_path=str(tiny_model_folder(hidden_size=96, num_heads=3, seed=1)),
    )
    config = LearnerConfig(shard_ranks="all", activation_checkpointing=True)
    ranks = make_ranks(2, config=config, source=source)
    _learn(ranks, _scored(scorer, shares=2), steps=1)
    alone = make_learner(source=source)
    LearnerGroup(ranks).export(tmp_path / "shards")
    LearnerGroup(LocalWorkers([alone])).export(tmp_path / "alone")
    [weights, _] = ranks.ask(weights_of)
    with (
        safe_open(tmp_path / "shards" / "model.safetensors", "pt") as shards,
        safe_open(tmp_path / "alone" / "model.safetensors", "pt") as plain,
    ):
        names = set(plain.keys())
        assert set(shards.keys()) == names
        for name in shards.keys():  # noqa: SIM118
            assert torch.equal(shards.get_tensor(name), weights[name])
    # What is published goes by the names of the file, too.
    assert weights.keys() == weights_of(alone).keys()
    for file in ("config.json", "generation_config.json"):
        texts = [(tmp_path / folder / file).read_text() for folder in ("shards", "alone")]
        assert texts[0] == texts[1]
    LearnerGroup(ranks).round_weights("bfloat16")
    LearnerGroup(ranks).export(tmp_path / "rounded", "bfloat16")
    with safe_open(tmp_path / "rounded" / "model.safetensors", "pt") as rounded:
        assert set(rounded.keys()) == names
        for name in rounded.keys():  # noqa: SIM118
            assert torch.equal(rounded.get_tensor(name), weights[name].bfloat16())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_shards_read_their_parts_of_the_files(make_learner, make_ranks, tmp_path, family):
    source = ModelSource(path=str(save_family(tmp_path, family)))
    alone = make_learner(source=source, objective=None)
    config = LearnerConfig(shard_ranks="all")
    ranks = make_ranks(2, source=source, objective=None, config=config)
    for weights in ranks.ask(weights_of):
        assert _distance(weights, weights_of(alone)) == 0.0
    for logits in ranks.ask(logits_of):
        torch.testing.assert_close(logits, logits_of(alone))


@torch.no_grad()
def logits_of(learner):
    ids = torch.arange(5, 25)[None]
    logits = learner.policy(lambda model: model(input_ids=ids).logits)
    learner.policy.release()
    return logits


def test_a_rank_that_fails_alone_is_heard_while_the_other_waits_for_it(make_ranks, scorer):
    """Rank 1 gets targets of other trajectories; rank 0 is in the middle of a sum by then."""
    scored = _scored(scorer, shares=2)
    of_rank_1 = [index for index, part in enumerate(scored) if index % 2]
    scored[of_rank_1[0]] = replace(scored[of_rank_1[0]], targets=scored[of_rank_1[1]].targets)
    ranks = make_ranks(2, config=LearnerConfig(shard_ranks="all"))
    started = time.monotonic()
    with pytest.raises(RecordError, match="came with targets of"):
        _learn(ranks, scored, steps=1)
    assert time.monotonic() - started < 30


def test_ranks_fine_tune_a_student_of_random_weights(make_learner, make_ranks):
    shape = ArchitectureConfig(hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2)
    source = ModelSource(architecture=shape, vocabulary_size=67)
    how = {"source": source, "objective": None, "optimizer": ADAMW}
    alone, rows = make_learner(**how), make_trajectories(8, Author.DATASET)
    ranks = make_ranks(2, config=LearnerConfig(shard_ranks="all"), **how)
    for step in range(3):
        losses = [
            group.finish_supervised(group.start_supervised(step, rows)).metrics["learner/loss"]
            for group in (LearnerGroup(ranks), LearnerGroup(LocalWorkers([alone])))
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    [weights, _] = ranks.ask(weights_of)
    fresh = weights_of(make_learner(**how))
    assert _distance(weights, weights_of(alone)) < 1e-3 * _distance(weights, fresh)


def test_a_checkpoint_of_shards_goes_on_with_one_rank(make_learner, make_ranks, scorer, tmp_path):
    scored = _scored(scorer, shares=2)
    ranks = make_ranks(2, config=LearnerConfig(shard_ranks="all"), optimizer=MUON)
    _learn(ranks, scored, steps=2)
    group, alone = LearnerGroup(ranks), make_learner(optimizer=MUON)
    group.start_save(tmp_path)
    group.finish_save(wait=True)
    resumed = LearnerGroup(LocalWorkers([alone]))
    resumed.load(tmp_path)
    assert _distance(ranks.ask(weights_of)[0], weights_of(alone)) == 0.0
    _require_close(
        [resumed.learn(step, scored).metrics for step in (2, 3)],
        [group.learn(step, scored).metrics for step in (2, 3)],
        rel=2e-2,
    )

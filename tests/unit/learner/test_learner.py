from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes.local_workers import Done, LocalWorkers
from safetensors import safe_open
from trajectories import make_trajectories, make_trajectory

from distill_system.config.model import LearnerConfig, OptimizerConfig
from distill_system.config.objective import MOMENTS, AmmdConfig, MinillmConfig
from distill_system.config.objective.ammd import GradientCritic
from distill_system.errors import NonFiniteError, RecordError, RunStateError
from distill_system.learner import Learner, LearnerGroup, ModelSource
from distill_system.learner.sharding import gather
from distill_system.records import Author, Finish, ScoredChunk, Stream, TrajectoryChunk
from distill_system.scoring import ScoringPool


def _weights(learner):
    return torch.cat([gather(p.detach()).reshape(-1) for p in learner.model.parameters()])


def _scored(scorer, *, shares, count=12, written=None, needs=MOMENTS):
    pool = ScoringPool(LocalWorkers([scorer]))
    how = {"needs": needs, "num_shares": shares}
    off = pool.start(make_trajectories(count, Author.TEACHER), Stream.OFF_POLICY, **how)
    on = pool.start(written or make_trajectories(count, first=100), Stream.ON_POLICY, **how)
    return [*off, *on]


def _texts(count, *, shares):
    """Chunks of plain text; the first token of each is its only context."""
    rows = [make_trajectory(300 + i, 1, 4 + i, Author.DATASET) for i in range(count)]
    chunks = TrajectoryChunk.deal(rows, Stream.PLAIN_TEXT, shares)
    return [ScoredChunk(chunk, None) for chunk in chunks]


def _group(*learners):
    return LearnerGroup(LocalWorkers(learners))


def test_playing_the_game_brings_both_distances_down(make_learner, scorer):
    learner = make_learner(total_steps=60)
    group = _group(learner)
    scored = _scored(scorer, shares=1)
    before = group.measure(scored)
    for step in range(60):
        group.learn(step, scored)
    after = group.measure(scored)
    assert after["on_policy_distance"] < 0.5 * before["on_policy_distance"]
    assert after["off_policy_distance"] < 0.5 * before["off_policy_distance"]


def test_the_measured_cross_entropy_is_that_of_the_teachers_text(make_learner, scorer):
    learner = make_learner()
    scored = _scored(scorer, shares=1)
    measured = _group(learner).measure(scored)["cross_entropy"]
    total, count = 0.0, 0
    for trajectory in scored[0].chunk.trajectories:
        ids = torch.from_numpy(trajectory.token_ids).long()
        with torch.no_grad():
            logprobs = learner.model(input_ids=ids[None]).logits[0].log_softmax(-1)
        response = ids[trajectory.num_prompt_tokens :]
        before = logprobs[trajectory.num_prompt_tokens - 1 : -1]
        total -= float(before.gather(1, response[:, None]).sum())
        count += len(response)
    assert scored[0].chunk.stream is Stream.OFF_POLICY
    assert measured == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("limit", [None, 20])
def test_log_probabilities_are_those_of_the_plain_model(make_learner, limit):
    learner = make_learner(config=LearnerConfig(max_tokens_per_microbatch=limit))
    written = make_trajectories(9)
    read = _group(learner).read_logprobs(written)
    for trajectory, logprobs in zip(written, read, strict=True):
        ids = torch.from_numpy(trajectory.token_ids).long()
        with torch.no_grad():
            plain = learner.model(input_ids=ids[None]).logits[0].log_softmax(-1)
        before = plain[trajectory.num_prompt_tokens - 1 : -1]
        expected = before.gather(1, ids[trajectory.num_prompt_tokens :, None])[:, 0]
        np.testing.assert_allclose(logprobs, expected, atol=1e-5)


def test_measured_distances_do_not_move_the_student(make_learner, scorer):
    learner = make_learner()
    before = _weights(learner).clone()
    _group(learner).measure(_scored(scorer, shares=1))
    assert torch.equal(_weights(learner), before)


def test_the_first_steps_loss_is_the_mix_of_both_distances(make_learner, scorer):
    scored = _scored(scorer, shares=1)
    learner = make_learner(objective=AmmdConfig(on_policy_weight=0.3))
    measured = _group(learner).measure(scored)
    metrics = _group(learner).learn(0, scored).metrics
    mixed = 0.7 * measured["off_policy_distance"] + 0.3 * measured["on_policy_distance"]
    assert metrics["learner/loss"] == pytest.approx(mixed, rel=1e-3)
    assert metrics["learner/off_policy_distance"] == pytest.approx(
        measured["off_policy_distance"], rel=1e-3
    )


@pytest.mark.parametrize(
    "objective", [AmmdConfig(), MinillmConfig(type="minillm", teacher_mixture=0.0)]
)
@pytest.mark.parametrize("limit", [None, 40])
def test_plain_text_adds_its_weighted_cross_entropy_to_loss_and_gradient(
    make_learner, scorer, monkeypatch, objective, limit
):
    """Against transformers' own loss of each text, which shifts the labels itself."""
    gradients = []

    def keep(learner, step):
        named = learner.model.named_parameters()
        gradients.append({name: p.grad.clone() for name, p in named})
        learner.model.zero_grad()
        return 0.0, 0.0

    monkeypatch.setattr(Learner, "_update", keep)
    learner = make_learner(
        objective=objective,
        language_model_weight=0.7,
        config=LearnerConfig(max_tokens_per_microbatch=limit),
    )
    scored = _scored(scorer, shares=1, needs=objective.teacher_needs("on_policy"))
    texts = _texts(6, shares=1)
    without = _group(learner).learn(0, scored).metrics
    metrics = _group(learner).learn(0, [*scored, *texts]).metrics
    rows = [torch.from_numpy(t.token_ids).long()[None] for t in texts[0].chunk.trajectories]
    count = sum(row.shape[1] - 1 for row in rows)
    loss = sum(learner.model(row, labels=row).loss * (row.shape[1] - 1) for row in rows) / count
    loss.backward()
    assert metrics["learner/language_model_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["learner/language_model_tokens"] == count
    assert metrics["learner/loss"] == pytest.approx(
        without["learner/loss"] + 0.7 * loss.item(), rel=1e-4
    )
    assert metrics["learner/response_tokens"] == without["learner/response_tokens"]
    for name, parameter in learner.model.named_parameters():
        expected = gradients[0][name] + 0.7 * parameter.grad
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    "objective",
    [
        AmmdConfig(),
        AmmdConfig(
            critic=GradientCritic(type="gradient_ascent"),
            policy_gradient="reward_to_go",
            moment_target="sampled",
            discount=0.9,
        ),
    ],
    ids=["closed_form", "paper_form"],
)
def test_two_ranks_make_the_update_of_one(make_learner, make_ranks, scorer, optimizer, objective):
    """Real gloo between two processes against one rank with everything."""
    config = OptimizerConfig(type=optimizer, learning_rate=1e-2, warmup_steps=0)
    settings = {"objective": objective, "optimizer": config, "language_model_weight": 0.5}
    alone = make_learner(**settings)
    scored = [*_scored(scorer, shares=2), *_texts(5, shares=2)]
    group = _group(alone)
    metrics = [group.learn(step, scored).metrics for step in range(3)]
    expected = _weights(alone)

    pair = make_ranks(2, **settings)
    pair_metrics = [LearnerGroup(pair).learn(step, scored).metrics for step in range(3)]
    for ours, theirs in zip(pair_metrics, metrics, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-5), name
    moved = (expected - _weights(make_learner())).norm()
    assert moved > 0.1
    # torch's Muon orthogonalises in bfloat16, which turns a rounding of the gradient into 2^-8.
    tolerance = 1e-3 if optimizer == "adamw" else 3e-2
    pair_weights = pair.ask(_weights)
    assert torch.equal(*pair_weights)
    assert (pair_weights[0] - expected).norm() < tolerance * moved


def test_supervised_updates_learn_the_rows(make_learner):
    learner = make_learner(objective=None, total_steps=80)
    group = _group(learner)
    rows = make_trajectories(8, Author.DATASET)
    losses = [
        group.finish_supervised(group.start_supervised(step, rows)).metrics["learner/loss"]
        for step in range(80)
    ]
    assert losses[-1] < 0.2 * losses[0]


def test_a_checkpoint_continues_to_the_bit(make_learner, scorer, tmp_path):
    objective = AmmdConfig(critic=GradientCritic(type="gradient_ascent", steps=1, step_size=0.1))
    settings = {
        "objective": objective,
        "optimizer": OptimizerConfig(type="muon", learning_rate=1e-2),
    }
    scored = _scored(scorer, shares=1)
    unbroken = make_learner(**settings)
    for step in range(3):
        _group(unbroken).learn(step, scored)
    group = _group(unbroken)
    group.start_save(tmp_path / "checkpoint")
    files = group.finish_save(wait=True)
    assert group.find_alterations(tmp_path / "checkpoint", files) == []
    resumed = make_learner(**settings)
    _group(resumed).load(tmp_path / "checkpoint")
    assert torch.equal(_weights(resumed), _weights(unbroken))
    for step in range(3, 6):
        first = _group(unbroken).learn(step, scored).metrics
        second = _group(resumed).learn(step, scored).metrics
        assert first == second
    assert torch.equal(_weights(resumed), _weights(unbroken))


def test_a_truncated_checkpoint_is_named(make_learner, tmp_path):
    folder = tmp_path / "checkpoint"
    group = _group(make_learner())
    group.start_save(folder)
    group.finish_save(wait=True)
    files = [path for path in folder.rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    with pytest.raises(RunStateError, match="checkpoint"):
        _group(make_learner()).load(folder)


def test_a_nan_is_refused_before_any_weight_changes(make_learner, scorer):
    learner = make_learner()
    before = _weights(learner).clone()
    scored = _scored(scorer, shares=1)
    spoiled = [
        replace(target, expected_embedding=np.full_like(target.expected_embedding, np.nan))
        for target in scored[0].targets.value
    ]
    scored[0] = replace(scored[0], targets=Done(spoiled))
    with pytest.raises(NonFiniteError, match=r"loss must be finite.*step 4"):
        _group(learner).learn(4, scored)
    assert torch.equal(_weights(learner), before)


def test_targets_of_another_trajectory_are_refused(make_learner, scorer):
    scored = _scored(scorer, shares=1)
    swapped = [replace(part, targets=scored[0].targets) for part in scored]
    with pytest.raises(RecordError, match="came with targets of"):
        _group(make_learner()).learn(0, swapped)


def test_targets_of_another_trajectory_are_refused_even_where_the_lengths_agree(
    make_learner, scorer
):
    scored = _scored(scorer, shares=1)
    said = list(scored[0].targets.value)
    said[3] = replace(said[3], trajectory_id="another")
    name = scored[0].chunk.trajectories[3].trajectory_id
    foreign = [replace(scored[0], targets=Done(said)), *scored[1:]]
    with pytest.raises(RecordError, match=f"'{name}'.* came with targets of 'another'"):
        _group(make_learner()).learn(0, foreign)


def test_a_trajectory_without_targets_is_refused(make_learner, scorer):
    scored = _scored(scorer, shares=1)
    few = [replace(scored[0], targets=Done(scored[0].targets.value[:-1])), *scored[1:]]
    with pytest.raises(ValueError, match="shorter"):
        _group(make_learner()).learn(0, few)


def test_what_the_student_wrote_is_described_over_all_ranks(make_learner, make_ranks, scorer):
    """Only a response that stopped has ended by itself: one that was cut or aborted has not."""
    ends = [Finish.STOP, Finish.LENGTH, Finish.ABORT, Finish.STOP, Finish.ABORT, Finish.ABORT]
    written = [
        replace(trajectory, finish=finish)
        for trajectory, finish in zip(make_trajectories(6), ends, strict=True)
    ]
    scored = _scored(scorer, shares=2, count=6, written=written)
    lengths = [trajectory.num_response_tokens for trajectory in written]
    for workers in (LocalWorkers([make_learner()]), make_ranks(2)):
        metrics = LearnerGroup(workers).learn(0, scored).metrics
        assert metrics["learner/student_ended_share"] == pytest.approx(2 / 6)
        assert metrics["learner/mean_student_response_tokens"] == pytest.approx(sum(lengths) / 6)
        tokens = sum(part.chunk.num_response_tokens for part in scored)
        assert metrics["learner/response_tokens"] == tokens


def test_the_export_loads_in_transformers_with_the_same_logits(make_learner, scorer, tmp_path):
    from transformers import AutoModelForCausalLM

    learner = make_learner()
    _group(learner).learn(0, _scored(scorer, shares=1))
    _group(learner).export(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, learner.model(input_ids=ids).logits)
    assert (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "generation_config.json").exists()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_rounded_learner_is_the_bfloat16_model_that_it_exports(
    make_learner, tiny_model_folder, tmp_path, tied
):
    """Loaded by transformers in the precision that the folder names, to the bit."""
    from transformers import AutoModelForCausalLM

    path = str(tiny_model_folder(seed=3, tie_word_embeddings=tied))
    learner = make_learner(source=ModelSource(path=path), objective=None)
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    _group(learner).round_weights("bfloat16")
    _group(learner).export(tmp_path, "bfloat16")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    parameters = dict(learner.model.named_parameters())
    assert parameters.keys() == dict(loaded.named_parameters()).keys()
    for name, exported in loaded.named_parameters():
        assert exported.dtype == torch.bfloat16
        assert torch.equal(exported, before[name].bfloat16()), "the nearest value"
        assert torch.equal(exported.float(), parameters[name])
    assert any(not torch.equal(before[name], parameters[name]) for name in before)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) != tied  # noqa: SIM118


def test_bfloat16_compute_keeps_float32_weights_and_close_losses(make_learner, scorer):
    scored = _scored(scorer, shares=1)
    losses = {}
    for dtype in ("float32", "bfloat16"):
        learner = make_learner(config=LearnerConfig(compute_dtype=dtype))
        losses[dtype] = _group(learner).learn(0, scored).metrics["learner/loss"]
        assert all(p.dtype == torch.float32 for p in learner.model.parameters())
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)
    assert losses["bfloat16"] != losses["float32"]

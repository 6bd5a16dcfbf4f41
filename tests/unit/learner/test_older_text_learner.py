"""The learner on text of an older student: what reaches the objective, ranks, parts, metrics."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes.local_workers import LocalWorkers
from trajectories import make_trajectories

from distill_system.config.distill import StalenessConfig
from distill_system.config.model import LearnerConfig, OptimizerConfig
from distill_system.config.objective import AmmdConfig, MinillmConfig, TokenMatchingConfig
from distill_system.config.objective.ammd import AdvantageConfig
from distill_system.config.objective.token_losses import ReverseKlConfig
from distill_system.config.objective.token_matching import HiddenMatchingConfig, RelationalConfig
from distill_system.errors import RecordError
from distill_system.learner import LearnerGroup
from distill_system.learner.collate import StreamTotals, collate
from distill_system.records import Author, Stream, TrajectoryChunk, VersionSpan
from distill_system.scoring import ScoringPool

ADAMW = OptimizerConfig(learning_rate=1e-2, warmup_steps=0)
REVERSE_KL = ReverseKlConfig(type="reverse_kl")
OBJECTIVES = {
    "ammd": AmmdConfig(),
    "futures": AmmdConfig(
        policy_gradient="immediate_plus_future", advantage=AdvantageConfig(type="soft_advantage")
    ),
    "tokens": TokenMatchingConfig(
        type="token_matching",
        off_policy=REVERSE_KL,
        on_policy=REVERSE_KL,
        terms=(RelationalConfig(type="relational"), HiddenMatchingConfig(type="hidden_matching")),
    ),
    "minillm": MinillmConfig(type="minillm"),
}
STATISTICS = {
    "importance_mean",
    "importance_max",
    "importance_capped_share",
    "importance_effective_share",
    "behaviour_kl",
}


def _staleness(kind="state", cap=1.5):
    return StalenessConfig(max_staleness=2, importance=kind, importance_cap=cap)


def _older(learner, *, count=12, temperature=1.0, fresh=4):
    """Text whose writer was near the student, but not the student: version 2, some tokens 3."""
    generator = np.random.default_rng(0)
    return [
        replace(
            trajectory,
            temperature=temperature,
            behaviour_logprobs=(
                _logprobs(learner, trajectory, temperature)
                + generator.normal(0.0, 0.5, trajectory.num_response_tokens)
            ).astype(np.float32),
            weight_versions=_spans(trajectory.num_response_tokens, fresh),
        )
        for trajectory in make_trajectories(count, first=100)
    ]


def _spans(length, fresh):
    """The last tokens are of version 3."""
    border = max(0, length - fresh)
    spans = [
        VersionSpan(version=2, start=0, end=border),
        VersionSpan(version=3, start=border, end=length),
    ]
    return tuple(span for span in spans if span.end > span.start)


@torch.no_grad()
def _logprobs(learner, trajectory, temperature=1.0):
    """What the student says of the response, float64 [T]."""
    ids = torch.from_numpy(trajectory.token_ids).long()
    logits = learner.model(input_ids=ids[None]).logits[0].double() / temperature
    before = logits.log_softmax(-1)[trajectory.num_prompt_tokens - 1 : -1]
    return before.gather(1, ids[trajectory.num_prompt_tokens :, None]).squeeze(1).numpy()


def _scored(scorer, trajectories, objective, *, shares=1):
    pool = ScoringPool(LocalWorkers([scorer]))
    parts = [
        (make_trajectories(12, Author.TEACHER), Stream.OFF_POLICY),
        (trajectories, Stream.ON_POLICY),
    ]
    return [
        chunk
        for texts, stream in parts
        if objective.reads(stream.value)
        for chunk in pool.start(
            texts, stream, needs=objective.teacher_needs(stream.value), num_shares=shares
        )
    ]


def _learn(workers, scored, *, step=3, steps=2):
    group = LearnerGroup(workers)
    return [group.learn(step + k, scored).metrics for k in range(steps)]


def _statistics(metrics):
    return {name: metrics[f"learner/{name}"] for name in STATISTICS}


def _require_close(metrics, expected, *, rel):
    for ours, theirs in zip(metrics, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], rel=rel, abs=1e-5), name


def _weights(learner):
    return torch.cat([parameter.detach().reshape(-1) for parameter in learner.model.parameters()])


def _gradients(learner):
    return torch.cat([parameter.grad.reshape(-1) for parameter in learner.model.parameters()])


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_without_weights_a_run_that_may_lag_learns_what_one_that_may_not_learns(
    make_learner, scorer, objective
):
    """To the bit: log-probabilities brought for the report alone change no other number."""
    today, lagging = (
        make_learner(objective=objective, optimizer=ADAMW, staleness=staleness)
        for staleness in (None, _staleness("none"))
    )
    scored = _scored(scorer, _older(today), objective)
    before, after = (_learn(LocalWorkers([it]), scored) for it in (today, lagging))
    assert torch.equal(_weights(today), _weights(lagging))
    for ours, theirs in zip(after, before, strict=True):
        added = {f"learner/{name}" for name in STATISTICS}
        assert ours.keys() - theirs.keys() == added
        assert {name: ours[name] for name in theirs} == theirs


@pytest.mark.parametrize("kind", ["none", "token", "state"])
@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_statistics_are_those_of_the_ratios(make_learner, scorer, kind, temperature):
    learner = make_learner(staleness=_staleness(kind))
    trajectories = _older(learner, temperature=temperature)
    metrics = _learn(LocalWorkers([learner]), _scored(scorer, trajectories, AmmdConfig()), steps=1)
    fresh_model = make_learner()
    logs, gaps, fresh_gaps = [], [], []
    for trajectory in trajectories:
        own = _logprobs(fresh_model, trajectory, temperature)
        log_ratios = own - trajectory.behaviour_logprobs
        logs.append(np.cumsum(log_ratios) - log_ratios if kind == "state" else log_ratios)
        gaps.append(-log_ratios)
        fresh_gaps.append(np.abs(log_ratios[-min(4, len(own)) :]))
    ratios = np.exp(np.concatenate(logs))
    weights = np.minimum(ratios, 1.5)
    expected = {
        "importance_mean": weights.mean(),
        "importance_max": ratios.max(),
        "importance_capped_share": (ratios > 1.5).mean(),
        "importance_effective_share": weights.sum() ** 2 / (len(weights) * (weights**2).sum()),
        "behaviour_kl": np.concatenate(gaps).mean(),
    }
    assert _statistics(metrics[0]) == pytest.approx(expected, rel=1e-4)
    assert metrics[0]["learner/logprob_gap"] == pytest.approx(
        np.concatenate(fresh_gaps).mean(), rel=1e-4
    )


def test_the_gap_of_sampler_and_learner_is_left_out_where_no_token_is_of_this_version(
    make_learner, scorer
):
    learner = make_learner(staleness=_staleness())
    scored = _scored(scorer, _older(learner), AmmdConfig())
    third, fourth = _learn(LocalWorkers([learner]), scored, step=3)
    assert "learner/logprob_gap" in third
    assert "learner/logprob_gap" not in fourth


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_microbatches_of_older_text_have_the_gradient_of_the_whole_batch(
    make_learner, scorer, objective, monkeypatch
):
    learners = [
        make_learner(
            objective=objective,
            staleness=_staleness(),
            config=LearnerConfig(max_tokens_per_microbatch=limit),
        )
        for limit in (None, 40)
    ]
    for learner in learners:  # gradients stay where they are
        monkeypatch.setattr(learner, "_update", lambda step: (0.0, 0.0))
    scored = _scored(scorer, _older(learners[0]), objective)
    whole, parts = (_learn(LocalWorkers([learner]), scored, steps=1) for learner in learners)
    assert parts[0].pop("learner/microbatches") >= 5
    _require_close(parts, whole, rel=1e-4)
    gradients, others = (_gradients(learner) for learner in learners)
    assert (others - gradients).norm() < 1e-4 * gradients.norm()


@pytest.mark.parametrize("name", ["futures", "tokens"])
def test_two_ranks_weigh_older_text_as_one_does(make_learner, make_ranks, scorer, name):
    how = {"objective": OBJECTIVES[name], "optimizer": ADAMW, "staleness": _staleness()}
    alone = make_learner(**how)
    scored = _scored(scorer, _older(alone), OBJECTIVES[name], shares=2)
    pair = make_ranks(2, **how)
    expected = _learn(LocalWorkers([alone]), scored)
    _require_close(_learn(pair, scored), expected, rel=2e-3)
    assert expected[0]["learner/importance_max"] > expected[0]["learner/importance_mean"] > 0.0


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_weights_reach_the_update(make_learner, scorer, objective):
    learners = [
        make_learner(objective=objective, optimizer=ADAMW, staleness=_staleness(kind))
        for kind in ("none", "token", "state")
    ]
    scored = _scored(scorer, _older(learners[0]), objective)
    for learner in learners:
        _learn(LocalWorkers([learner]), scored, steps=1)
    none, token, state = (_weights(learner) for learner in learners)
    for one, other in ((none, token), (none, state), (token, state)):
        assert (one - other).abs().max() > 1e-4


def _collate(trajectories):
    chunk = TrajectoryChunk(stream=Stream.ON_POLICY, trajectories=tuple(trajectories))
    totals = {Stream.ON_POLICY: StreamTotals.of(trajectories)}
    return collate([chunk], (), totals, torch.device("cpu"))


def test_off_policy_rows_are_never_weighed():
    off = make_trajectories(3, Author.TEACHER)
    chunk = TrajectoryChunk(stream=Stream.OFF_POLICY, trajectories=tuple(off))
    totals = {Stream.OFF_POLICY: StreamTotals.of(off)}
    batch = collate([chunk], (), totals, torch.device("cpu"))
    hidden_NH = torch.zeros(totals[Stream.OFF_POLICY].num_tokens, 2)
    assert batch.behaviour is None
    assert batch.stream_rows(Stream.OFF_POLICY, hidden_NH).behaviour_logprobs_N is None


def test_text_sampled_at_two_temperatures_is_refused():
    first, second = make_trajectories(2)
    with pytest.raises(RecordError, match=r"one sampling temperature, got \[0.5, 1.0\]"):
        _collate([replace(first, temperature=0.5), second])


def test_on_policy_text_that_says_no_version_is_refused():
    [trajectory] = make_trajectories(1)
    with pytest.raises(RecordError, match=r"'t0'.*weight versions that wrote it"):
        _collate([replace(trajectory, weight_versions=())])

"""A weight version on its way, from the driver's side; and sampler against learner."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fakes.local_workers import Done, LocalWorkers
from trajectories import make_trajectories

from distill_system.config.objective import MOMENTS
from distill_system.errors import TransferError
from distill_system.learner import Learner, LearnerGroup, publishing
from distill_system.records import Author, Stream, WeightVersion
from distill_system.scoring import ScoringPool


class Rank:
    """Packs at once; its rollout workers answer what they were told to."""

    def __init__(self, *answers):
        self.answers = answers
        self.log = []

    def address(self):
        return "here", 1

    def connect_rollouts(self, *arguments):
        self.log.append("connect")

    def start_publish(self, version):
        self.log.append(version)
        received = WeightVersion(version=version, num_bytes=8, digest=5, seconds=99.0)
        return [Done(error=a) if isinstance(a, Exception) else Done(received) for a in self.answers]


def _group(*ranks):
    group = LearnerGroup(LocalWorkers(ranks, stands_for=Learner))
    group.connect_rollouts("gloo", None, 2, 10.0)
    return group


def test_a_published_version_tells_what_the_workers_verified():
    published = _group(Rank(None, None), Rank()).publish(3)
    assert (published.version, published.num_bytes, published.digest) == (3, 8, 5)
    assert 0 <= published.seconds < 10.0


def test_what_went_wrong_in_a_worker_comes_out_where_the_publish_is_finished():
    group = _group(Rank(None, TransferError("student_rollout-1: half of it")))
    packing = group.start_publish(1)
    assert [reference.error for reference in packing] == [None]
    with pytest.raises(TransferError, match="student_rollout-1"):
        group.finish_publish()


def test_a_second_publish_finishes_the_first():
    rank = Rank(TransferError("the first one failed"))
    group = _group(rank)
    group.start_publish(1)
    with pytest.raises(TransferError, match="the first one failed"):
        group.start_publish(2)
    assert rank.log == ["connect", 1]
    rank.answers = (None,)
    group.start_publish(3)
    group.start_publish(4)
    assert group.finish_publish().version == 4
    assert rank.log == ["connect", 1, 3, 4]


class _Clocked(LocalWorkers):
    """Workers whose every answer takes its time by a clock that the test holds."""

    def __init__(self, clock, **seconds):
        super().__init__([])
        self.clock, self.takes, self.granted = clock, seconds, {}

    def finish(self, references, *, what, fetch=True, seconds=None):
        kind = "packing" if "gather" in what else "sending"
        self.granted[kind] = seconds
        self.clock.now += self.takes[kind]
        received = WeightVersion(version=3, num_bytes=8, digest=5, seconds=99.0)
        return [[Done(received)]] if kind == "packing" else [received]


@pytest.mark.parametrize(("packing", "left"), [(0.0, 10.0), (6.0, 4.0), (30.0, 0.0)])
def test_packing_and_sending_share_one_deadline_after_which_failures_are_still_heard_of(
    monkeypatch, packing, left
):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(publishing, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    workers: Any = _Clocked(clock, packing=packing, sending=0.25)
    published = publishing.Publishing(3, ["packing"]).finish(workers, 10.0)
    assert workers.granted == {
        "packing": 10.0,
        "sending": pytest.approx(left + publishing.ANSWER_SECONDS),
    }
    assert published.seconds == pytest.approx(packing + 0.25)


def test_the_workers_calls_can_be_waited_for_with_others():
    group = _group(Rank(None, None), Rank())
    group.start_publish(1)
    waiting = group.receiving()
    assert [reference.value.version for reference in waiting] == [1, 1]
    assert group.receiving() is waiting
    assert group.finish_publish().version == 1


def test_a_new_transfer_group_forgets_what_a_dead_worker_did_not_receive():
    rank = Rank(TransferError("dead"))
    group = _group(rank)
    group.start_publish(1)
    group.connect_rollouts("gloo", None, 1, 10.0)
    rank.answers = (None,)
    assert group.publish(2).version == 2


def _written_by(learner, trajectory):
    """What a perfect sampler would have recorded."""
    ids = torch.from_numpy(trajectory.token_ids).long()
    with torch.no_grad():
        logprobs = learner.model(input_ids=ids[None]).logits[0].log_softmax(-1)
    rows = logprobs[trajectory.num_prompt_tokens - 1 : -1]
    said = rows.gather(1, ids[trajectory.num_prompt_tokens :, None])[:, 0]
    return replace(trajectory, behaviour_logprobs=said.numpy().astype(np.float32))


@pytest.mark.parametrize("count", [1, 2])
def test_the_logprob_gap_is_what_sampler_and_learner_differ_by(
    make_learner, make_ranks, scorer, count
):
    alone = make_learner()
    written = [_written_by(alone, t) for t in make_trajectories(6)]
    wrong = list(written)
    for at, error in ((2, -0.5), (4, 0.25)):  # errors of both signs add up, they do not cancel
        shifted = written[at].behaviour_logprobs.copy()
        shifted[0] += error
        wrong[at] = replace(written[at], behaviour_logprobs=shifted)
    pool = ScoringPool(LocalWorkers([scorer]))
    ranks = make_ranks(count) if count > 1 else LocalWorkers([alone])

    def scored(on_policy):
        off = make_trajectories(6, Author.TEACHER)
        parts = [(off, Stream.OFF_POLICY), (on_policy, Stream.ON_POLICY)]
        return [
            chunk
            for trajectories, stream in parts
            for chunk in pool.start(trajectories, stream, needs=MOMENTS, num_shares=count)
        ]

    group = LearnerGroup(ranks)
    same, other = group.measure(scored(written)), group.measure(scored(wrong))
    assert same["max_logprob_gap"] < 1e-5
    mean = 0.75 / sum(t.num_response_tokens for t in wrong)
    assert other["logprob_gap"] == pytest.approx(mean, rel=1e-3)
    assert other["max_logprob_gap"] == pytest.approx(0.5, rel=1e-4)
    # A step says the same of the text that it learns from, whose version is 3.
    assert group.learn(3, scored(wrong)).metrics["learner/logprob_gap"] == pytest.approx(
        mean, rel=1e-3
    )


def test_a_rank_leaves_a_transfer_group_before_it_opens_another_and_as_it_ends(
    make_learner, monkeypatch
):
    log = []

    class Publisher:
        def __init__(self, source, *, master_port, **how):
            self.port = master_port
            log.append(("open", self.port))

        def close(self):
            log.append(("close", self.port))

    monkeypatch.setattr("distill_system.learner.learner.WeightPublisher", Publisher)
    learner = make_learner()
    for port in (1, 2):
        learner.connect_rollouts("gloo", None, "here", port, 2, 10.0)
    learner.close()
    assert log == [("open", 1), ("close", 1), ("open", 2), ("close", 2)]
    make_learner().close()

"""Preferences between answers: against brute force in float64, over ranks, against TRL's loss."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trl.trainer.dpo_trainer import DPOTrainer

from distill_system.config.objective import PreferenceConfig
from distill_system.objectives import PairRows, PolicyHeads, TeacherRows, TokenRows
from distill_system.objectives.preference import Preference

BETA = 0.3
LENGTHS = {False: [3, 1, 4, 2, 5], True: [2, 4, 1, 6, 3]}
"""Tokens of the better and of the worse answer of five pairs."""


class Problem:
    """A student and what the teacher said of ten answers; hidden states stand for prompts."""

    def __init__(self, *, vocabulary=11, hidden=6):
        generator = torch.Generator().manual_seed(1)

        def draw(*shape):
            return torch.randn(*shape, generator=generator)

        self.unembedding = draw(vocabulary, hidden).requires_grad_()
        self.hidden = {w: [draw(n, hidden) for n in LENGTHS[w]] for w in LENGTHS}
        self.ids = {
            w: [torch.randint(vocabulary, (n,), generator=generator) for n in LENGTHS[w]]
            for w in LENGTHS
        }
        self.said = {w: [-draw(n).abs() - 1.0 for n in LENGTHS[w]] for w in LENGTHS}

    def heads(self):
        return PolicyHeads(
            unembedding_VH=self.unembedding, action_embeddings_VE=torch.ones(11, 3), chunk_tokens=4
        )

    def rows(self, halves, *, num_pairs=5):
        """One stream's rows of (is worse, pair) halves."""
        counts = torch.tensor([LENGTHS[worse][at] for worse, at in halves])
        return TokenRows(
            hidden_NH=torch.cat([self.hidden[worse][at] for worse, at in halves]),
            token_ids_N=torch.cat([self.ids[worse][at] for worse, at in halves]),
            sequence_ids_N=torch.arange(len(halves)).repeat_interleave(counts),
            positions_N=torch.cat([torch.arange(count) for count in counts]),
            num_global_tokens=99,
            num_global_sequences=10,
            teacher=TeacherRows(
                logprobs_N=torch.cat([self.said[worse][at] for worse, at in halves])
            ),
            pairs=PairRows(
                numbers_S=torch.tensor([at for _, at in halves]),
                is_worse_S=torch.tensor([worse for worse, _ in halves]),
                num_pairs=num_pairs,
            ),
        )

    def ratio(self, worse, at):
        """r of one answer, token by token, in float64."""
        total = torch.zeros((), dtype=torch.float64)
        hidden, ids, said = self.hidden[worse][at], self.ids[worse][at], self.said[worse][at]
        for state, token, logprob in zip(hidden, ids, said, strict=True):
            logits = self.unembedding.double() @ state.double()
            total = total + logits[token] - logits.logsumexp(0) - logprob.double()
        return total


def _sigmoid(value):
    return 1.0 / (1.0 + torch.exp(-value))


def _by_hand(problem, kind, pairs):
    """The printed formulas, pair by pair."""
    better = [problem.ratio(False, at) for at in pairs]
    worse = [problem.ratio(True, at) for at in pairs]
    if kind == "dpo":
        losses = [
            -torch.log(_sigmoid(BETA * (one - two))) for one, two in zip(better, worse, strict=True)
        ]
    else:
        zero = torch.zeros((), dtype=torch.float64)
        above, below = (torch.maximum(zero, sum(r) / len(r)) for r in (better, worse))
        losses = [1.0 - _sigmoid(BETA * (each - below)) for each in better]
        losses += [1.0 - _sigmoid(BETA * (above - each)) for each in worse]
    return sum(losses) / len(losses)


def _config(kind, pairs="teacher_over_student"):
    return PreferenceConfig(type="preference", loss=kind, pairs=pairs, beta=BETA)


def _gradient(problem, loss):
    (gradient,) = torch.autograd.grad(loss, problem.unembedding)
    return gradient


every_kind = pytest.mark.parametrize("kind", ["dpo", "kto_pair"])


@every_kind
@pytest.mark.parametrize("source", ["streams", "rows"])
def test_loss_and_gradient_are_the_printed_formulas(kind, source):
    problem = Problem()
    better, worse = [(False, at) for at in range(5)], [(True, at) for at in (3, 1, 0, 4, 2)]
    streams = (better, worse) if source == "streams" else (better + worse, None)
    off, on = (None if halves is None else problem.rows(halves) for halves in streams)
    output = Preference(_config(kind)).compute_loss(problem.heads(), off, on, lambda t: t)
    expected = _by_hand(problem, kind, range(5))
    assert output.loss_share.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(
        _gradient(problem, output.loss_share), _gradient(problem, expected), rtol=1e-4, atol=1e-6
    )
    margins = [(problem.ratio(False, at) - problem.ratio(True, at)).item() for at in range(5)]
    assert output.metrics["preference_margin"] == pytest.approx(sum(margins) / 5, rel=1e-5)
    right = sum(m > 0 for m in margins) / 5
    assert output.metrics["preference_accuracy"] == pytest.approx(right)
    assert output.metrics["preference_pairs"] == 5.0


@every_kind
def test_halves_on_two_ranks_add_up_to_the_step_of_one(kind):
    problem = Problem()
    ranks = [
        ([(False, 0), (False, 3)], [(True, 4), (True, 1), (True, 0)]),
        ([(False, 4), (False, 1), (False, 2)], [(True, 2), (True, 3)]),
    ]
    told = []

    def play(sum_over_ranks):
        return [
            Preference(_config(kind)).compute_loss(
                problem.heads(), problem.rows(off), problem.rows(on), sum_over_ranks
            )
            for off, on in ranks
        ]

    def listen(tensor):
        told.append(tensor.clone())
        return tensor.clone()

    play(listen)
    first, second = play(lambda tensor: told[0] + told[1])
    expected = _by_hand(problem, kind, range(5))
    total = first.loss_share + second.loss_share
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(
        _gradient(problem, total), _gradient(problem, expected), rtol=1e-4, atol=1e-6
    )
    assert first.metrics == second.metrics


@every_kind
def test_a_half_without_its_other_counts_for_nothing(kind):
    problem = Problem()
    better, worse = [(False, at) for at in (0, 1, 2, 4)], [(True, at) for at in (1, 3, 4)]
    rows = problem.rows(better), problem.rows(worse)
    output = Preference(_config(kind)).compute_loss(problem.heads(), *rows, lambda t: t)
    expected = _by_hand(problem, kind, [1, 4])
    assert output.loss_share.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(
        _gradient(problem, output.loss_share), _gradient(problem, expected), rtol=1e-4, atol=1e-6
    )
    assert output.metrics["preference_pairs"] == 2.0
    alone = problem.rows(better[:1]), problem.rows(worse[:1])
    nothing = Preference(_config(kind)).compute_loss(problem.heads(), *alone, lambda t: t)
    assert nothing.loss_share.item() == 0.0
    assert not _gradient(problem, nothing.loss_share).any()


def test_dpo_is_what_trl_computes():
    """TRL's own loss, its model replaced by one that says the same log-probabilities."""
    problem = Problem()
    halves = [(False, at) for at in range(5)] + [(True, at) for at in range(5)]
    longest = max(map(max, LENGTHS.values()))

    def padded(values):
        """[10, longest], zeros behind each answer."""
        return torch.stack([torch.cat([v, v.new_zeros(longest - len(v))]) for v in values])

    student = []
    for worse, at in halves:
        logits = problem.hidden[worse][at] @ problem.unembedding.T
        student.append(logits.log_softmax(-1).gather(1, problem.ids[worse][at][:, None])[:, 0])
    said = padded(student)
    mask = padded([torch.ones(len(each)) for each in student])
    mask = torch.cat([torch.zeros(10, 1), mask], dim=1)

    def say(**_):
        extra = {"entropy": said.detach(), "mean_logits": said.detach()}
        top = torch.zeros(said.shape, dtype=torch.bool)
        return SimpleNamespace(log_probs=said, is_top1=top, **extra)

    reference = torch.stack([problem.said[worse][at].sum() for worse, at in halves])
    gather = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda t: t, gather_for_metrics=lambda t: t
    )
    trainer: Any = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=gather,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        beta=BETA,
        use_weighting=False,
        _tp_size=1,
        _total_train_tokens=0,
        _metrics={"train": defaultdict(list)},
    )
    inputs = {
        "input_ids": torch.zeros(10, longest + 1, dtype=torch.int64),
        "attention_mask": torch.ones(10, longest + 1),
        "completion_mask": mask,
        "ref_chosen_logps": reference[:5],
        "ref_rejected_logps": reference[5:],
    }
    theirs = DPOTrainer._compute_loss(trainer, say, inputs, False)
    rows = problem.rows(halves[:5]), problem.rows(halves[5:])
    ours = Preference(_config("dpo")).compute_loss(problem.heads(), *rows, lambda t: t)
    assert ours.loss_share.item() == pytest.approx(theirs.item(), rel=1e-5)
    torch.testing.assert_close(
        _gradient(problem, ours.loss_share), _gradient(problem, theirs), rtol=1e-4, atol=1e-6
    )
    [margin] = trainer._metrics["train"]["rewards/margins"]
    assert BETA * ours.metrics["preference_margin"] == pytest.approx(margin, rel=1e-5)
    assert trainer._metrics["train"]["rewards/accuracies"] == [ours.metrics["preference_accuracy"]]

from __future__ import annotations

import pytest
import torch
from token_rows import make_token_rows

from distill_system.config.objective import MinillmConfig, TeacherNeeds
from distill_system.objectives import build_objective
from distill_system.objectives.rows import PolicyHeads, TeacherRows

VOCABULARY = 6


def identity(tensor):
    return tensor


def _draw(seed, *shape):
    return 1.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _rows(lengths, seed):
    """Hidden states are logits; the teacher's are others."""
    count = sum(lengths)
    generator = torch.Generator().manual_seed(seed + 100)
    tokens = torch.randint(VOCABULARY, (count,), generator=generator)
    teacher = _draw(seed + 200, count, VOCABULARY)
    return make_token_rows(
        _draw(seed, count, VOCABULARY).requires_grad_(),
        tokens,
        lengths,
        teacher=TeacherRows(
            features_NF=teacher,
            logprobs_N=teacher.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1),
        ),
    )


def _heads():
    return PolicyHeads(
        unembedding_VH=torch.eye(VOCABULARY),
        action_embeddings_VE=torch.zeros(VOCABULARY, 3),
        chunk_tokens=4,
        teacher_unembedding_VF=torch.eye(VOCABULARY),
    )


def _play(off_policy, on_policy, **settings):
    config = MinillmConfig(type="minillm", **settings)
    objective = build_objective(config, max_response_tokens=9, total_steps=1)
    return objective.compute_loss(_heads(), off_policy, on_policy, identity)


def _by_hand(rows, *, alpha, normalise, importance):
    """sum_t w_t (KL_t + F_t log pi(y_t)) in float64, a token at a time, as the paper writes it."""
    logits = rows.hidden_NH.detach().double().requires_grad_()
    student = logits.log_softmax(-1)
    teacher = rows.teacher.features_NF.double().log_softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for sequence in range(rows.num_global_sequences):
        places = (rows.sequence_ids_N == sequence).nonzero().flatten().tolist()
        tokens = [int(rows.token_ids_N[place]) for place in places]
        own = [float(student[p, y].detach()) for p, y in zip(places, tokens, strict=True)]
        other = [float(teacher[p, y]) for p, y in zip(places, tokens, strict=True)]
        rewards = [theirs - ours for ours, theirs in zip(own, other, strict=True)]

        def weight(first, last, own=own, other=other):
            """pi_theta / mixture of the tokens first..last-1 taken together."""
            ours = torch.tensor(own[first:last], dtype=torch.float64).sum().exp()
            theirs = torch.tensor(other[first:last], dtype=torch.float64).sum().exp()
            return float(ours / (alpha * theirs + (1 - alpha) * ours))

        for t, place in enumerate(places):
            later = range(t + 1, len(places))
            if importance == "token":
                step = weight(t, t + 1)
                future = step * sum(rewards[k] for k in later)
            else:
                step = weight(0, t)
                future = sum(weight(0, k + 1) * rewards[k] for k in later)
            if normalise and later:
                future /= len(later)
            kl = (student[place].exp() * (student[place] - teacher[place])).sum()
            total = total + step * kl - future * student[place, tokens[t]]
    return torch.autograd.grad(total, logits)[0]


@pytest.mark.parametrize("importance", ["token", "prefix"])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.25])
def test_gradients_are_those_of_the_paper_written_out(alpha, normalise, importance):
    on_policy = _rows((4, 1, 3), seed=0)
    off_policy = _rows((2, 5), seed=1) if alpha else None
    settings = {"normalise_length": normalise, "importance": importance}
    _play(off_policy, on_policy, teacher_mixture=alpha, **settings).loss_share.backward()
    hand = {"alpha": alpha, "normalise": normalise, "importance": importance}
    if not alpha:
        expected = _by_hand(on_policy, **hand) / 8
        torch.testing.assert_close(
            on_policy.hidden_NH.grad.double(), expected, atol=1e-6, rtol=1e-4
        )
        return
    # Two teacher responses count a quarter, three student responses three quarters.
    mean_tokens = 0.25 * 7 / 2 + 0.75 * 8 / 3
    for rows, share in ((off_policy, 0.25 / 2), (on_policy, 0.75 / 3)):
        expected = share / mean_tokens * _by_hand(rows, **hand)
        torch.testing.assert_close(rows.hidden_NH.grad.double(), expected, atol=1e-6, rtol=1e-4)


def test_where_streams_have_their_shares_every_token_counts_the_same():
    """One teacher response, three of the student: with alpha = 1/4 this is the plain mean."""
    on_policy, off_policy = _rows((4, 1, 3), seed=0), _rows((5,), seed=1)
    _play(off_policy, on_policy, teacher_mixture=0.25).loss_share.backward()
    for rows in (off_policy, on_policy):
        expected = _by_hand(rows, alpha=0.25, normalise=True, importance="token") / 13
        torch.testing.assert_close(rows.hidden_NH.grad.double(), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_the_language_model_term_adds_cross_entropy_of_the_off_policy_stream(alpha):
    grads = []
    for weight in (0.0, 0.5):
        on_policy, off_policy = _rows((4, 1), seed=0), _rows((2, 3), seed=1)
        read = off_policy if alpha or weight else None
        output = _play(read, on_policy, teacher_mixture=alpha, language_model_weight=weight)
        output.loss_share.backward()
        grads.append((off_policy.hidden_NH.grad, on_policy.hidden_NH.grad))
    without = grads[0][0] if alpha else torch.zeros_like(grads[1][0])
    logits = off_policy.hidden_NH.detach().clone().requires_grad_()
    cross_entropy = torch.nn.functional.cross_entropy(logits, off_policy.token_ids_N)
    [expected] = torch.autograd.grad(0.5 * cross_entropy, logits)
    torch.testing.assert_close(grads[1][0] - without, expected, atol=1e-6, rtol=1e-4)
    assert torch.equal(grads[0][1], grads[1][1])
    assert float(output.metric_shares["cross_entropy"]) == pytest.approx(
        float(cross_entropy.detach()), rel=1e-5
    )


def test_metrics_are_the_exact_divergences_and_the_mean_weight():
    on_policy, off_policy = _rows((4, 1), seed=0), _rows((2, 3), seed=1)
    output = _play(off_policy, on_policy, teacher_mixture=0.2)
    for name, rows in (("on_policy", on_policy), ("off_policy", off_policy)):
        student = rows.hidden_NH.detach().log_softmax(-1)
        teacher = rows.teacher.features_NF.log_softmax(-1)
        kl = torch.nn.functional.kl_div(teacher, student, log_target=True, reduction="batchmean")
        assert float(output.metric_shares[f"{name}_reverse_kl"]) == pytest.approx(
            float(kl), rel=1e-5
        )
    written = off_policy.token_ids_N[:, None]
    own, theirs = (
        x.softmax(-1).gather(1, written)
        for x in (off_policy.hidden_NH.detach(), off_policy.teacher.features_NF)
    )
    weight = (own / (0.2 * theirs + 0.8 * own)).mean()
    assert float(output.metric_shares["off_policy_importance"]) == pytest.approx(
        float(weight), rel=1e-5
    )


def test_the_students_logprobs_are_handed_back_for_the_alarm():
    on_policy = _rows((4, 1), seed=0)
    output = _play(None, on_policy, teacher_mixture=0.0)
    expected = on_policy.hidden_NH.detach().log_softmax(-1)
    torch.testing.assert_close(
        output.student_logprobs_N, expected.gather(1, on_policy.token_ids_N[:, None]).squeeze(1)
    )


def test_a_token_that_the_student_hardly_knows_gives_finite_weights():
    """log pi*/pi_theta of 200 nats overflows a float32 ratio."""
    off_policy = _rows((3,), seed=1)
    with torch.no_grad():
        off_policy.hidden_NH[torch.arange(3), off_policy.token_ids_N] -= 200.0
    on_policy = _rows((3,), seed=0)
    for importance in ("token", "prefix"):
        _play(
            off_policy, on_policy, teacher_mixture=0.2, importance=importance
        ).loss_share.backward()
        assert bool(off_policy.hidden_NH.grad.isfinite().all())


def test_streams_and_teacher_work_follow_the_mixture():
    alone = MinillmConfig(type="minillm", teacher_mixture=0.0)
    text = MinillmConfig(type="minillm", teacher_mixture=0.0, language_model_weight=1.0)
    mixed = MinillmConfig(type="minillm")
    everything = TeacherNeeds(features=True, logprobs=True)
    assert [config.reads("off_policy") for config in (alone, text, mixed)] == [False, True, True]
    assert all(config.reads("on_policy") for config in (alone, text, mixed))
    assert not text.teacher_needs("off_policy").anything
    assert mixed.teacher_needs("off_policy") == everything
    assert text.teacher_needs("on_policy") == everything

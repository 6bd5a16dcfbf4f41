from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from distill_system.objectives import chunked_products
from distill_system.objectives.divergences import kl_divergence
from distill_system.objectives.vocabulary import (
    TeacherDistribution,
    read_top_k,
    read_vocabulary,
    sum_over_vocabulary,
    unit_rows,
)


def _problem(num_tokens=13, hidden=6, vocabulary=17, embedding=5):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float32)

    token_ids = torch.randint(vocabulary, (num_tokens,), generator=generator)
    return (
        draw(num_tokens, hidden),
        token_ids,
        draw(vocabulary, hidden),
        draw(vocabulary, embedding),
    )


def test_expected_embedding_equals_the_sum_over_the_vocabulary():
    hidden, ids, unembedding, actions = _problem()
    rows = read_vocabulary(hidden, ids, unembedding, actions, chunk_tokens=4)
    for row in range(len(ids)):
        logits = [float(hidden[row].double() @ w.double()) for w in unembedding]
        weights = torch.tensor(logits, dtype=torch.float64).exp()
        weights /= weights.sum()
        expected = sum(w * e.double() for w, e in zip(weights, actions, strict=True))
        torch.testing.assert_close(
            rows.expected_embedding_NE[row].double(), expected, atol=1e-5, rtol=1e-5
        )
        written = weights[ids[row]].log()
        torch.testing.assert_close(rows.logprobs_N[row].double(), written, atol=1e-5, rtol=1e-5)


def test_bilinear_expectation_needs_the_expected_embedding_alone():
    hidden, ids, unembedding, actions = _problem()
    features = torch.randn(13, 4)
    critic = torch.randn(4, 5)
    probabilities = (hidden @ unembedding.T).softmax(-1)
    every_value = torch.einsum("nf,fe,ve->nv", features, critic, actions)
    brute = (probabilities * every_value).sum(-1)
    rows = read_vocabulary(hidden, ids, unembedding, actions, chunk_tokens=100)
    short = ((features @ critic) * rows.expected_embedding_NE).sum(-1)
    torch.testing.assert_close(short, brute, atol=1e-5, rtol=1e-4)


def test_expected_embedding_and_its_gradient_are_one_attention_read():
    hidden, ids, unembedding, actions = _problem()
    seen = torch.randn(13, 5)
    gradients = []
    for read in (
        lambda h: (
            read_vocabulary(h, ids, unembedding, actions, chunk_tokens=3).expected_embedding_NE
        ),
        lambda h: scaled_dot_product_attention(
            h[None], unembedding[None], actions[None], scale=1.0
        )[0],
    ):
        leaf = hidden.clone().requires_grad_()
        gradients.append(torch.autograd.grad((read(leaf) * seen).sum(), leaf)[0])
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


def test_chunk_size_changes_neither_values_nor_gradients():
    results = []
    for chunk in (1, 5, 13, 1000):
        hidden, ids, unembedding, actions = _problem()
        hidden.requires_grad_()
        unembedding.requires_grad_()
        rows = read_vocabulary(hidden, ids, unembedding, actions, chunk_tokens=chunk)
        (rows.logprobs_N.sum() + rows.expected_embedding_NE.square().sum()).backward()
        results.append((rows.logprobs_N.detach(), hidden.grad, unembedding.grad))
    for result in results[1:]:
        for ours, first in zip(result, results[0], strict=True):
            torch.testing.assert_close(ours, first, atol=1e-5, rtol=1e-5)


def test_no_tensor_of_all_tokens_by_vocabulary_is_kept_for_backward():
    tokens, vocabulary, chunk = 64, 512, 8
    hidden = torch.randn(tokens, 4, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        read_vocabulary(
            hidden,
            torch.zeros(tokens, dtype=torch.long),
            torch.randn(vocabulary, 4),
            torch.randn(vocabulary, 3),
            chunk_tokens=chunk,
        )
    assert max(kept) < chunk * vocabulary


def test_no_rows_in_no_rows_out_with_a_graph():
    hidden = torch.zeros(0, 6, requires_grad=True)
    rows = read_vocabulary(
        hidden, torch.zeros(0, dtype=torch.long), torch.ones(3, 6), torch.ones(3, 5), chunk_tokens=2
    )
    assert rows.logprobs_N.shape == (0,)
    assert rows.expected_embedding_NE.shape == (0, 5)
    rows.expected_embedding_NE.sum().backward()
    assert hidden.grad is not None


def test_unit_rows_have_length_one_and_a_zero_row_stays_zero():
    rows = unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    assert rows.tolist() == [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    stacked = unit_rows(torch.full((2, 3, 4), 5.0))
    assert stacked.flatten().tolist() == [0.5] * 24


def _reverse_kl(chunk):
    return kl_divergence(chunk.student_logprobs_cV, chunk.teacher_logprobs_cV)


def _sum(hidden, ids, unembedding, *, loss=_reverse_kl, dtype=torch.float32, **settings):
    generator = torch.Generator().manual_seed(1)
    teacher = TeacherDistribution(
        features_NF=torch.randn(len(ids), 3, generator=generator),
        unembedding_VF=torch.randn(len(unembedding), 3, generator=generator).to(dtype),
    )
    weights = torch.linspace(0.5, 1.5, len(ids))
    return sum_over_vocabulary(
        hidden,
        ids,
        unembedding,
        weights,
        loss,
        teacher=teacher,
        **{"chunk_tokens": 4, **settings},
    )


def _sum_gradients(hidden, ids, unembedding, **settings):
    leaves = hidden.clone().requires_grad_(), unembedding.clone().requires_grad_()
    result = _sum(leaves[0], ids, leaves[1], **settings)
    return result.total.detach(), *torch.autograd.grad(result.total, leaves)


def test_neither_chunks_nor_blocks_change_a_sum_or_its_gradients(monkeypatch):
    hidden, ids, unembedding, _ = _problem()
    whole = _sum_gradients(hidden, ids, unembedding, chunk_tokens=1000)
    for chunk, block in ((1, 1), (4, 3), (13, 2), (5, 100)):
        monkeypatch.setattr(chunked_products, "CPU_BLOCK_ELEMENTS", block * len(unembedding))
        parts = _sum_gradients(hidden, ids, unembedding, chunk_tokens=chunk)
        for part, expected in zip(parts, whole, strict=True):
            torch.testing.assert_close(part, expected, atol=1e-5, rtol=1e-5)


def test_a_loss_sees_its_tokens_together_in_order_and_once(monkeypatch):
    """Whole multiples of three, whatever the chunk and the block; one token is left at the end."""
    hidden, ids, unembedding, _ = _problem()
    monkeypatch.setattr(chunked_products, "CPU_BLOCK_ELEMENTS", 4 * len(unembedding))
    for chunk in (1, 5, 7, 100):
        seen = []

        def loss(chunk, seen=seen):
            seen.append(list(range(*chunk.rows.indices(13))))
            assert torch.equal(chunk.token_ids_c, ids[chunk.rows])
            return chunk.written_logprobs_c

        _sum(hidden, ids, unembedding, loss=loss, chunk_tokens=chunk, tokens_together=3)
        assert [token for rows in seen for token in rows] == list(range(13))
        assert {len(rows) for rows in seen[:-1]} == {3}


def test_the_logprobs_of_a_tempered_sum_are_not_tempered():
    hidden, ids, unembedding, _ = _problem()
    dense = (hidden @ unembedding.T).log_softmax(-1)[torch.arange(13), ids]
    for temperature in (1.0, 0.3):
        result = _sum(hidden, ids, unembedding, temperature=temperature)
        torch.testing.assert_close(result.logprobs_N, dense, atol=1e-5, rtol=1e-5)


def test_a_frozen_unembedding_gets_no_gradient_and_leaves_the_other_as_it_is():
    hidden, ids, unembedding, _ = _problem()
    _, expected, _ = _sum_gradients(hidden, ids, unembedding)
    leaf = hidden.clone().requires_grad_()
    _sum(leaf, ids, unembedding).total.backward()
    assert torch.equal(leaf.grad, expected)
    assert unembedding.grad is None


def test_a_student_that_is_frozen_below_its_unembedding_learns_there_alone():
    hidden, ids, unembedding, _ = _problem()
    _, _, expected = _sum_gradients(hidden, ids, unembedding)
    unembedding.requires_grad_()
    _sum(hidden, ids, unembedding).total.backward()
    assert torch.equal(unembedding.grad, expected)


def test_without_gradients_none_is_made():
    hidden, ids, unembedding, _ = _problem()
    made = []

    def loss(chunk):
        made.append(chunk.student_logprobs_cV.requires_grad)
        return _reverse_kl(chunk)

    with torch.no_grad():
        result = _sum(hidden.requires_grad_(), ids, unembedding.requires_grad_(), loss=loss)
    assert made == [False] * len(made) != []
    assert not result.total.requires_grad
    expected, *_ = _sum_gradients(hidden.detach(), ids, unembedding.detach())
    torch.testing.assert_close(result.total, expected)


def test_tied_embeddings_get_the_gradient_of_both_uses():
    _, ids, unembedding, _ = _problem()

    def dense(table):
        student = (table[ids] @ table.T).log_softmax(-1)
        return -(torch.linspace(0.5, 1.5, 13) * student[torch.arange(13), ids]).sum()

    def ours(table):
        return _sum(table[ids], ids, table, loss=lambda chunk: -chunk.written_logprobs_c).total

    gradients = []
    for loss in (dense, ours):
        table = unembedding.clone().requires_grad_()
        gradients.append(torch.autograd.grad(loss(table), table)[0])
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-5)


def test_no_rows_sum_to_nothing_with_a_gradient_of_zero():
    _, _, unembedding, _ = _problem()
    hidden = torch.zeros(0, 6)
    total, into_hidden, into_unembedding = _sum_gradients(
        hidden, torch.zeros(0, dtype=torch.int64), unembedding
    )
    assert float(total) == 0.0
    assert into_hidden.shape == (0, 6)
    assert not into_unembedding.any()


def test_a_sum_is_differentiated_once():
    hidden, ids, unembedding, _ = _problem()
    total = _sum(hidden.requires_grad_(), ids, unembedding).total
    total.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="differentiated once"):
        total.backward()


def test_a_scaled_sum_has_a_scaled_gradient():
    hidden, ids, unembedding, _ = _problem()
    _, expected, _ = _sum_gradients(hidden, ids, unembedding)
    leaf = hidden.clone().requires_grad_()
    (3.0 * _sum(leaf, ids, unembedding).total).backward()
    torch.testing.assert_close(leaf.grad, 3.0 * expected)


def test_the_teacher_is_read_for_the_losses_that_ask_for_it_alone(monkeypatch):
    hidden, ids, unembedding, _ = _problem()
    reads = []
    monkeypatch.setattr(
        TeacherDistribution,
        "make_logits",
        lambda self, rows: reads.append(rows) or torch.zeros(rows.stop - rows.start, 17),
    )
    _sum(hidden, ids, unembedding, loss=lambda chunk: -chunk.written_logprobs_c)
    assert reads == []
    _sum(hidden, ids, unembedding)
    assert reads == [slice(0, 4), slice(4, 8), slice(8, 12), slice(12, 13)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_products_stay_near_the_exact_sum(dtype):
    """Under autocast, and with a teacher's unembedding of that precision; gradients are float32."""
    hidden, ids, unembedding, _ = _problem()
    exact = _sum_gradients(hidden, ids, unembedding)
    with torch.autocast("cpu", dtype=dtype):
        rough = _sum_gradients(hidden, ids, unembedding, dtype=dtype)
    for ours, expected in zip(rough, exact, strict=True):
        assert ours.dtype == torch.float32
        assert 0 < (ours - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_reads_stay_near_the_exact_read(dtype):
    """Backward too, also where it is called under autocast."""
    results = []
    for enabled in (False, True):
        hidden, ids, unembedding, actions = _problem()
        leaves = hidden.requires_grad_(), unembedding.requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            rows = read_vocabulary(hidden, ids, unembedding, actions, chunk_tokens=4)
            loss = rows.logprobs_N.sum() + rows.expected_embedding_NE.square().sum()
            gradients = torch.autograd.grad(loss, leaves)
        results.append((rows.logprobs_N, rows.expected_embedding_NE, *gradients))
    for expected, ours in zip(*results, strict=True):
        assert ours.dtype == torch.float32
        assert 0 < (ours - expected).norm() < 2e-2 * expected.norm()


def test_parameters_of_half_precision_get_gradients_of_their_own():
    hidden, ids, unembedding, _ = _problem()
    _, *exact = _sum_gradients(hidden, ids, unembedding)
    _, *ours = _sum_gradients(hidden.bfloat16(), ids, unembedding.bfloat16())
    for gradient, expected in zip(ours, exact, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient - expected).norm() < 3e-2 * expected.norm()


@pytest.mark.parametrize("read", ["sum", "rows"])
def test_the_unembeddings_gradient_in_bfloat16_does_not_drift_over_4096_chunks(read):
    """A sum kept in bfloat16 stops growing once it is some 256 times as large as what is added."""
    tokens, hidden_size, vocabulary = 4096, 4, 8
    hidden = torch.randn(tokens, hidden_size, generator=torch.Generator().manual_seed(0)).abs()
    ids = torch.zeros(tokens, dtype=torch.int64)
    unembedding = torch.randn(vocabulary, hidden_size, generator=torch.Generator().manual_seed(1))

    def gradient(dtype):
        leaf = unembedding.bfloat16().to(dtype).requires_grad_()
        states = hidden.bfloat16().to(dtype)
        if read == "sum":
            total = sum_over_vocabulary(
                states,
                ids,
                leaf,
                torch.ones(tokens),
                lambda chunk: -chunk.written_logprobs_c,
                chunk_tokens=1,
            ).total
        else:
            actions = torch.ones(vocabulary, 1)
            total = -read_vocabulary(states, ids, leaf, actions, chunk_tokens=1).logprobs_N.sum()
        return torch.autograd.grad(total, leaf)[0].double()

    exact, ours = gradient(torch.float32), gradient(torch.bfloat16)
    assert (ours - exact).norm() < 5e-3 * exact.norm()


def _capped(hidden, unembedding, cap):
    return cap * torch.tanh(hidden.double() @ unembedding.double().T / cap)


@pytest.mark.parametrize("cap", [0.7, 3.0])
def test_a_capped_read_and_its_gradients_are_those_of_the_capped_table(cap):
    hidden, ids, unembedding, actions = _problem()
    seen = torch.randn(13, 5, generator=torch.Generator().manual_seed(2))
    leaves = hidden.clone().requires_grad_(), unembedding.clone().requires_grad_()
    rows = read_vocabulary(
        leaves[0],
        ids,
        leaves[1],
        actions,
        chunk_tokens=4,
        behaviour_temperature=0.5,
        logit_cap=cap,
    )
    (rows.logprobs_N.sum() + (rows.expected_embedding_NE * seen).sum()).backward()

    plain = hidden.clone().requires_grad_(), unembedding.clone().requires_grad_()
    logits = _capped(*plain, cap)
    logprobs = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    expected = logits.softmax(-1) @ actions.double()
    (logprobs.sum() + (expected * seen.double()).sum()).backward()
    tempered = (logits / 0.5).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    for ours, theirs in (
        (rows.logprobs_N, logprobs),
        (rows.expected_embedding_NE, expected),
        (rows.behaviour_logprobs_N, tempered),
        (leaves[0].grad, plain[0].grad),
        (leaves[1].grad, plain[1].grad),
    ):
        torch.testing.assert_close(ours.double(), theirs.double(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_capped_sum_and_its_gradients_are_those_of_the_capped_tables(temperature):
    """Both policies are capped, each by its own."""
    hidden, ids, unembedding, _ = _problem()
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(13, 3, generator=generator)
    teacher_unembedding = torch.randn(17, 3, generator=generator)
    weights = torch.linspace(0.5, 1.5, 13)
    leaves = hidden.clone().requires_grad_(), unembedding.clone().requires_grad_()
    result = sum_over_vocabulary(
        leaves[0],
        ids,
        leaves[1],
        weights,
        _reverse_kl,
        teacher=TeacherDistribution(
            features_NF=features, unembedding_VF=teacher_unembedding, logit_cap=1.5
        ),
        temperature=temperature,
        chunk_tokens=4,
        logit_cap=0.9,
    )
    result.total.backward()

    plain = hidden.clone().requires_grad_(), unembedding.clone().requires_grad_()
    student = (_capped(*plain, 0.9) / temperature).log_softmax(-1)
    teacher = (_capped(features, teacher_unembedding, 1.5) / temperature).log_softmax(-1)
    values = (student.exp() * (student - teacher)).sum(-1)
    total = (values * weights.double()).sum()
    total.backward()
    logprobs = _capped(*plain, 0.9).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    for ours, theirs in (
        (result.total, total),
        (result.values_N, values),
        (result.logprobs_N, logprobs),
        (leaves[0].grad, plain[0].grad),
        (leaves[1].grad, plain[1].grad),
    ):
        torch.testing.assert_close(ours.double(), theirs.double(), atol=1e-5, rtol=1e-4)


def test_the_most_likely_tokens_of_capped_logits():
    hidden, _, unembedding, _ = _problem()
    ids, logprobs = read_top_k(hidden, unembedding, k=3, chunk_tokens=4, logit_cap=0.9)
    best = _capped(hidden, unembedding, 0.9).log_softmax(-1).topk(3)
    torch.testing.assert_close(logprobs.double(), best.values, atol=1e-5, rtol=1e-5)
    assert torch.equal(ids, best.indices)

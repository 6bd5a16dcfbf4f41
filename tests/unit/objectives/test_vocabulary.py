from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from distill_system.objectives.vocabulary import read_vocabulary, unit_rows


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

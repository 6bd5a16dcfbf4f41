"""No tensor of tokens x vocabulary: every objective of the configuration is held to it.

A dispatch mode sees every tensor that torch makes, forward and backward, and counts the bytes that
live at once. It is exact, but sees no buffers inside a kernel; the last test asks the system.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from pathlib import Path
from typing import get_args

import pytest
import torch
from fakes.forked_workers import ForkedWorkers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill_system.config.objective import AmmdConfig, ObjectiveConfig, TokenMatchingConfig
from distill_system.config.objective.ammd import AdvantageConfig
from distill_system.config.objective.token_losses import SinkhornConfig, TokenLossConfig
from distill_system.objectives import (
    PairRows,
    PolicyHeads,
    TeacherRows,
    TokenRows,
    build_objective,
    chunked_products,
)
from distill_system.objectives.divergences import kl_divergence
from distill_system.objectives.rows import ObjectiveOutput
from distill_system.objectives.vocabulary import (
    TeacherDistribution,
    read_top_k,
    sum_over_vocabulary,
    unit_rows,
)

TOKENS, CHUNK = 16, 8
HIDDEN, FEATURES = 4, 6
VOCABULARIES = [9_000, 18_000]
"""Bounds are in rows of a vocabulary, so that a small one hides less of what is beside them."""
FLOAT_BYTES = 4
BLOCK_ROWS = 12
"""Temporaries that a loss may hold of one row: the dearest of them sorts, in int64."""
SMALL = {SinkhornConfig: {"batch_tokens": 4}}
"""Settings without which a loss would be slow, or its batch larger than a chunk."""


def _members(union):
    return get_args(get_args(union)[0])


def _type_name(model):
    [name] = get_args(model.model_fields["type"].annotation)
    return name


def _list_objectives():
    """One of each type, None (supervised fine-tuning), and AMMD's ways that read a vocabulary."""
    for model in _members(ObjectiveConfig):
        if model is not TokenMatchingConfig:
            yield pytest.param(model(type=_type_name(model)), id=_type_name(model))
    for advantage in get_args(AdvantageConfig.model_fields["type"].annotation):
        config = AmmdConfig(
            policy_gradient="reward_to_go",
            language_model_weight=0.5,
            advantage=AdvantageConfig(type=advantage),
        )
        yield pytest.param(config, id=f"ammd_to_go_{advantage}")
    for model in _members(TokenLossConfig):
        loss = model(type=_type_name(model), **SMALL.get(model, {}))
        matching = TokenMatchingConfig(type="token_matching", off_policy=loss, on_policy=loss)
        yield pytest.param(matching, id=loss.type)
    yield pytest.param(None, id="supervised")


OBJECTIVES = list(_list_objectives())


class MemoryLedger(TorchDispatchMode):
    """Counts the bytes of what torch makes while it is on: the largest tensor, the most at once."""

    def __init__(self):
        super().__init__()
        self.live_bytes = self.peak_bytes = self.largest_bytes = 0
        self._known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {_key(leaf) for leaf in _tensors((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for leaf in _tensors(result):
            if _key(leaf) not in self._known | given:
                self._add(leaf.untyped_storage(), _key(leaf))
        return result

    def _add(self, storage, key):
        self._known.add(key)
        weakref.finalize(storage, self._remove, key, storage.nbytes())
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self.largest_bytes = max(self.largest_bytes, storage.nbytes())

    def _remove(self, key, size):
        self._known.remove(key)
        self.live_bytes -= size


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _key(tensor):
    """The same for all views of one piece of memory."""
    return tensor.untyped_storage()._cdata


class Problem:
    """A student with gradients, a teacher, and two streams of `tokens` tokens each."""

    def __init__(self, tokens, vocabulary):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=generator)

        self.hidden = draw(2, tokens, HIDDEN).requires_grad_()
        self.features = draw(2, tokens, FEATURES)
        self.ids = torch.randint(vocabulary, (2, tokens), generator=generator)
        self.heads = PolicyHeads(
            unembedding_VH=draw(vocabulary, HIDDEN).requires_grad_(),
            action_embeddings_VE=unit_rows(draw(vocabulary, FEATURES)),
            teacher_unembedding_VF=draw(vocabulary, FEATURES),
            chunk_tokens=CHUNK,
        )

    def rows(self, stream, needs):
        tokens = self.ids.shape[1]
        return TokenRows(
            hidden_NH=self.hidden[stream],
            token_ids_N=self.ids[stream],
            sequence_ids_N=torch.arange(tokens) // 8,
            positions_N=torch.arange(tokens) % 8,
            num_global_tokens=tokens,
            num_global_sequences=tokens // 8,
            teacher=self._teacher(self.features[stream], needs.top_k),
            pairs=PairRows(
                numbers_S=torch.arange(tokens // 8),
                is_worse_S=torch.full((tokens // 8,), stream == 1),
                num_pairs=tokens // 8,
            ),
        )

    def _teacher(self, features, k):
        head = self.heads.teacher_unembedding_VF
        top = read_top_k(features, head, k=k, chunk_tokens=CHUNK) if k else (None, None)
        return TeacherRows(
            features_NF=features,
            expected_embedding_NE=torch.full((len(features), FEATURES), 0.1),
            logprobs_N=torch.full((len(features),), -2.0),
            top_k_ids_NK=top[0],
            top_k_logprobs_NK=top[1],
        )

    def train(self, config, recorder):
        """One forward and backward of the objective under the recorder."""
        objective = build_objective(config, max_response_tokens=8, total_steps=10)
        streams = ["off_policy", "on_policy"]
        reads = [config.reads(name) if config else name == "off_policy" for name in streams]
        needs = [config.teacher_needs(name) if config else None for name in streams]
        rows = [
            self.rows(index, needs[index] or AmmdConfig().teacher_needs("off_policy"))
            if reads[index]
            else None
            for index in range(2)
        ]
        with recorder:
            output = objective.compute_loss(self.heads, rows[0], rows[1], lambda tensor: tensor)
            output.loss_share.backward()
        assert isinstance(output, ObjectiveOutput)
        assert self.hidden.grad.isfinite().all()
        assert self.heads.unembedding_VH.grad.abs().sum() > 0
        return recorder


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("config", OBJECTIVES)
def test_memory_is_that_of_two_chunks_whatever_the_number_of_tokens(
    config, vocabulary, monkeypatch
):
    """Two chunks (student, teacher), temporaries of a block, and gradients of the unembedding."""
    monkeypatch.setattr(chunked_products, "CPU_BLOCK_ELEMENTS", vocabulary)  # a block is one row
    once = Problem(TOKENS, vocabulary).train(config, MemoryLedger())
    twice = Problem(2 * TOKENS, vocabulary).train(config, MemoryLedger())
    row_bytes = vocabulary * FLOAT_BYTES
    assert twice.largest_bytes == once.largest_bytes == CHUNK * row_bytes
    assert once.peak_bytes <= (2 * CHUNK + BLOCK_ROWS * _together(config) + 3 * HIDDEN) * row_bytes
    token_bytes = 16 * (HIDDEN + 2 * FEATURES) * FLOAT_BYTES
    assert twice.peak_bytes - once.peak_bytes <= 2 * TOKENS * token_bytes < row_bytes


def _together(config):
    return config.off_policy.tokens_together if isinstance(config, TokenMatchingConfig) else 1


def test_the_ledger_sees_a_dense_loss_in_forward_and_backward():
    tokens, vocabulary = 24, 1000
    hidden = torch.randn(tokens, HIDDEN, requires_grad=True)
    unembedding = torch.randn(vocabulary, HIDDEN)
    with MemoryLedger() as recorder:
        logprobs = (hidden @ unembedding.T).log_softmax(-1)
        forward_peak = recorder.peak_bytes
        logprobs.square().sum().backward()
    whole = tokens * vocabulary * FLOAT_BYTES
    assert recorder.largest_bytes == whole
    assert forward_peak == pytest.approx(2 * whole, rel=0.1)
    assert recorder.peak_bytes >= 3 * whole
    assert recorder.live_bytes < 2 * whole  # what backward made is gone, logprobs is still named


class MeasuredProcess:
    """A process of its own: memory that it frees goes back to the system, and comes anew."""

    VOCABULARY, HIDDEN, CHUNK = 40_000, 8, 16
    CHUNK_BYTES = CHUNK * VOCABULARY * FLOAT_BYTES

    def __init__(self):
        torch.set_num_threads(1)
        threshold = -3  # M_MMAP_THRESHOLD: what is larger than so many bytes has pages of its own
        assert ctypes.CDLL(None).mallopt(threshold, 1_000_000) == 1
        ctypes.CDLL(None).malloc_trim(0)  # what the process it was forked from had freed
        self.unembedding = torch.randn(self.VOCABULARY, self.HIDDEN).requires_grad_()
        self.chunked(32)  # what stays for ever is there from now on
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew

    def chunked(self, num_tokens):
        """Most bytes ever resident, after a loss over so many tokens and its backward pass."""

        def reverse_kl(chunk):
            return kl_divergence(chunk.student_logprobs_cV, chunk.teacher_logprobs_cV)

        hidden, ids = self._draw(num_tokens), torch.zeros(num_tokens, dtype=torch.long)
        teacher = TeacherDistribution(
            features_NF=hidden.detach().flip(0), unembedding_VF=self.unembedding.detach()
        )
        sum_over_vocabulary(
            *(hidden, ids, self.unembedding, torch.ones(num_tokens), reverse_kl),
            teacher=teacher,
            chunk_tokens=self.CHUNK,
        ).total.backward()
        return self._peak()

    def dense(self, num_tokens):
        """The same after whole tables of log-probabilities."""
        (self._draw(num_tokens) @ self.unembedding.T).log_softmax(-1)
        return self._peak()

    def _draw(self, num_tokens):
        return torch.randn(num_tokens, self.HIDDEN, requires_grad=True)

    def _peak(self):
        status = Path("/proc/self/status").read_text().splitlines()
        [line] = [line for line in status if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's count of resident pages")
def test_the_process_itself_grows_by_less_than_a_chunk():
    """Peak resident memory after N tokens, after 2 N, and after the dense form of 4 N."""
    process = ForkedWorkers([MeasuredProcess])
    try:
        [once] = process.ask(MeasuredProcess.chunked, 64)
        [twice] = process.ask(MeasuredProcess.chunked, 128)
        [densely] = process.ask(MeasuredProcess.dense, 256)
    finally:
        process.stop()
    assert twice - once < MeasuredProcess.CHUNK_BYTES / 4
    assert densely - twice > 8 * MeasuredProcess.CHUNK_BYTES

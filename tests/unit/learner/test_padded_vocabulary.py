"""A padded vocabulary changes nothing: neither what is learned, nor what the teacher says."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes.local_workers import LocalWorkers
from one_rank import one_rank
from safetensors.torch import load_file, save_file
from tiny_families import save_family
from trajectories import make_trajectories

from distill_system.config.model import FullUpdate, LoraUpdate, OptimizerConfig
from distill_system.config.objective import AmmdConfig, TeacherNeeds, TokenMatchingConfig
from distill_system.config.rollout import ScoringConfig
from distill_system.language_model import load_embedding, load_language_model, unembedding
from distill_system.learner import LearnerGroup, ModelSource
from distill_system.records import Author, Stream, TrajectoryChunk
from distill_system.scoring import ScoringPool, TeacherScorer

TOKENS = 64
EVERYTHING = TeacherNeeds(features=True, expected_embedding=True, logprobs=True, top_k=60)


def _pad(folder: Path, num_rows: int, seed: int) -> Path:
    """A copy of a model with rows behind its tokens, so large that reading them would be felt."""
    padded = folder.with_name(f"{folder.name}_{num_rows}")
    shutil.copytree(folder, padded)
    config = json.loads((padded / "config.json").read_text())
    (padded / "config.json").write_text(json.dumps({**config, "vocab_size": num_rows}))
    tensors = load_file(padded / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            rows = torch.randn(num_rows - TOKENS, tensors[name].shape[1], generator=generator) * 5
            tensors[name] = torch.cat([tensors[name], rows])
    save_file(tensors, padded / "model.safetensors", {"format": "pt"})
    return padded


def _scorer(teacher: Path, vocabulary_size: int | None = None) -> TeacherScorer:
    return TeacherScorer(
        model_path=str(teacher),
        config=ScoringConfig(max_tokens_per_batch=64),
        vocabulary_chunk_tokens=7,
        uses_gpu=False,
        vocabulary_size=vocabulary_size,
    )


def _learn(student, teacher, objective, *, update, vocabulary_size=None):
    source = ModelSource(
        path=str(student),
        teacher_path=str(teacher),
        vocabulary_size=vocabulary_size,
        update=update,
    )
    adamw = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.1)
    learner = one_rank(source, objective=objective, optimizer=adamw, total_steps=4)
    group = LearnerGroup(LocalWorkers([learner]))
    pool = ScoringPool(LocalWorkers([_scorer(teacher, vocabulary_size)]))
    start = partial(pool.start, needs=EVERYTHING, num_shares=1)
    scored = [
        *start(make_trajectories(6, Author.TEACHER), Stream.OFF_POLICY),
        *start(make_trajectories(6, first=50), Stream.ON_POLICY),
    ]
    losses = [group.learn(step, scored).metrics["learner/loss"] for step in range(4)]
    return learner, losses, group.measure(scored)


MOMENTS_GAME = AmmdConfig()
DISTRIBUTIONS = TokenMatchingConfig.model_validate(
    {"type": "token_matching", "on_policy": {"type": "reverse_kl"}}
)
LORA = LoraUpdate(type="lora", rank=2)


@pytest.mark.parametrize(
    ("family", "objective", "update"),
    [
        ("qwen2", MOMENTS_GAME, FullUpdate()),
        ("llama", DISTRIBUTIONS, FullUpdate()),
        ("llama", MOMENTS_GAME, LORA),
        ("qwen2", DISTRIBUTIONS, LORA),
    ],
    ids=["tied", "untied", "untied_lora", "tied_lora"],
)
def test_rows_behind_the_tokens_change_no_loss_and_no_weight(tmp_path, family, objective, update):
    student = save_family(tmp_path / "student", family, seed=1)
    teacher = save_family(tmp_path / "teacher", family, seed=2)
    plain, losses, distances = _learn(student, teacher, objective, update=update)
    padded, padded_losses, padded_distances = _learn(
        _pad(student, 70, 3),
        _pad(teacher, 96, 4),
        objective,
        vocabulary_size=TOKENS,
        update=update,
    )
    assert padded_losses == pytest.approx(losses, rel=1e-5, abs=1e-7)
    assert padded_distances == pytest.approx(distances, rel=1e-4, abs=1e-7)
    start = dict(
        load_language_model(
            str(tmp_path / "student_70"), dtype=torch.float32, device=torch.device("cpu")
        ).named_parameters()
    )
    expected = dict(plain.model.named_parameters())
    for name, parameter in padded.model.named_parameters():
        is_padded = parameter.shape[0] == 70
        torch.testing.assert_close(
            parameter[:TOKENS] if is_padded else parameter, expected[name], atol=1e-4, rtol=1e-3
        )
        if is_padded:
            assert torch.equal(parameter[TOKENS:], start[name][TOKENS:]), "padding never moves"


def test_a_padded_teacher_says_what_its_tokens_say(tmp_path):
    teacher = save_family(tmp_path / "teacher", "llama", seed=2)
    chunk = TrajectoryChunk(
        stream=Stream.OFF_POLICY, trajectories=tuple(make_trajectories(6, Author.TEACHER))
    )
    expected = _scorer(teacher).score(chunk, EVERYTHING)
    came = _scorer(_pad(teacher, 96, 4), TOKENS).score(chunk, EVERYTHING)
    unaware = _scorer(tmp_path / "teacher_96").score(chunk, EVERYTHING)
    for ours, truth, wrong in zip(came, expected, unaware, strict=True):
        for field in ("features", "expected_embedding", "logprobs", "top_k_logprobs"):
            np.testing.assert_allclose(getattr(ours, field), getattr(truth, field), atol=1e-5)
        np.testing.assert_array_equal(ours.top_k_ids, truth.top_k_ids)
        assert np.abs(wrong.logprobs - truth.logprobs).max() > 1.0, "the padding would be felt"


def test_a_matrix_without_padding_is_the_models_own(tmp_path):
    folder = save_family(tmp_path / "model", "llama", num_rows=70)
    model = load_language_model(str(folder), dtype=torch.float32, device=torch.device("cpu"))
    assert unembedding(model, 70) is unembedding(model) is model.lm_head.weight
    cut = unembedding(model, TOKENS)
    assert cut.data_ptr() == model.lm_head.weight.data_ptr(), "no copy"
    (cut.sum()).backward()
    assert model.lm_head.weight.grad[:TOKENS].eq(1).all()
    assert not model.lm_head.weight.grad[TOKENS:].any()
    load = partial(load_embedding, str(folder), vocabulary_size=TOKENS)
    assert torch.equal(load(which="output"), cut.detach())
    assert torch.equal(load(which="input"), model.get_input_embeddings().weight[:TOKENS].detach())

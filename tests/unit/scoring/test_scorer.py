from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes.local_workers import LocalWorkers
from trajectories import make_trajectories
from transformers import AutoModelForCausalLM

from distill_system.config.objective import MOMENTS, TeacherNeeds
from distill_system.config.objective.needs import NOTHING
from distill_system.config.rollout import ScoringConfig
from distill_system.errors import NonFiniteError
from distill_system.records import Stream, TeacherTargets, TrajectoryChunk
from distill_system.scoring import ScoringPool, TeacherScorer

EVERYTHING = TeacherNeeds(features=True, expected_embedding=True, logprobs=True, top_k=3)


def _scorer(folder, **config):
    return TeacherScorer(
        model_path=str(folder),
        config=ScoringConfig(**config),
        vocabulary_chunk_tokens=5,
        uses_gpu=False,
    )


def _with_contexts(trajectories):
    """Every other one with a prompt of the teacher's own, of other lengths than the student's."""
    draw = np.random.default_rng(0).integers
    prompts = [draw(4, 64, 1 + (7 * i) % 13).astype(np.int32) for i in range(len(trajectories))]
    return [
        replace(each, teacher_prompt_ids=prompt) if i % 2 else each
        for i, (each, prompt) in enumerate(zip(trajectories, prompts, strict=True))
    ]


def _read_alone(trajectory):
    """The tokens that the teacher reads, [1, Q+T], and the places before the response's."""
    own = trajectory.token_ids[: trajectory.num_prompt_tokens]
    prompt = own if trajectory.teacher_prompt_ids is None else trajectory.teacher_prompt_ids
    ids = np.concatenate([prompt, trajectory.token_ids[trajectory.num_prompt_tokens :]])
    return torch.from_numpy(ids).long()[None], slice(prompt.size - 1, -1)


@pytest.mark.parametrize("tied", [True, False])
def test_targets_equal_a_dense_read_of_each_trajectory_alone(tiny_model_folder, tied):
    folder = tiny_model_folder(tie_word_embeddings=tied)
    trajectories = _with_contexts(make_trajectories(15))
    chunk = TrajectoryChunk(stream=Stream.ON_POLICY, trajectories=tuple(trajectories))
    targets = _scorer(folder, max_tokens_per_batch=50).score(chunk, EVERYTHING)
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    embeddings = model.get_input_embeddings().weight
    # The padding token's row is zero and stays so.
    actions = embeddings / embeddings.norm(dim=1, keepdim=True).clamp_min(1e-12)
    for trajectory, target in zip(trajectories, targets, strict=True):
        assert target.trajectory_id == trajectory.trajectory_id
        ids, before = _read_alone(trajectory)
        with torch.no_grad():
            out = model(input_ids=ids, output_hidden_states=True)
        probabilities = out.logits[0, before].softmax(-1)
        response = torch.from_numpy(trajectory.response_ids).long()
        logprobs = probabilities.log().gather(1, response[:, None])[:, 0]
        np.testing.assert_allclose(target.logprobs, logprobs.detach(), atol=1e-4)
        np.testing.assert_allclose(
            target.expected_embedding, (probabilities @ actions).detach(), atol=1e-5
        )
        best = probabilities.log().topk(3)
        np.testing.assert_array_equal(target.top_k_ids, best.indices)
        np.testing.assert_allclose(target.top_k_logprobs, best.values.detach(), atol=1e-4)
        np.testing.assert_allclose(
            target.features, out.hidden_states[-1][0, before].detach(), atol=1e-4
        )


def test_of_a_vocabulary_smaller_than_what_is_asked_for_every_token_is_told(tiny_model_folder):
    chunk = TrajectoryChunk(stream=Stream.ON_POLICY, trajectories=tuple(make_trajectories(2)))
    scorer = TeacherScorer(
        model_path=str(tiny_model_folder()),
        config=ScoringConfig(),
        vocabulary_chunk_tokens=5,
        uses_gpu=False,
        vocabulary_size=9,
    )
    for target in scorer.score(chunk, TeacherNeeds(top_k=16)):
        assert np.sort(target.top_k_ids).tolist() == [list(range(9))] * target.num_tokens


def test_log_probabilities_come_back_in_order_from_all_scorers(tiny_model_folder):
    folder, written = tiny_model_folder(), _with_contexts(make_trajectories(7))
    scorers = [_scorer(folder, max_tokens_per_batch=30) for _ in range(3)]
    workers = LocalWorkers(scorers)
    read = ScoringPool(workers).read_logprobs(written)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for trajectory, logprobs in zip(written, read, strict=True):
        ids, before = _read_alone(trajectory)
        with torch.no_grad():
            plain = model(input_ids=ids).logits[0].log_softmax(-1)
        response = torch.from_numpy(trajectory.response_ids).long()
        expected = plain[before].gather(1, response[:, None])[:, 0]
        np.testing.assert_allclose(logprobs, expected, atol=1e-5)
    assert {worker for worker, _ in workers.calls} == {0, 1, 2}
    assert ScoringPool(workers).pop_shipped().num_response_tokens == 0, "it is no target"
    assert len(ScoringPool(LocalWorkers(scorers)).read_logprobs(written[:2])) == 2


def test_bfloat16_travels_as_float16_and_stays_close(tiny_model_folder):
    chunk = TrajectoryChunk(stream=Stream.ON_POLICY, trajectories=tuple(make_trajectories(6)))
    exact = _scorer(tiny_model_folder()).score(chunk, EVERYTHING)
    short = _scorer(tiny_model_folder(), dtype="bfloat16").score(chunk, EVERYTHING)
    for one, other in zip(exact, short, strict=True):
        assert one.features.dtype == np.float32
        assert other.features.dtype == np.float16
        assert other.expected_embedding.dtype == np.float16
        np.testing.assert_allclose(one.expected_embedding, other.expected_embedding, atol=0.03)


def test_what_float16_cannot_hold_travels_as_float32(tiny_model_folder):
    """Its largest number is 65,504; 7e4 would come out as infinity."""
    chunk = TrajectoryChunk(stream=Stream.ON_POLICY, trajectories=tuple(make_trajectories(6)))
    scorer = _scorer(tiny_model_folder(), dtype="bfloat16")
    largest = {}
    for wanted in (6e4, 7e4):
        now = max(np.abs(t.features).max() for t in scorer.score(chunk, EVERYTHING))
        with torch.no_grad():
            scorer.model.model.norm.weight *= wanted / float(now)
        targets = scorer.score(chunk, TeacherNeeds(features=True))
        largest[wanted] = max(np.abs(t.features.astype(np.float64)).max() for t in targets)
        assert largest[wanted] == pytest.approx(wanted, rel=0.02)
        assert {t.features.dtype for t in targets} == {
            np.dtype(np.float16 if wanted == 6e4 else np.float32)
        }


@pytest.mark.parametrize(("scorers", "ranks"), [(1, 1), (3, 1), (1, 2), (3, 2), (2, 4)])
def test_chunks_come_in_equal_numbers_per_rank_and_use_every_scorer(
    tiny_model_folder, scorers, ranks
):
    one = _scorer(tiny_model_folder())
    workers = LocalWorkers([one] * scorers)
    trajectories = make_trajectories(16)
    scored = ScoringPool(workers).start(
        trajectories, Stream.OFF_POLICY, needs=MOMENTS, num_shares=ranks
    )
    assert len(scored) % ranks == 0
    assert {worker for worker, _ in workers.calls} == set(range(scorers))
    ids = [t.trajectory_id for chunk in scored for t in chunk.chunk.trajectories]
    assert sorted(ids) == sorted(t.trajectory_id for t in trajectories)
    for chunk in scored:
        assert [t.trajectory_id for t in chunk.targets.value] == [
            t.trajectory_id for t in chunk.chunk.trajectories
        ]


def test_no_trajectories_make_no_chunks(tiny_model_folder):
    pool = ScoringPool(LocalWorkers([_scorer(tiny_model_folder())]))
    assert pool.start([], Stream.ON_POLICY, needs=MOMENTS, num_shares=2) == []


@pytest.mark.parametrize("field", ["features", "expected_embedding", "logprobs"])
def test_a_scorer_makes_what_is_needed_and_no_more(tiny_model_folder, field):
    chunk = TrajectoryChunk(stream=Stream.ON_POLICY, trajectories=tuple(make_trajectories(4)))
    scorer = _scorer(tiny_model_folder())
    everything = scorer.score(chunk, EVERYTHING)
    for full, target in zip(
        everything, scorer.score(chunk, TeacherNeeds(**{field: True})), strict=True
    ):
        np.testing.assert_array_equal(getattr(target, field), getattr(full, field))
        others = {"features", "expected_embedding", "logprobs", "top_k_ids", "top_k_logprobs"}
        assert all(getattr(target, other) is None for other in others - {field})


def test_a_stream_that_needs_no_teacher_is_dealt_and_not_read(tiny_model_folder):
    workers = LocalWorkers([_scorer(tiny_model_folder())])
    pool = ScoringPool(workers)
    scored = pool.start(make_trajectories(6), Stream.OFF_POLICY, needs=NOTHING, num_shares=2)
    assert [chunk.targets for chunk in scored] == [None, None]
    assert workers.calls == []


class _Known:
    """Targets that no teacher would give, so that they can be told from its own."""

    def __init__(self, ids):
        self.ids = ids

    def read(self, trajectory_ids):
        return {
            each: TeacherTargets(
                trajectory_id=each, num_tokens=1, logprobs=np.full(1, 7.0, np.float32)
            )
            for each in trajectory_ids
            if each in self.ids
        }


def test_what_is_known_is_not_read_again_and_keeps_its_place(tiny_model_folder):
    trajectories = tuple(make_trajectories(6))
    known = {trajectories[1].trajectory_id, trajectories[4].trajectory_id}
    scorer = _scorer(tiny_model_folder())
    chunk = TrajectoryChunk(stream=Stream.OFF_POLICY, trajectories=trajectories)
    plain = scorer.score(chunk, TeacherNeeds(logprobs=True))
    scorer.known_targets = _Known(known)
    said = scorer.score(chunk, TeacherNeeds(logprobs=True))
    assert [target.trajectory_id for target in said] == [t.trajectory_id for t in trajectories]
    for before, after in zip(plain, said, strict=True):
        if after.trajectory_id in known:
            assert after.logprobs.tolist() == [7.0]
        else:
            np.testing.assert_allclose(after.logprobs, before.logprobs, atol=1e-5)


def test_bytes_on_the_wire_are_counted_by_field(tiny_model_folder):
    scorer = _scorer(tiny_model_folder())
    trajectories = tuple(make_trajectories(6))
    chunk = TrajectoryChunk(stream=Stream.OFF_POLICY, trajectories=trajectories)
    scorer.score(chunk, TeacherNeeds(features=True, logprobs=True))
    first = scorer.shipped()
    tokens = sum(t.num_response_tokens for t in trajectories)
    hidden = scorer.model.config.hidden_size
    assert first.num_bytes == {"features": tokens * hidden * 4, "logprobs": tokens * 4}
    assert first.num_response_tokens == tokens
    scorer.score(chunk, TeacherNeeds(logprobs=True))
    since = scorer.shipped() - first
    assert since.num_bytes == {"features": 0, "logprobs": tokens * 4}


def test_a_pools_bytes_are_those_of_all_its_scorers(tiny_model_folder):
    scorers = [_scorer(tiny_model_folder()) for _ in range(2)]
    pool = ScoringPool(LocalWorkers(scorers))
    assert pool.pop_shipped().num_response_tokens == 0
    trajectories = make_trajectories(6)
    pool.score(trajectories, Stream.ON_POLICY, needs=TeacherNeeds(logprobs=True), num_shares=1)
    tokens = sum(t.num_response_tokens for t in trajectories)
    assert 0 < scorers[0].shipped().num_response_tokens < tokens
    shipped = pool.pop_shipped()
    assert shipped.num_bytes == {"logprobs": 4 * tokens}
    assert shipped.num_response_tokens == tokens
    assert pool.pop_shipped().num_response_tokens == 0, "it is told once"


@pytest.mark.parametrize("uses_gpu", [False, True])
@pytest.mark.parametrize("trust", [None, True])
def test_the_teacher_is_loaded_where_and_as_it_was_said(monkeypatch, uses_gpu, trust):
    class LoadedError(Exception):
        """What would be loaded."""

    def load(path, **how):
        raise LoadedError(path, how)

    monkeypatch.setattr("distill_system.scoring.scorer.load_language_model", load)
    given = {} if trust is None else {"trust_remote_code": trust}
    with pytest.raises(LoadedError) as caught:
        TeacherScorer(
            model_path="/models/teacher",
            config=ScoringConfig(dtype="bfloat16"),
            vocabulary_chunk_tokens=5,
            uses_gpu=uses_gpu,
            **given,
        )
    assert caught.value.args == (
        "/models/teacher",
        {
            "dtype": torch.bfloat16,
            "device": torch.device("cuda" if uses_gpu else "cpu"),
            "trust_remote_code": bool(trust),
        },
    )


def test_the_teacher_is_frozen(tiny_model_folder):
    scorer = _scorer(tiny_model_folder())
    assert not any(parameter.requires_grad for parameter in scorer.model.parameters())


def test_a_scorer_that_failed_is_heard_where_its_scores_are_used(tiny_model_folder):
    scorer = _scorer(tiny_model_folder(), dtype="bfloat16")
    with torch.no_grad():
        scorer.model.model.norm.weight *= torch.inf
    chunk = TrajectoryChunk(stream=Stream.ON_POLICY, trajectories=tuple(make_trajectories(3)))
    with pytest.raises(NonFiniteError, match=r"'t0' or a trajectory .* scoring\.dtype=float32"):
        scorer.score(chunk, TeacherNeeds(logprobs=True))
    assert scorer.shipped().num_response_tokens == 0

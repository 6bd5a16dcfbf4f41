"""Streams in one batch, and each stream's rows out of it as if it were alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from trajectories import make_trajectories

from distill_system.learner.collate import StreamTotals, collate, number_pairs
from distill_system.records import (
    Author,
    Stream,
    TeacherTargets,
    TrajectoryChunk,
    VersionSpan,
)

CPU = torch.device("cpu")
ROWS = {
    "features": "features_NF",
    "expected_embedding": "expected_embedding_NE",
    "logprobs": "logprobs_N",
    "top_k_ids": "top_k_ids_NK",
    "top_k_logprobs": "top_k_logprobs_NK",
}
OFF, ON, TEXT = Stream.OFF_POLICY, Stream.ON_POLICY, Stream.PLAIN_TEXT


def _student(count):
    """Log-probabilities that tell tokens apart; the first token of each is of an older version."""
    return [
        replace(
            t,
            temperature=0.5,
            behaviour_logprobs=-np.arange(1, t.num_response_tokens + 1, dtype=np.float32) / (1 + i),
            weight_versions=tuple(
                VersionSpan(version=version, start=start, end=end)
                for version, start, end in ((3, 0, 1), (4, 1, t.num_response_tokens))
                if end > start
            ),
        )
        for i, t in enumerate(make_trajectories(count, first=50))
    ]


def _targets(trajectory, **fields):
    count = trajectory.num_response_tokens
    generator = np.random.default_rng(count)
    arrays = {
        name: generator.random((count, *shape)).astype(dtype)
        for name, (shape, dtype) in fields.items()
    }
    return TeacherTargets(trajectory_id=trajectory.trajectory_id, num_tokens=count, **arrays)


@pytest.fixture
def both():
    """Chunks of every stream, mixed; as collate takes them, and the trajectories by stream."""
    off, on = make_trajectories(5, Author.TEACHER), _student(4)
    texts = make_trajectories(3, Author.DATASET, first=80)
    chunks = [
        TrajectoryChunk(stream=ON, trajectories=tuple(on[:2])),
        TrajectoryChunk(stream=TEXT, trajectories=tuple(texts)),
        TrajectoryChunk(stream=OFF, trajectories=tuple(off[:3])),
        TrajectoryChunk(stream=ON, trajectories=tuple(on[2:])),
        TrajectoryChunk(stream=OFF, trajectories=tuple(off[3:])),
    ]
    # Of a step on several ranks: the totals count what other ranks hold, too.
    totals = {
        OFF: StreamTotals(num_tokens=1000, num_sequences=50),
        ON: StreamTotals(num_tokens=700, num_sequences=30),
        TEXT: StreamTotals(num_tokens=500, num_sequences=20),
    }
    return chunks, totals, {OFF: off, ON: on, TEXT: texts}


def test_answers_to_one_prompt_are_a_pair_whoever_holds_them():
    """On every rank by the same number: of the student's text, and of rejected answers."""
    better = make_trajectories(3, Author.TEACHER)
    twice = replace(better[0], trajectory_id="again")  # its prompt stands twice in the step
    off = [*better, twice]
    on = [replace(t, trajectory_id=f"own {t.trajectory_id}") for t in _student(3)]
    on = [replace(t, prompt_id=name) for t, name in zip(on, ("p2", "p0", "p9"), strict=True)]
    totals = {ON: StreamTotals.of(on), OFF: StreamTotals.of(off)}
    numbers = number_pairs(totals)
    assert numbers[ON, on[0].trajectory_id] == numbers[OFF, better[2].trajectory_id]
    assert numbers[ON, on[1].trajectory_id] == numbers[OFF, better[0].trajectory_id]
    assert len(set(numbers.values())) == 5
    chunks = [TrajectoryChunk(stream=OFF, trajectories=tuple(off[2:]))]
    batch = collate(chunks, (), totals, CPU)  # a rank that holds two of the four
    rows = batch.stream_rows(OFF, torch.zeros(batch.sequences.token_ids_N.shape[0], 2))
    expected = [numbers[OFF, t.trajectory_id] for t in off[2:]]
    assert rows.pairs.numbers_S.tolist() == expected
    assert rows.pairs.is_worse_S.tolist() == [False, False]
    assert rows.pairs.num_pairs == 5

    data = make_trajectories(2, Author.DATASET)
    data[1] = replace(data[1], trajectory_id="preferences.rejected:7", prompt_id=data[0].prompt_id)
    totals = {OFF: StreamTotals.of(data)}
    rows = collate(
        [TrajectoryChunk(stream=OFF, trajectories=tuple(data))], (), totals, CPU
    ).stream_rows(OFF, torch.zeros(sum(t.num_response_tokens for t in data), 2))
    assert rows.pairs.numbers_S.tolist() == [0, 0]
    assert rows.pairs.is_worse_S.tolist() == [False, True]


def _joined(trajectories, read):
    return np.concatenate([read(trajectory) for trajectory in trajectories]).tolist()


@pytest.mark.parametrize("num_parts", [1, 3])
def test_each_streams_rows_are_its_own_and_counted_from_its_own_start(both, num_parts):
    chunks, totals, trajectories = both
    batch = collate(chunks, [None] * 5, totals, CPU, num_parts=num_parts)
    assert len(batch.sequences.parts) == num_parts
    every = [t for stream in (OFF, ON, TEXT) for t in trajectories[stream]]
    hidden_NH = torch.arange(sum(t.num_response_tokens for t in every)).float()[:, None]
    first = 0
    for stream in (OFF, ON, TEXT):
        rows, own = batch.stream_rows(stream, hidden_NH), trajectories[stream]
        count = sum(t.num_response_tokens for t in own)
        assert rows.hidden_NH[:, 0].tolist() == list(range(first, first + count))
        first += count
        assert rows.token_ids_N.tolist() == _joined(own, lambda t: t.response_ids)
        assert rows.positions_N.tolist() == _joined(own, lambda t: np.arange(t.response_ids.size))
        sequences = [[at] * t.num_response_tokens for at, t in enumerate(own)]
        assert rows.sequence_ids_N.tolist() == [at for each in sequences for at in each]
        assert rows.num_global_tokens == totals[stream].num_tokens
        assert rows.num_global_sequences == totals[stream].num_sequences
        assert rows.teacher is None


def test_what_the_writer_said_comes_with_its_own_text_alone(both):
    chunks, totals, trajectories = both
    batch = collate(chunks, [None] * 5, totals, CPU)
    hidden_NH = torch.zeros(batch.sequences.token_ids_N.shape[0], 2)
    off, on, text = (batch.stream_rows(stream, hidden_NH) for stream in (OFF, ON, TEXT))
    for others in (off, text):
        assert others.behaviour_logprobs_N is None
        assert others.behaviour_temperature == 1.0
    said = _joined(trajectories[ON], lambda t: t.behaviour_logprobs)
    assert on.behaviour_logprobs_N.tolist() == batch.behaviour.logprobs_N.tolist() == said
    assert on.behaviour_logprobs_N.dtype == torch.float32
    assert on.behaviour_temperature == batch.behaviour.temperature == 0.5
    versions = [[3] + [4] * (t.num_response_tokens - 1) for t in trajectories[ON]]
    assert batch.behaviour.versions_N.tolist() == [v for each in versions for v in each]


@pytest.mark.parametrize("present", [OFF, ON])
def test_a_stream_that_a_step_has_not_has_no_rows(both, present):
    chunks, totals, trajectories = both
    mine = [chunk for chunk in chunks if chunk.stream is present]
    batch = collate(mine, (), {present: totals[present]}, CPU)
    other = ON if present is OFF else OFF
    hidden_NH = torch.zeros(sum(t.num_response_tokens for t in trajectories[present]), 2)
    assert batch.stream_rows(other, hidden_NH) is None
    rows = batch.stream_rows(present, hidden_NH)
    assert rows.hidden_NH.shape == hidden_NH.shape
    assert rows.sequence_ids_N[0] == 0


def test_targets_follow_their_trajectories_in_the_numbers_that_learning_takes(both):
    """float16 and int32 are forms of the wire."""
    chunks, totals, trajectories = both
    fields: dict[Stream, dict[str, Any]] = {
        OFF: {"features": ((3,), np.float16), "logprobs": ((), np.float32)},
        ON: {"top_k_ids": ((2,), np.int32), "top_k_logprobs": ((2,), np.float32)},
    }
    said = [
        [_targets(t, **fields[c.stream]) for t in c.trajectories] if c.stream in fields else None
        for c in chunks
    ]
    batch = collate(chunks, said, totals, CPU)
    hidden_NH = torch.zeros(batch.sequences.token_ids_N.shape[0], 2)
    for stream, names in fields.items():
        rows = batch.stream_rows(stream, hidden_NH)
        by_id = {target.trajectory_id: target for part in said for target in part or ()}
        for name, field in ROWS.items():
            joined = getattr(rows.teacher, field)
            if name not in names:
                assert joined is None
                continue
            own = [getattr(by_id[t.trajectory_id], name) for t in trajectories[stream]]
            assert joined.dtype == (torch.int64 if name == "top_k_ids" else torch.float32)
            np.testing.assert_array_equal(joined.numpy(), np.concatenate(own))

"""The learner group's own part: who gets what, and when all have answered."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes.local_workers import Done, LocalWorkers
from trajectories import make_trajectories

from distill_system.learner import FileRecord, LearnerGroup
from distill_system.records import (
    OBJECTIVE_STREAMS,
    Author,
    ScoredChunk,
    StepResult,
    Stream,
    TrajectoryChunk,
)


class Rank:
    """Notes down what it is asked; `parts`: what finish_save answers, one after another."""

    def __init__(self, number, parts=()):
        self.number, self.parts, self.log = number, list(parts), []

    def step(self, step, chunks, totals, *targets):
        ids = [[t.trajectory_id for t in chunk.trajectories] for chunk in chunks]
        self.log.append((step, ids, totals, targets))
        metrics = {"learner/rank": float(self.number)}
        return StepResult(step=step, metrics=metrics, num_response_tokens=1, seconds=1.0)

    def measure(self, chunks, totals, *targets):
        self.step(-1, chunks, totals, *targets)
        return {"rank": float(self.number)}

    def start_save(self, folder):
        self.log.append(("start_save", folder))

    def finish_save(self, wait):
        self.log.append(("finish_save", wait))
        return self.parts.pop(0)

    def find_alterations(self, folder, files):
        self.log.append(("read", folder, dict(files)))
        return [f"{name} was altered" for name in files]

    def load(self, folder):
        self.log.append(("load", folder))

    def export(self, folder, dtype):
        self.log.append(("export", folder, dtype))

    def close(self):
        self.log.append(("close",))

    def ready(self):
        self.log.append(("ready",))

    def address(self):
        return f"host_{self.number}", 100 + self.number

    def connect(self, address, port):
        self.log.append(("connect", address, port))


@pytest.fixture
def ranks():
    return [Rank(number) for number in range(3)]


@pytest.fixture
def group(ranks):
    return LearnerGroup(LocalWorkers(ranks))


def _scored():
    """Seven chunks of unequal size: four off-policy, three on-policy, mixed."""
    made = []
    for index, stream in enumerate((1, 0, 0, 1, 0, 1, 0)):
        trajectories = tuple(make_trajectories(1 + index % 2, Author.TEACHER, first=10 * index))
        chunk = TrajectoryChunk(
            stream=Stream.ON_POLICY if stream else Stream.OFF_POLICY, trajectories=trajectories
        )
        made.append(ScoredChunk(chunk, Done(f"targets {index}")))
    return made


@pytest.mark.parametrize("ask", ["learn", "measure"])
def test_each_stream_is_dealt_to_the_ranks_in_turn_with_its_targets(group, ranks, ask):
    scored = _scored()
    answer = group.learn(4, scored) if ask == "learn" else group.measure(scored)
    assert (answer.metrics["learner/rank"] if ask == "learn" else answer["rank"]) == 0.0
    dealt = [[] for _ in ranks]
    for stream in OBJECTIVE_STREAMS:
        of_stream = [part for part in scored if part.chunk.stream is stream]
        for index, part in enumerate(of_stream):
            dealt[index % 3].append(part)
    for rank, expected in zip(ranks, dealt, strict=True):
        [(step, ids, totals, targets)] = rank.log
        assert step == (4 if ask == "learn" else -1)
        assert ids == [[t.trajectory_id for t in p.chunk.trajectories] for p in expected]
        assert list(targets) == [part.targets.value for part in expected]
        for stream in OBJECTIVE_STREAMS:
            trajectories = [
                t for p in scored if p.chunk.stream is stream for t in p.chunk.trajectories
            ]
            tokens = sum(t.num_response_tokens for t in trajectories)
            assert totals[stream].num_tokens == tokens
            assert totals[stream].num_sequences == len(trajectories)


def test_a_stream_that_is_not_there_has_no_totals(group, ranks):
    group.learn(0, [part for part in _scored() if part.chunk.stream is Stream.OFF_POLICY])
    assert all(set(rank.log[0][2]) == {Stream.OFF_POLICY} for rank in ranks)


def test_supervised_rows_are_dealt_by_their_length(group, ranks):
    rows = make_trajectories(9, Author.DATASET)
    group.finish_supervised(group.start_supervised(2, rows))
    given = [[each for ids in rank.log[0][1] for each in ids] for rank in ranks]
    assert sorted(each for ids in given for each in ids) == sorted(t.trajectory_id for t in rows)
    lengths = {t.trajectory_id: t.token_ids.size for t in rows}
    loads = [sum(lengths[each] for each in ids) for ids in given]
    assert max(loads) - min(loads) <= max(lengths.values())
    for rank in ranks:
        totals = rank.log[0][2]
        assert set(totals) == {Stream.OFF_POLICY}
        assert totals[Stream.OFF_POLICY].num_sequences == 9


def test_a_checkpoint_is_whole_when_every_rank_has_written_its_part():
    files = [{f"model/{rank}": FileRecord(rank, 7)} for rank in range(3)]
    answers = [[files[0], files[0]], [None, files[1]], [files[2], files[2]]]
    ranks = [Rank(number, parts) for number, parts in enumerate(answers)]
    group = LearnerGroup(LocalWorkers(ranks))
    group.start_save(Path("/here"))
    assert group.finish_save(wait=False) is None
    assert group.finish_save(wait=True) == {**files[0], **files[1], **files[2]}
    for rank in ranks:
        assert rank.log == [("start_save", "/here"), ("finish_save", False), ("finish_save", True)]


def test_the_ranks_share_the_reading_of_a_checkpoint_the_largest_files_first(group, ranks):
    sizes = {"a": 1, "b": 9, "c": 5, "d": 9, "e": 3}
    files = {name: FileRecord(size, 0) for name, size in sizes.items()}
    found = group.find_alterations(Path("/here"), files)
    assert found == [f"{name} was altered" for name in "abcde"]
    shares = [rank.log[0][2] for rank in ranks]
    assert [list(share) for share in shares] == [["b", "e"], ["d", "a"], ["c"]]
    assert all(rank.log[0][1] == "/here" for rank in ranks)
    assert {name: record for share in shares for name, record in share.items()} == files


def test_every_rank_is_asked_for_what_concerns_all(group, ranks):
    group.connect()
    group.load(Path("/a"))
    group.export(Path("/b"), "bfloat16")
    group.close()
    for rank in ranks:
        assert rank.log == [
            ("ready",),
            ("connect", "host_0", 100),
            ("load", "/a"),
            ("export", "/b", "bfloat16"),
            ("close",),
        ]

"""The buffer of what is in flight: every move, and the rule of bounded staleness behind it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_system.records import (
    Author,
    Finish,
    ScoredChunk,
    Stream,
    Trajectory,
    TrajectoryChunk,
    VersionSpan,
)
from distill_system.streams.in_flight import Entry, InFlight, State
from distill_system.streams.window import StalenessWindow


def build(batch=2, bound=1, end=10, too_old="wait", share=1.0, first=0, ages=True):
    window = StalenessWindow(
        batch_size=batch,
        max_staleness=bound,
        first_step=first,
        end_step=end,
        too_old=too_old,
        min_share=share,
    )
    return InFlight(window, ages=ages)


def text(entry: Entry, version=0, length=3) -> Trajectory:
    return Trajectory(
        trajectory_id=f"t{entry.number}",
        prompt_id=f"p{entry.prompt}",
        author=Author.STUDENT,
        token_ids=np.ones(1 + length, np.int32),
        num_prompt_tokens=1,
        behaviour_logprobs=np.zeros(length, np.float32),
        temperature=1.0,
        finish=Finish.STOP,
        weight_versions=(VersionSpan(version=version, start=0, end=length),),
    )


def give_all(buffer: InFlight, version: int, prompts) -> list[Entry]:
    """Give out all that the window has room for."""
    given = []
    while buffer.may_give(version):
        given.append(buffer.give(version, prompts.__next__))
    return given


def arrive(buffer: InFlight, entries, version=0, now=0.0, length=3) -> None:
    for entry in entries:
        buffer.arrive(entry, text(entry, version, length), now)


def score(buffer: InFlight, *groups) -> None:
    for group in groups:
        trajectories = tuple(entry.trajectory for entry in group)
        chunk = TrajectoryChunk(stream=Stream.ON_POLICY, trajectories=trajectories)
        buffer.score(group, ScoredChunk(chunk, object()))
        buffer.scored(group)


def test_what_is_given_out_says_its_step_and_the_oldest_version_that_may_write_it():
    buffer = build(batch=2, bound=2)
    given = give_all(buffer, 0, itertools.count())
    assert [entry.step for entry in given] == [0, 0, 1, 1, 2, 2]
    assert [entry.needs_version for entry in given] == [-2, -2, -1, -1, 0, 0]
    assert buffer.num_in_flight == 6
    assert [entry.needs_version for entry in give_all(buffer, 1, itertools.count(6))] == [1, 1]


def test_what_does_not_age_asks_for_no_version():
    buffer = build(ages=False)
    given = give_all(buffer, -99, itertools.count())
    assert [entry.step for entry in given] == [0, 0, 1, 1]
    assert {entry.needs_version for entry in given} == {0}


def test_nothing_is_given_out_beyond_the_last_step():
    buffer = build(batch=2, bound=4, end=2)
    assert len(give_all(buffer, 0, itertools.count())) == 4


def test_a_batch_is_taken_whole_with_its_largest_chunk_first():
    buffer = build(batch=3, bound=1)
    first, second, third, *_ = give_all(buffer, 0, itertools.count())
    assert not buffer.has_enough()
    arrive(buffer, [second, third])
    arrive(buffer, [first], length=1)
    assert buffer.has_enough()
    assert not buffer.is_scored()
    score(buffer, [first], [second, third])
    assert buffer.is_scored()
    assert [len(part.chunk.trajectories) for part in buffer.take()] == [2, 1]
    assert (buffer.next_step, buffer.num_in_flight) == (1, 3)


def test_chunks_of_equal_size_are_taken_in_the_order_of_giving_out():
    buffer = build(batch=2, bound=1)
    first, second, *_ = give_all(buffer, 0, itertools.count())
    arrive(buffer, [second, first])
    score(buffer, [second], [first])
    taken = [part.chunk.trajectories[0].trajectory_id for part in buffer.take()]
    assert taken == ["t0", "t1"]


def test_text_need_not_wait_for_company_once_its_step_is_full_or_asked_for():
    buffer = build(batch=2, bound=1, too_old="reissue", share=0.5)
    one, other, late, *_ = give_all(buffer, 0, itertools.count())
    arrive(buffer, [one])
    assert not buffer.is_complete(0)
    buffer.demand()
    assert buffer.is_complete(0)
    assert not buffer.is_complete(1)
    score(buffer, [one])
    buffer.take()
    assert not buffer.is_complete(1), "what was asked for was the step before"
    arrive(buffer, [other, late])
    assert buffer.is_complete(1)


@pytest.mark.parametrize(("batch", "share", "needed"), [(8, 0.3, 3), (8, 0.25, 2), (4, 1.0, 4)])
def test_a_step_begins_with_its_share_rounded_up(batch, share, needed):
    buffer = build(batch=batch, bound=1, too_old="reissue", share=share)
    given = give_all(buffer, 0, itertools.count())
    for written in range(1, needed + 1):
        assert not buffer.has_enough()
        arrive(buffer, given[written - 1 : written])
    assert buffer.has_enough()


def test_a_worker_that_leaves_hands_back_what_it_wrote_and_no_more():
    buffer = build(batch=4, bound=1)
    given = give_all(buffer, 0, itertools.count())[:4]
    for entry, worker in zip(given, (0, 1, 0, 1), strict=True):
        entry.name = f"name{entry.number}"
        buffer.write(entry, worker)
    arrive(buffer, given[:1])
    assert (buffer.num_writing(0), buffer.num_writing(1), buffer.num_writing()) == (1, 2, 3)
    in_flight = buffer.num_in_flight
    buffer.hand_back(1)
    handed = [entry for entry in buffer.handed_back() if entry.name]
    assert [entry.number for entry in handed] == [1, 3]
    assert all(entry.worker is None for entry in handed)
    assert buffer.num_writing() == 1
    assert buffer.num_in_flight == in_flight
    buffer.write(handed[0], 0)
    assert buffer.find_writing(0, "name1") is handed[0]


def test_one_worker_does_not_write_one_sample_twice():
    buffer = build()
    one, other, *_ = give_all(buffer, 0, itertools.count())
    one.name = other.name = "same"
    buffer.write(one, 0)
    with pytest.raises(AssertionError, match="writes same already"):
        buffer.write(other, 0)


def test_what_comes_too_late_is_given_out_again_first_and_promised_in_time():
    buffer = build(batch=1, bound=1, too_old="reissue")
    prompts = itertools.count(10)
    slow, quick = give_all(buffer, 0, prompts)
    assert slow.step is quick.step is None, "out of order no step is promised"
    arrive(buffer, [quick])
    score(buffer, [quick])
    buffer.take()
    [another] = give_all(buffer, 1, prompts)
    arrive(buffer, [another], version=1)
    score(buffer, [another])
    buffer.take()
    arrive(buffer, [slow], version=0)  # step 2 would learn from version 0
    assert slow.state is State.DROPPED
    assert (buffer.num_dropped, buffer.num_in_flight) == (1, 0)
    assert buffer.prompts() == [10]
    again, new = give_all(buffer, 2, prompts)
    assert (again.prompt, new.prompt) == (10, 13)
    assert again.number != slow.number, "another sample of the same prompt"
    assert again.step == 3, "the last step that is in time for version 2"
    assert buffer.num_in_flight == 2


def test_what_comes_too_late_is_taken_as_it_is_where_it_is_weighed():
    buffer = build(batch=1, bound=1, too_old="weigh")
    slow, quick = give_all(buffer, 0, itertools.count())
    arrive(buffer, [quick])
    score(buffer, [quick])
    buffer.take()
    [other] = give_all(buffer, 1, itertools.count(2))
    arrive(buffer, [other], version=1)
    score(buffer, [other])
    buffer.take()
    arrive(buffer, [slow])
    assert (slow.state, slow.step) == (State.WRITTEN, 2)


def test_a_budget_takes_scored_chunks_of_the_next_step_until_it_is_used_up():
    buffer = build(batch=4, bound=1, too_old="reissue")
    given = give_all(buffer, 0, itertools.count())
    arrive(buffer, given[:4], length=5)
    score(buffer, given[:2], given[2:3])
    left = buffer.num_in_flight
    assert buffer.take_more(4) == []
    taken = buffer.take_more(14)  # 10 of the first chunk leave 4, too few for the 5 of the second
    assert [len(part.chunk.trajectories) for part in taken] == [2]
    assert buffer.num_in_flight == left - 2
    assert [len(part.chunk.trajectories) for part in buffer.take_more(5)] == [1]
    assert buffer.take_more(100) == [], "the fourth is not scored"
    assert not buffer.has_enough()


def test_prompts_in_flight_are_told_in_the_order_of_giving_out():
    buffer = build(batch=2, bound=1)
    given = give_all(buffer, 0, iter([7, 5, 9, 1]))
    arrive(buffer, [given[3], given[0]])
    given[1].name = "name"
    buffer.write(given[1], 0)
    assert buffer.prompts() == [7, 5, 9, 1]


@given(
    seed=st.randoms(use_true_random=False),
    batch=st.integers(1, 4),
    bound=st.integers(1, 3),
    too_old=st.sampled_from(["wait", "reissue", "weigh"]),
)
def test_whatever_happens_nothing_is_lost_and_nothing_too_old_is_learned_from(
    seed, batch, bound, too_old
):
    """Against a plain list: every prompt drawn is learned from once, or still in flight."""
    buffer = build(batch=batch, bound=bound, end=12, too_old=too_old)
    drawn, learned, version, prompts = [], [], 0, itertools.count()

    def draw():
        drawn.append(next(prompts))
        return drawn[-1]

    under_way: list[tuple[Entry, int]] = []  # with the version that writes it
    for _ in range(200):
        assert buffer.num_in_flight <= (bound + 1) * batch
        assert sorted(learned + buffer.prompts()) == drawn
        if buffer.may_give(version) and seed.random() < 0.6:
            entry = buffer.give(version, draw)
            under_way.append((entry, version))
        if under_way and seed.random() < 0.5:
            entry, written_by = under_way.pop(seed.randrange(len(under_way)))
            buffer.arrive(entry, text(entry, written_by), 0.0)
        for _, waiting in buffer.waiting():
            if seed.random() < 0.5:
                score(buffer, list(waiting.values()))
        if buffer.has_enough() and buffer.is_scored():
            step = buffer.next_step
            fed = [t for part in buffer.take() for t in part.chunk.trajectories]
            assert len(fed) == batch
            assert all(at is None or at > step for at, _ in buffer._by_state), "steps that are over"
            learned += [int(t.prompt_id.removeprefix("p")) for t in fed]
            if too_old != "weigh":
                assert all(step - t.oldest_version <= bound for t in fed)
            version = step + 1

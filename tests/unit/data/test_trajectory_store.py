from __future__ import annotations

import os
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
from trajectories import make_trajectories

from distill_system.data import Selection, TrajectoryStore, read_trajectories
from distill_system.data.fingerprints import fingerprint_prompt
from distill_system.data.parquet_parts import ABANDONED_SECONDS, PREFIX
from distill_system.data.stored_rows import SampleOrigin, make_rows
from distill_system.errors import DataError, RecordError
from distill_system.records import Author, VersionSpan

ORIGIN = SampleOrigin(
    author=Author.TEACHER,
    model="models/teacher",
    model_fingerprint="f" * 32,
    tokenizer_fingerprint="t" * 32,
    temperature=1.0,
    top_p=0.9,
    max_response_tokens=16,
    stop_token_ids=(2, 5),
    seed=7,
)
OURS = ORIGIN.tokenizer_fingerprint


def written(count, first=0):
    """Samples of the teacher whose numbers use every bit they have."""
    made = make_trajectories(count, Author.TEACHER, first)
    rng = np.random.default_rng(first)
    return [
        replace(t, behaviour_logprobs=-rng.random(t.num_response_tokens, dtype=np.float32))
        for t in made
    ]


def fill(folder, count, first=0, origin=ORIGIN, label="a"):
    return TrajectoryStore(folder, OURS).append(
        make_rows(written(count, first), origin, label=label)
    )


def same(left, right):
    for field in fields(left):
        ours, theirs = getattr(left, field.name), getattr(right, field.name)
        if isinstance(ours, np.ndarray):
            assert (ours.dtype, ours.tobytes()) == (theirs.dtype, theirs.tobytes())
        else:
            assert (type(ours), ours) == (type(theirs), theirs)


def by_id(trajectories):
    return {t.trajectory_id: t for t in trajectories}


def test_samples_come_back_bit_for_bit(tmp_path):
    wrote = written(30)
    TrajectoryStore(tmp_path, OURS).append(make_rows(wrote, ORIGIN, label="a"))
    read = by_id(read_trajectories(tmp_path, OURS))
    assert len(read) == 30
    for trajectory in wrote:
        same(trajectory, read[trajectory.trajectory_id])


def test_the_students_spans_come_back(tmp_path):
    [sample] = make_trajectories(1, Author.STUDENT, first=3)
    end = sample.num_response_tokens
    spans = (VersionSpan(version=1, start=0, end=2), VersionSpan(version=4, start=2, end=end))
    sample = replace(sample, weight_versions=spans)
    origin = replace(ORIGIN, author=Author.STUDENT)
    TrajectoryStore(tmp_path, OURS).append(make_rows([sample], origin, label="a"))
    same(sample, read_trajectories(tmp_path, OURS)[0])


def test_what_is_there_already_is_not_written_again(tmp_path):
    store = TrajectoryStore(tmp_path, OURS)
    first = store.append(make_rows(written(10), ORIGIN, label="a"))
    again = store.append(make_rows(written(14), ORIGIN, label="a"))
    reopened = TrajectoryStore(tmp_path, OURS).append(make_rows(written(15), ORIGIN, label="a"))
    nothing = store.append(make_rows(written(15), ORIGIN, label="a"))
    assert [first, again, reopened, nothing] == [10, 4, 1, 0]
    assert len(read_trajectories(tmp_path, OURS)) == 15
    assert len(list((tmp_path / "trajectories").iterdir())) == 3, "nothing new is no part"


def test_one_append_holds_each_sample_once(tmp_path):
    num_written = TrajectoryStore(tmp_path, OURS).append(
        make_rows(written(5) * 3, ORIGIN, label="a")
    )
    assert num_written == 5
    assert len(read_trajectories(tmp_path, OURS)) == 5


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 8},
        {"top_p": 1.0},
        {"max_response_tokens": 17},
        {"stop_token_ids": (2,)},
        {"model_fingerprint": "g" * 32},
    ],
)
def test_another_model_sampling_or_seed_makes_another_sample(tmp_path, other):
    fill(tmp_path, 5)
    assert fill(tmp_path, 5, origin=replace(ORIGIN, **other)) == 5
    assert fill(tmp_path, 5, label="b") == 5
    assert fill(tmp_path, 5, origin=replace(ORIGIN, model="moved/here")) == 0


def test_the_order_depends_on_the_samples_alone(tmp_path):
    fill(tmp_path / "one", 40)
    for first in (30, 10, 0, 20):
        fill(tmp_path / "many", 10, first)
    one, many = (read_trajectories(tmp_path / name, OURS) for name in ("one", "many"))
    assert [t.trajectory_id for t in one] == [t.trajectory_id for t in many]
    assert [one.key(i) for i in range(40)] == sorted(one.key(i) for i in range(40))
    assert one.num_response_tokens == sum(t.num_response_tokens for t in written(40))
    assert [t.trajectory_id for t in one[5:9]] == [one[i].trajectory_id for i in range(5, 9)]
    same(one[-1], one[39])
    with pytest.raises(IndexError):
        one[40]
    ids = [t.trajectory_id for t in one]
    assert many.to_table()["trajectory_id"].to_pylist() == ids


def test_others_read_the_parts_as_they_are(tmp_path):
    store, wrote = TrajectoryStore(tmp_path, OURS), written(6)
    texts = [f"prompt {i}" for i in range(6)]
    rows = make_rows(wrote, ORIGIN, label="a", prompt_texts=texts)
    at = rows.schema.get_field_index("response_text")
    store.append(rows[:4].set_column(at, "response_text", pyarrow.array(texts[:4])))
    store.append(rows[4:])
    (tmp_path / "trajectories" / f"{PREFIX}x.parquet").write_bytes(b"half of a part")
    folder = tmp_path / "trajectories"
    rows = datasets.load_dataset(
        "parquet", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache")
    )
    frame = pd.read_parquet(folder)
    expected = {t.trajectory_id: t.token_ids.tolist() for t in wrote}
    assert dict(zip(rows["trajectory_id"], rows["token_ids"], strict=True)) == expected
    assert dict(zip(frame.trajectory_id, map(list, frame.token_ids), strict=True)) == expected
    assert set(frame.prompt_text) == set(texts)
    assert frame.response_text.notna().sum() == 4
    assert set(frame.stop_token_ids.map(tuple)) == {(2, 5)}
    assert (frame.model_fingerprint == "f" * 32).all()


class Killed(BaseException):
    """Ends a writer as a signal does: nothing of it runs on."""


def test_a_crash_between_write_and_rename_leaves_the_parts_before(tmp_path, monkeypatch):
    fill(tmp_path, 10)

    def die(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", die)
        with pytest.raises(Killed):
            fill(tmp_path, 20)
    [half] = (tmp_path / "trajectories").glob(f"{PREFIX}*")
    assert len(read_trajectories(tmp_path, OURS)) == 10
    assert fill(tmp_path, 20) == 10
    assert half.exists(), "another writer may be at work on it now"
    old = time.time() - ABANDONED_SECONDS - 1
    os.utime(half, (old, old))
    TrajectoryStore(tmp_path, OURS)
    assert not half.exists()
    assert len(read_trajectories(tmp_path, OURS)) == 20


def test_a_full_disk_is_told_and_leaves_nothing_behind(tmp_path, monkeypatch):
    fill(tmp_path, 10)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pyarrow.parquet, "write_table", full)
    with pytest.raises(DataError, match=r"10 rows cannot be written: .*No space left"):
        fill(tmp_path, 20)
    assert len(list((tmp_path / "trajectories").iterdir())) == 1


def test_two_writers_at_a_time_do_not_collide(tmp_path):
    stores = [TrajectoryStore(tmp_path, OURS) for _ in range(2)]

    def write(store, firsts):
        for first in firsts:
            store.append(make_rows(written(10, first), ORIGIN, label="a"))

    orders = ([0, 10, 20, 30, 40], [40, 30, 20, 10, 50])
    threads = [
        threading.Thread(target=write, args=pair) for pair in zip(stores, orders, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    read = read_trajectories(tmp_path, OURS)
    assert by_id(read).keys() == by_id(written(60)).keys()
    assert len(read) == 60


def test_a_sample_that_two_wrote_at_the_same_moment_is_read_once(tmp_path):
    for folder in ("one", "two"):
        fill(tmp_path / folder, 10)
    [part] = (tmp_path / "two" / "trajectories").iterdir()
    part.rename(tmp_path / "one" / "trajectories" / part.name)
    read = read_trajectories(tmp_path / "one", OURS)
    assert len(read) == read.to_table().num_rows == 10


def test_a_writer_sees_what_another_has_written_since(tmp_path):
    ours = TrajectoryStore(tmp_path, OURS)
    fill(tmp_path, 10)
    assert ours.append(make_rows(written(12), ORIGIN, label="a")) == 2


def test_a_store_of_another_tokenizer_is_refused_with_what_to_do(tmp_path):
    fill(tmp_path, 3)
    for use in (TrajectoryStore, read_trajectories):
        with pytest.raises(DataError, match=r"of the tokenizer t{32}, .* is other, .*--out"):
            use(tmp_path, "other")
    foreign = replace(ORIGIN, tokenizer_fingerprint="other")
    with pytest.raises(DataError, match=r"expected samples of the tokenizer t{32}"):
        fill(tmp_path, 5, origin=foreign)


def test_a_part_that_is_not_whole_is_named(tmp_path):
    fill(tmp_path, 3)
    [part] = (tmp_path / "trajectories").iterdir()
    part.write_bytes(part.read_bytes()[:200])
    with pytest.raises(DataError, match=rf"{part.name}: expected a complete part"):
        TrajectoryStore(tmp_path, OURS)


def test_a_file_is_no_store(tmp_path):
    (tmp_path / "store").write_text("")
    with pytest.raises(DataError, match="is a folder, got a file"):
        TrajectoryStore(tmp_path / "store", OURS)


def test_a_sample_of_another_author_than_its_origin_is_refused(tmp_path):
    with pytest.raises(RecordError, match="expected author and temperature"):
        TrajectoryStore(tmp_path, OURS).append(
            make_rows(make_trajectories(1, Author.STUDENT), ORIGIN, label="a")
        )


@pytest.fixture
def mixed(tmp_path):
    """Ten samples of ours; five of another model, four of another temperature."""
    fill(tmp_path, 10)
    fill(tmp_path, 5, origin=replace(ORIGIN, model="models/other", model_fingerprint="g" * 32))
    warm = [replace(t, temperature=0.5) for t in written(4)]
    origin = replace(ORIGIN, temperature=0.5)
    TrajectoryStore(tmp_path, OURS).append(make_rows(warm, origin, label="a"))
    return tmp_path


def test_only_what_one_policy_wrote_is_read(mixed):
    wanted = replace(ORIGIN, model="moved", seed=0, max_response_tokens=99)
    read = read_trajectories(mixed, OURS, Selection(origin=wanted))
    assert by_id(read).keys() == by_id(written(10)).keys()
    assert (read.num_foreign, read.num_blocked, read.num_too_long) == (9, 0, 0)


def test_blocked_prompts_and_long_samples_are_left_out_and_counted(mixed):
    ours = written(10)
    blocked = ours[4]
    prompt = fingerprint_prompt(blocked.token_ids[: blocked.num_prompt_tokens])
    selection = Selection(
        origin=ORIGIN, blocked=[prompt], max_prompt_tokens=7, max_response_tokens=9
    )
    kept = {
        t.trajectory_id
        for t in ours
        if t is not blocked and t.num_prompt_tokens <= 7 and t.num_response_tokens <= 9
    }
    read = read_trajectories(mixed, OURS, selection)
    assert by_id(read).keys() == kept
    assert 0 < read.num_too_long == 9 - len(kept)
    assert (read.num_foreign, read.num_blocked) == (9, 1)


def test_a_store_without_anything_of_ours_says_what_it_holds(mixed):
    strange = replace(ORIGIN, model="models/third", model_fingerprint="h" * 32)
    with pytest.raises(DataError) as told:
        read_trajectories(mixed, OURS, Selection(origin=strange))
    assert "expected samples of author teacher, model models/third" in str(told.value)
    assert "holds 10 of author teacher, model models/teacher" in str(told.value)
    assert "5 of author teacher, model models/other" in str(told.value)
    with pytest.raises(DataError, match=r"10 are longer than data.max_prompt_tokens=1 "):
        read_trajectories(mixed, OURS, Selection(origin=ORIGIN, max_prompt_tokens=1))


def test_no_store_and_an_empty_one_are_told(tmp_path):
    with pytest.raises(DataError, match=r"does not exist\. Fill it with `distill-system generate`"):
        read_trajectories(tmp_path / "nowhere", OURS)
    with pytest.raises(DataError, match="has no samples"):
        read_trajectories(tmp_path, OURS)

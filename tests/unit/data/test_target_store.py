from __future__ import annotations

import shutil
from dataclasses import fields
from types import SimpleNamespace

import datasets
import numpy as np
import pytest

from distill_system.config.objective import TeacherNeeds
from distill_system.data import TargetStore
from distill_system.data.target_store import ROW_GROUP_ROWS, make_target_rows, require_room
from distill_system.errors import DataError
from distill_system.records import TeacherTargets

FLOATS = ("features", "expected_embedding")


def targets(count, *, dtype=np.float16, with_k=False, first=0):
    rng = np.random.default_rng(first)
    made = []
    for i in range(first, first + count):
        num = 1 + i % 5
        made.append(
            TeacherTargets(
                trajectory_id=f"t{i}",
                num_tokens=num,
                features=rng.standard_normal((num, 6)).astype(dtype),
                expected_embedding=rng.standard_normal((num, 4)).astype(dtype),
                logprobs=None if with_k else -rng.random(num, dtype=np.float32),
                top_k_ids=rng.integers(0, 9, (num, 3)).astype(np.int32) if with_k else None,
                top_k_logprobs=-rng.random((num, 3), dtype=np.float32) if with_k else None,
            )
        )
    return made


def keys(made):
    return [f"key of {each.trajectory_id}" for each in made]


def rows(made):
    return make_target_rows(keys(made), made, "r")


def same(left, right):
    for field in fields(left):
        ours, theirs = getattr(left, field.name), getattr(right, field.name)
        if isinstance(ours, np.ndarray):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            assert ours.tobytes() == theirs.tobytes()
        else:
            assert ours == theirs


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("with_k", [False, True])
def test_targets_come_back_bit_for_bit_in_the_order_asked_for(tmp_path, dtype, with_k):
    made = targets(3 * ROW_GROUP_ROWS + 1, dtype=dtype, with_k=with_k)
    assert TargetStore(tmp_path, "r").append(rows(made)) == len(made)
    wanted = [made[i] for i in (40, 3, 48, 3, 0, 17)]
    read = TargetStore(tmp_path, "r").read(keys(wanted), [t.trajectory_id for t in wanted])
    for ours, theirs in zip(wanted, read, strict=True):
        same(ours, theirs)


def test_what_is_there_is_not_written_again_and_another_reading_is_not_seen(tmp_path):
    store, made = TargetStore(tmp_path, "r"), targets(5)
    assert [store.append(rows(made[:3])), store.append(rows(made))] == [3, 2]
    assert store.append(rows(made)) == 0
    other = TargetStore(tmp_path, "another teacher")
    assert all(key in store for key in keys(made))
    assert not any(key in other for key in keys(made))
    with pytest.raises(KeyError):
        other.read(keys(made)[:1], ["t0"])


def test_float16_beside_float32_loses_nothing(tmp_path):
    """A scorer falls back to float32 where a number is out of float16's range."""
    small, [large] = targets(2), targets(1, dtype=np.float32, first=9)
    large.features[0, 0] = 1e6
    made = [*small, large]
    store = TargetStore(tmp_path, "r")
    store.append(rows(made))
    for ours, theirs in zip(made, store.read(keys(made), ["a", "b", "c"]), strict=True):
        for name in FLOATS:
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


def test_datasets_reads_targets(tmp_path):
    made = targets(4)
    TargetStore(tmp_path, "r").append(rows(made))
    loaded = datasets.load_dataset(
        "parquet",
        data_dir=str(tmp_path / "targets"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    read = np.array(loaded[3]["features"], np.float16).reshape(made[3].num_tokens, -1)
    np.testing.assert_array_equal(read, made[3].features)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_prediction_is_what_the_arrays_take(dtype):
    needs = TeacherNeeds(features=True, expected_embedding=True, logprobs=True)
    made = targets(20, dtype=dtype)
    arrays = [getattr(each, name) for each in made for name in (*FLOATS, "logprobs")]
    per_token = needs.bytes_per_token(hidden=6, actions=4, half=dtype is np.float16)
    num_tokens = sum(each.num_tokens for each in made)
    assert num_tokens * per_token == sum(array.nbytes for array in arrays)
    assert TeacherNeeds(top_k=3).bytes_per_token(hidden=6, actions=4, half=True) == 3 * 8


def test_more_than_the_disk_has_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    require_room(tmp_path / "not" / "there", 2**30)
    with pytest.raises(DataError, match=r"up to 1\.50 GiB, .* 1\.00 GiB free.*--out"):
        require_room(tmp_path / "not" / "there", 1.5 * 2**30)

from __future__ import annotations

import pytest

from distill_system.errors import RunStateError
from distill_system.stages.checkpoints import CheckpointStore, resume_point


def _write(text):
    def write_learner(folder):
        (folder / "learner.bin").write_text(text)

    return write_learner


def test_the_newest_checkpoint_comes_back_with_its_state(tmp_path):
    store = CheckpointStore(tmp_path / "distill", keep=3)
    assert store.latest() is None
    for step in (5, 10, 100):
        store.save(step, {"feed": {"position": step * 2}}, _write(f"weights {step}"))
    latest = CheckpointStore(tmp_path / "distill", keep=3).latest()
    assert latest is not None
    assert (latest.step, latest.state) == (100, {"feed": {"position": 200}})
    assert (latest.folder / "learner.bin").read_text() == "weights 100"


def test_only_the_last_few_stay(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        store.save(step, {}, _write(str(step)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000003", "step_000004"]


def test_a_crash_while_writing_leaves_the_one_before(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, {}, _write("one"))

    def crash(folder):
        (folder / "learner.bin").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.save(2, {}, crash)
    latest = CheckpointStore(tmp_path, keep=1).latest()
    assert latest is not None
    assert latest.step == 1
    store.save(2, {}, _write("two"))
    assert (tmp_path / "step_000002" / "learner.bin").read_text() == "two"


def test_what_a_crash_left_goes_with_the_next_checkpoint(tmp_path):
    (tmp_path / "step_000002.partial").mkdir()
    store = CheckpointStore(tmp_path, keep=2)
    assert store.latest() is None
    store.save(3, {}, _write("three"))  # say, checkpoint_every was changed
    assert [path.name for path in tmp_path.iterdir()] == ["step_000003"]


def test_a_step_that_is_reached_again_replaces_its_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    store.save(3, {"attempt": 1}, _write("first"))
    store.save(3, {"attempt": 2}, _write("second"))
    latest = store.latest()
    assert latest is not None
    assert latest.state == {"attempt": 2}
    assert (latest.folder / "learner.bin").read_text() == "second"


@pytest.mark.parametrize("damaged", ["", '{"step": 7, "fe', "[7]", "{}", None])
def test_a_damaged_checkpoint_is_named(tmp_path, damaged):
    store = CheckpointStore(tmp_path, keep=1)
    store.save(7, {}, _write("seven"))
    state = tmp_path / "step_000007" / "state.json"
    state.unlink() if damaged is None else state.write_text(damaged)
    with pytest.raises(RunStateError, match=r"step_000007 is damaged .*remove that folder"):
        store.latest()


def test_going_on_must_be_asked_for(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    assert resume_point(store, resume=False, stage="distill") is None
    store.save(3, {}, _write("three"))
    with pytest.raises(RunStateError, match=r"checkpoint at step 3.*add --resume"):
        resume_point(store, resume=False, stage="distill")
    resumed = resume_point(store, resume=True, stage="distill")
    assert resumed is not None
    assert resumed.step == 3
    store.clear()
    assert store.latest() is None

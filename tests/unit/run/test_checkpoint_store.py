from __future__ import annotations

import json
import zlib

import pytest
from fakes.text_saver import TextSaver

from distill_system.config.distill import BestConfig
from distill_system.errors import DeadlineError, NonFiniteError, RunStateError, WorkerError
from distill_system.learner import FileRecord, describe_file
from distill_system.run.checkpoints import CheckpointStore, resume_point


def _save(store, step, text=None, *, state=None, **metrics):
    learner = TextSaver(f"weights {step}" if text is None else text)
    store.start(step, state or {}, learner, metrics=metrics)
    assert store.finish(learner, wait=True)


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_checkpoint_comes_back_with_its_state(tmp_path):
    store = CheckpointStore(tmp_path / "distill", keep=3)
    assert store.latest() is None
    for step in (5, 10, 100):
        _save(store, step, state={"feed": {"position": step * 2}}, loss=step / 2)
    again = CheckpointStore(tmp_path / "distill", keep=3)
    latest = again.latest()
    assert latest is not None
    assert (latest.step, latest.state, latest.metrics) == (
        100,
        {"feed": {"position": 200}},
        {"loss": 50.0},
    )
    learner = TextSaver()
    again.load(latest, learner)
    assert learner.text == "weights 100"


def test_the_manifest_names_every_file_with_its_length_and_checksum(tmp_path):
    _save(CheckpointStore(tmp_path, keep=1), 3, "three")
    folder = tmp_path / "step_000003"
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    assert manifest.keys() == {"model/weights", "state.json"}
    assert manifest["model/weights"] == {"num_bytes": 5, "crc32": zlib.crc32(b"three")}
    assert FileRecord(**manifest["state.json"]) == describe_file(folder / "state.json")


def test_steps_go_on_beside_a_write_and_the_checkpoint_stands_only_when_it_is_done(tmp_path):
    store, learner = CheckpointStore(tmp_path, keep=1), TextSaver("one", writing=True)
    store.start(1, {}, learner)
    learner.text = "two"
    assert not store.finish(learner, wait=False)
    assert CheckpointStore(tmp_path, keep=1).latest() is None
    learner.writing = False
    assert store.finish(learner, wait=False)
    assert (tmp_path / "step_000001" / "model" / "weights").read_text() == "one"
    assert store.finish(learner, wait=False), "nothing is under way any more"


def test_the_next_checkpoint_waits_for_the_one_before(tmp_path):
    store, learner = CheckpointStore(tmp_path, keep=5), TextSaver("one", writing=True)
    store.start(1, {}, learner)
    learner.text = "two"
    store.start(2, {}, learner)
    assert (tmp_path / "step_000001" / "model" / "weights").read_text() == "one"
    assert _names(tmp_path) == ["step_000001", "step_000002.partial"]


def test_only_the_last_few_stay(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        _save(store, step)
    assert _names(tmp_path) == ["step_000003", "step_000004"]


@pytest.mark.parametrize(
    ("mode", "count", "kept"), [("min", 1, [2, 6]), ("min", 2, [2, 5, 6]), ("max", 2, [1, 4, 6])]
)
def test_the_best_stay_beside_the_newest(tmp_path, mode, count, kept):
    best = BestConfig(metric="held_out/on_policy_distance", mode=mode, count=count)
    store = CheckpointStore(tmp_path, keep=1, best=best)
    for step, distance in enumerate([9.0, 1.0, None, 5.0, 3.0, 4.0], start=1):
        measured = {} if distance is None else {"held_out/on_policy_distance": distance}
        _save(store, step, **measured)
    assert _names(tmp_path) == [f"step_{step:06d}" for step in kept]


def test_of_equally_good_checkpoints_the_earlier_stays_and_no_number_is_no_best(tmp_path):
    best = BestConfig(metric="held_out/x", mode="min")
    store = CheckpointStore(tmp_path, keep=1, best=best)
    for step, value in enumerate([float("nan"), 1.0, 1.0, 2.0], start=1):
        _save(store, step, **{"held_out/x": value})
    assert _names(tmp_path) == ["step_000002", "step_000004"]


def test_the_best_comes_back_although_newer_ones_stand(tmp_path):
    store = CheckpointStore(tmp_path, keep=1, best=BestConfig(metric="held_out/x", mode="min"))
    for step, value in ((1, 3.0), (2, 1.0), (3, 2.0)):
        _save(store, step, **{"held_out/x": value})
    best = store.find_best()
    assert (best.step, best.metrics) == (2, {"held_out/x": 1.0})
    learner = TextSaver()
    store.load(best, learner)
    assert learner.text == "weights 2"
    (best.folder / "model" / "weights").write_text("other")
    with pytest.raises(RunStateError, match="step_000002 is damaged"):
        store.find_best()


def test_without_a_finite_value_nothing_is_best_and_the_way_out_is_named(tmp_path):
    store = CheckpointStore(tmp_path, keep=1, best=BestConfig(metric="held_out/x", mode="min"))
    _save(store, 1, **{"held_out/x": None})
    with pytest.raises(RunStateError, match=r"finite value of held_out/x .*weights=last"):
        store.find_best()


def test_a_crash_while_writing_leaves_the_one_before(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    _save(store, 1, "one")
    store.start(2, {}, TextSaver("half"))
    survivor = CheckpointStore(tmp_path, keep=1)
    latest = survivor.latest()
    assert latest is not None
    assert latest.step == 1
    _save(survivor, 2, "two")
    assert _names(tmp_path) == ["step_000002"]
    assert (tmp_path / "step_000002" / "model" / "weights").read_text() == "two"


def test_what_a_crash_left_goes_with_the_next_checkpoint(tmp_path):
    (tmp_path / "step_000002.partial").mkdir()
    (tmp_path / "step_000001.removed").mkdir()
    store = CheckpointStore(tmp_path, keep=2)
    assert store.latest() is None
    _save(store, 3)  # say, checkpoint_every was changed
    assert _names(tmp_path) == ["step_000003"]


def test_a_step_that_is_reached_again_replaces_its_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    _save(store, 3, "first", state={"attempt": 1})
    _save(store, 3, "second", state={"attempt": 2})
    latest = store.latest()
    assert latest is not None
    assert latest.state == {"attempt": 2}
    assert (latest.folder / "model" / "weights").read_text() == "second"


def _fail_beside_a_write(store, learner, step, error):
    with store.finished_on_failure(learner):
        store.start(step, {}, learner)
        raise error


def test_a_failure_beside_a_write_leaves_the_checkpoint_whole(tmp_path):
    store, learner = CheckpointStore(tmp_path, keep=2), TextSaver("one", writing=True)
    with pytest.raises(NonFiniteError):
        _fail_beside_a_write(store, learner, 1, NonFiniteError())
    assert _names(tmp_path) == ["step_000001"]


@pytest.mark.parametrize("failure", [WorkerError("the learner died"), DeadlineError("no answer")])
def test_a_failure_of_the_learner_itself_leaves_the_one_before(tmp_path, failure):
    store, learner = CheckpointStore(tmp_path, keep=2), TextSaver("two")
    _save(store, 1)
    learner.failure = failure
    with pytest.raises(type(failure), match=str(failure)):
        _fail_beside_a_write(store, learner, 2, failure)
    latest = CheckpointStore(tmp_path, keep=2).latest()
    assert latest is not None
    assert latest.step == 1


@pytest.mark.parametrize(
    ("name", "damaged", "said"),
    [
        ("manifest.json", None, r".*manifest\.json is missing"),
        ("manifest.json", '{"files": {"st', r".*manifest\.json is not JSON"),
        ("manifest.json", "{}", r".*manifest\.json, files: Field required"),
        (
            "manifest.json",
            '{"files": {"state.json": 7}}',
            r".*files, state\.json: .*object, got 7",
        ),
        ("state.json", None, r"state\.json is missing"),
        ("state.json", "[7]", r"state\.json has 3 bytes, was written with"),
        ("model/weights", None, r"model/weights is missing"),
        ("model/weights", "sev", r"model/weights has 3 bytes, was written with 5"),
        ("model/weights", "sevens", r"model/weights has 6 bytes, was written with 5"),
    ],
)
def test_a_damaged_newest_checkpoint_is_named_with_the_way_on(tmp_path, name, damaged, said):
    store = CheckpointStore(tmp_path, keep=2)
    _save(store, 7, "seven")
    path = tmp_path / "step_000007" / name
    path.unlink() if damaged is None else path.write_text(damaged)
    with pytest.raises(RunStateError, match=rf"step_000007 is damaged: {said}.* begin this stage"):
        store.latest()


def test_an_altered_byte_is_found_before_anything_is_loaded(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    _save(store, 6, "six")
    _save(store, 7, "seven")
    state = tmp_path / "step_000007" / "state.json"
    whole = state.read_text()
    state.write_text(whole.replace("7", "8"))
    with pytest.raises(RunStateError, match=r"state\.json was altered.* go on from step_000006"):
        store.latest()
    state.write_text(whole)
    (tmp_path / "step_000007" / "model" / "weights").write_text("eleve")
    latest, learner = store.latest(), TextSaver("untouched")
    assert latest is not None
    with pytest.raises(RunStateError, match=r"weights was altered: .* go on from step_000006"):
        store.load(latest, learner)
    assert learner.text == "untouched"


def test_going_on_must_be_asked_for(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    assert resume_point(store, resume=False, stage="distill") is None
    _save(store, 3)
    with pytest.raises(RunStateError, match=r"checkpoint at step 3.*add --resume"):
        resume_point(store, resume=False, stage="distill")
    resumed = resume_point(store, resume=True, stage="distill")
    assert resumed is not None
    assert resumed.step == 3
    store.clear()
    assert store.latest() is None

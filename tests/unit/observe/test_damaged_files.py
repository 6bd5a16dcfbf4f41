"""Whatever stands in place of a file of a run: a report, or one error that names file and way out.

The damages are made by rule from a run's own good files; Hypothesis draws more of them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill_system.errors import RunStateError
from distill_system.observe import (
    MetricLog,
    PromptLog,
    RunDirectory,
    Timings,
    write_evaluation,
    write_report,
    write_summary,
)
from distill_system.observe.metrics import read_metrics, read_prompts
from distill_system.observe.run_directory import write_json
from distill_system.records import PoolActivity

FILES = (
    "config.json",
    "environment.json",
    "timings.json",
    "tracking.json",
    "metrics.jsonl",
    "prompts.jsonl",
    "evaluations/before.json",
    "evaluations/after.json",
)


class _Split:
    def to_json(self):
        shown = {"prompt": "p", "references": ["r"], "greedy": "g", "sampled": "s"}
        return {
            "num_examples": 2,
            "scores": {"rouge_l_greedy": {"mean": 50.0, "stderr": None}},
            "prompt_ids": ["a", "b"],
            "per_example": {"rouge_l_greedy": [100.0, 0.0]},
            "bootstrap": {"bleu_greedy": [1.0, 2.0]},
            "shown": [shown],
        }


def _write_run(run):
    write_json(
        run.config_path,
        {
            "name": "mine",
            "student": {"sft": None},
            "distill": {"staleness": {"max_staleness": 1}},
            "pools": {"learner": {"count": 1, "gpus": 0}, "evaluation": None},
            "evaluation": {"metrics": ["rouge_l"]},
        },
    )
    machine = {"cores": 2, "usable_cores": None}
    write_json(run.environment_path, {"versions": {"torch": "2"}, "machine": machine})
    write_json(run.trackers_path, {"wandb": {"id": "a", "url": None}})
    timings = Timings(run)
    timings.add_activity({"learner": PoolActivity(num_workers=1, seconds=2.0, busy_seconds=1.0)})
    timings.save()
    with MetricLog(run, run_name="mine") as log, PromptLog(run) as prompts:
        for step in range(3):
            log.log("distill", step, {"learner/loss": 1.0, "seconds/step": float("nan")})
            prompts.log("distill", step, {"on_policy": ["a"]})
    for label in ("before", "after"):
        write_evaluation(
            run, label, step=3, weight_version=3, splits={"test": _Split()}, distances={"a": 1.0}
        )


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A run's files, and what they held when they were good."""
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    _write_run(run)
    _read(run)
    return run, {name: (run.path / name).read_bytes() for name in FILES}


def _read(run):
    """All that is read of a run after it has ended, or when it goes on."""
    write_summary(run)
    write_report(run)
    read_prompts(run)
    read_metrics(run)
    Timings(run)


def _is_told(run, name):
    """Whether the run is refused, rightly; anything but RunStateError fails the test."""
    try:
        _read(run)
    except RunStateError as error:
        said = str(error)
        assert str(run.path / name) in said, said
        assert "\n" not in said
        assert len(said) < 400 + len(str(run.path)), said
        return True
    return False


@pytest.fixture
def damaged(good):
    """Put something in place of a file; the good file comes back afterwards."""
    run, contents = good

    def put(name, content):
        (run.path / name).write_bytes(content)
        return run

    yield put
    for name, content in contents.items():
        (run.path / name).write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00", b"[1, 2]", b"null", b'{"a"', b"{" * 100_000, b"\x00" * 64]
)
def test_what_is_no_object_is_told(damaged, name, content):
    line = b"\n" if name.endswith("l") and content else b""
    assert _is_told(damaged(name, content + line), name) or (name.endswith("l") and not content)


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_place_of_a_file_is_told(good, name):
    run, contents = good
    path = run.path / name
    path.unlink()
    path.mkdir()
    try:
        with pytest.raises(RunStateError, match=rf"{name} cannot be read: a folder stands there"):
            _read(run)
    finally:
        path.rmdir()
        path.write_bytes(contents[name])


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_may_not_be_read_is_told(good, name, monkeypatch):
    run, _ = good
    read = Path.read_bytes

    def refuse(path):
        if path == run.path / name:  # root may read everything, so permissions alone do not tell
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(RunStateError, match=rf"{name} cannot be read: Permission denied"):
        _read(run)


def _places(value, path=()):
    """The path of every value in a tree."""
    yield path
    children = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, child in children:
        yield from _places(child, (*path, key))


def _with(value, path, other):
    """A tree with another value at a path, without one there if `other` is Ellipsis."""
    if not path:
        return other
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1 and other is ...:
        del copy[path[0]]
    else:
        copy[path[0]] = _with(copy[path[0]], path[1:], other)
    return copy


@pytest.mark.parametrize("name", FILES)
def test_every_value_of_every_file_may_be_another_or_missing(damaged, good, name):
    """Either it is read, as by an older version that knew no such key, or it is told."""
    _, contents = good
    text = contents[name].decode()
    first, _, rest = text.partition("\n") if name.endswith("l") else (text, "", "")
    tree, told = json.loads(first), 0
    for path in list(_places(tree))[1:]:
        for other in (..., None, -1, "text", [], {}, 12345.0, True):
            form = json.dumps(_with(tree, path, other))
            told += _is_told(damaged(name, f"{form}\n{rest}".encode()), name)
    assert told


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_drawn_is_read_or_told(damaged, good, data):
    _, contents = good
    name = data.draw(st.sampled_from([name for name in FILES if name.endswith("json")]))
    tree = json.loads(contents[name])
    path = data.draw(st.sampled_from(list(_places(tree))))
    form = json.dumps(_with(tree, path, data.draw(_JSON)))
    run = damaged(name, form.encode())
    _is_told(run, name)
    damaged(name, contents[name])


def test_what_is_there_is_read(good):
    run, _ = good
    assert os.path.getsize(run.report_path) > 0
    assert [row.step for row in read_metrics(run)] == [0, 1, 2]

"""A run's folder and its mirror, here in another folder: pyarrow gives both one interface."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from distill_system.errors import ConfigError, RunStateError, WorkerError
from distill_system.observe import RunDirectory
from distill_system.run.mirror import RunMirror, mirrored

STEP = "checkpoints/distill/step_000004"


@pytest.fixture(scope="module")
def object_store() -> Iterator[str]:
    """The address of a bucket of a local S3 server."""
    server, boto3 = import_module("moto.server"), import_module("boto3")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("AWS_ACCESS_KEY_ID", "a")
        patched.setenv("AWS_SECRET_ACCESS_KEY", "b")
        running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        running.start()
        host, port = running.get_host_and_port()
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        client.create_bucket(Bucket="bucket")
        yield f"s3://bucket/runs?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
        running.stop()


@pytest.fixture(params=["folder", "object store"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return f"file://{tmp_path / 'mirror'}"
    given: str = request.getfixturevalue("object_store")
    return given


def _write(run: RunDirectory, *names: str, text: str = "x") -> None:
    for name in names:
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_text(text + name)


def _tree(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in files}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "runs" / f"run-{os.getpid()}-{tmp_path.name}")
    _write(run, "config.json", "metrics.jsonl", f"{STEP}/manifest.json", f"{STEP}/model/a")
    return run


def test_what_is_complete_comes_back_as_it_was(run, address) -> None:
    kept = _tree(run.path)
    _write(
        run, "checkpoints/distill/step_000008.partial/model/a", "lock", "scaling/alive", ".x.1.2"
    )
    RunMirror(address, run, notify=pytest.fail).send()
    shutil.rmtree(run.path)
    said: list[str] = []
    RunMirror(address, run, notify=said.append).fetch()
    assert _tree(run.path) == kept
    assert said == [f"fetching the run from {address}"]


def test_what_changes_is_sent_again_and_what_is_gone_is_removed(run, address) -> None:
    mirror = RunMirror(address, run, notify=pytest.fail)
    mirror.send()
    shutil.rmtree(run.path / STEP)
    later = STEP.replace("4", "8")
    _write(run, f"{later}/manifest.json", f"{later}/model/a")
    _write(run, "metrics.jsonl", text="longer")
    mirror.send()
    kept = _tree(run.path)
    shutil.rmtree(run.path)
    RunMirror(address, run, notify=print).fetch()
    assert _tree(run.path) == kept


@pytest.mark.parametrize("sent", range(5))
def test_a_checkpoint_that_was_sent_in_part_is_none(run, address, monkeypatch, sent: int) -> None:
    """The copying is cut off after each number of files."""
    mirror = RunMirror(address, run, notify=lambda _: None)
    whole, count = mirror._send_file, 0

    def cut_off(name: str) -> bool:
        nonlocal count
        if count == sent:
            raise OSError("the line is cut")
        count += 1
        return whole(name)

    monkeypatch.setattr(mirror, "_send_file", cut_off)
    mirror.send()
    shutil.rmtree(run.path)
    RunMirror(address, run, notify=print).fetch()
    there = {name for name in _tree(run.path) if name.startswith(STEP)} if run.path.exists() else ()
    assert len(there) in (0, 2), "all of it or nothing"


def test_a_run_fetches_only_what_it_has_not(configure, address, tmp_path) -> None:
    config = configure(f"runs_mirror={address}", f"name=run-{os.getpid()}")
    run = RunDirectory(Path(config.runs_directory) / config.name)
    with mirrored(config, run, notify=pytest.fail):
        assert not run.path.exists(), "neither here nor there"
        _write(run, "config.json", text="first")
    _write(run, "config.json", text="second")
    with mirrored(config, run, notify=pytest.fail):
        assert run.config_path.read_text() == "secondconfig.json"
    shutil.rmtree(run.path)
    said: list[str] = []
    with mirrored(config, run, notify=said.append):
        assert run.config_path.read_text() == "secondconfig.json"
    assert said == [f"fetching the run from {address}"]


def test_a_block_that_fails_sends_what_it_left(configure, address) -> None:
    config = configure(f"runs_mirror={address}", f"name=broken-{os.getpid()}")
    run = RunDirectory(Path(config.runs_directory) / config.name)

    def fail() -> None:
        with mirrored(config, run, notify=print):
            _write(run, "config.json", "logs/driver.log")
            raise WorkerError("learner-0 died")

    with pytest.raises(WorkerError):
        fail()
    shutil.rmtree(run.path)
    RunMirror(address, run, notify=print).fetch()
    assert {*_tree(run.path)} == {"config.json", "logs/driver.log"}


def test_without_a_mirror_nothing_happens(configure) -> None:
    with mirrored(configure(), RunDirectory("/nowhere"), notify=pytest.fail):
        pass


def test_a_mirror_that_cannot_be_used_is_refused_before_anything_starts(
    configure, tmp_path
) -> None:
    (tmp_path / "file").write_text("")
    for address, said in (("ftp://x/y", "expected s3://"), (f"file://{tmp_path}/file", "written")):
        config = configure(f"runs_mirror={address}")
        with (
            pytest.raises(ConfigError, match=said),
            mirrored(config, RunDirectory(tmp_path / "runs/run"), notify=print),
        ):
            pytest.fail("it began")


def test_a_fetch_that_fails_says_so(run, address, monkeypatch) -> None:
    mirror = RunMirror(address, run, notify=print)
    mirror.send()
    shutil.rmtree(run.path)

    def refuse(name: str) -> None:
        raise OSError(json.dumps(name))

    monkeypatch.setattr(mirror, "_fetch_file", refuse)
    with pytest.raises(RunStateError, match="could not be fetched"):
        mirror.fetch()

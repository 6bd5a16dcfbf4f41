"""A hub name without a network: from the cache, or told within seconds with the way out."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from tiny_families import save_family

from distill_system import hub
from distill_system.errors import ModelError
from distill_system.hub import require_hub_model


@pytest.fixture(autouse=True)
def _no_trace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An own, empty cache and an own environment for each test."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A stand-in for the hub on this machine; it answers every request with 404."""

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on the terminal."""

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    yield address
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> str:
    """An address of this machine at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    return address


def _cache(folder: Path, name: str) -> Path:
    """Lay a model into the cache as a download does."""
    entry = folder / f"models--{name.replace('/', '--')}"
    snapshot = entry / "snapshots" / ("0" * 40)
    save_family(snapshot, "llama")
    (entry / "refs").mkdir()
    (entry / "refs/main").write_text("0" * 40)
    return snapshot


def test_with_a_network_nothing_is_changed(endpoint: str) -> None:
    assert require_hub_model("owner/model") is None
    assert not constants.HF_HUB_OFFLINE
    assert os.environ["HF_HUB_OFFLINE"] == "0"


def test_without_one_the_model_is_told_with_places_and_ways_out(
    nobody: str, tmp_path: Path
) -> None:
    begin = time.perf_counter()
    with pytest.raises(ModelError) as caught:
        require_hub_model("owner/model")
    assert time.perf_counter() - begin < 5
    message = str(caught.value)
    assert str(Path("owner/model").absolute()) in message
    assert str(tmp_path / "cache") in message
    assert f"{nobody} does not answer" in message
    assert "Give a local folder" in message
    assert "hf download owner/model" in message


def test_a_network_that_never_answers_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "REACH_SECONDS", 0.3)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        begin = time.perf_counter()
        assert not hub.is_hub_reachable()
        assert time.perf_counter() - begin < 5


def test_the_cache_is_read_without_a_network(nobody: str, tmp_path: Path) -> None:
    snapshot = _cache(tmp_path / "cache", "owner/model")
    assert require_hub_model("owner/model") == snapshot
    assert constants.HF_HUB_OFFLINE, "what follows waits for no network"
    assert os.environ["HF_HUB_OFFLINE"] == "1", "nor do the workers"


def test_the_user_may_say_that_there_is_none(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        require_hub_model("owner/model")
    snapshot = _cache(tmp_path / "cache", "owner/model")
    assert require_hub_model("owner/model") == snapshot


@pytest.mark.parametrize("name", ["not a name", "a/b/c", "..", "a--b"])
def test_what_can_be_no_name_is_told_too(nobody: str, name: str) -> None:
    with pytest.raises(ModelError, match="looked for a folder"):
        require_hub_model(name)


def test_transformers_then_reads_the_cache_at_once(tmp_path: Path) -> None:
    """In a process of its own, as a person starts it: no retries, the model is there."""
    _cache(tmp_path / "cache", "owner/model")
    program = (
        "import time, torch; from distill_system.hub import require_hub_model\n"
        "from distill_system.language_model.models import load_language_model\n"
        "begin = time.perf_counter(); require_hub_model('owner/model')\n"
        "load_language_model('owner/model', dtype=torch.float32, device=torch.device('cpu'))\n"
        "print(time.perf_counter() - begin)"
    )
    environment = {name: value for name, value in os.environ.items() if "PROXY" not in name.upper()}
    environment |= {
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_OFFLINE": "0",
    }
    answer = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert float(answer.stdout) < 30, "retries of the hub's client alone take 40 s"
    shutil.rmtree(tmp_path / "cache")

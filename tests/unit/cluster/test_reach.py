"""What answers at an address, told without a cluster: nobody, web servers, silence."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from socket import create_server

import pytest

from distill_system.cluster import reach
from distill_system.cluster.job_client import JobClient
from distill_system.cluster.reach import require_cluster
from distill_system.errors import ResourceError


@contextmanager
def _web_server(code: int, body: str) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def _refusal(ask: Callable[[str], object], address: str) -> str:
    begin = time.monotonic()
    with pytest.raises(ResourceError) as caught:
        ask(address)
    assert time.monotonic() - begin < 10.0
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("code", "body"), [(404, "none"), (200, "<html>"), (200, "{}")])
def test_a_web_server_is_no_dashboard_and_no_cluster(code: int, body: str) -> None:
    with _web_server(code, body) as port:
        said = _refusal(JobClient, f"http://127.0.0.1:{port}")
        assert said.startswith(f"http://127.0.0.1:{port}: a web server answers there")
        joined = _refusal(require_cluster, f"127.0.0.1:{port}")
        assert "speaks HTTP, and a cluster is joined at the port of `ray start --port`" in joined


@pytest.mark.parametrize(("code", "said"), [(401, "asks for a token"), (403, "refuses this token")])
def test_a_dashboard_that_wants_a_token_says_where_one_is_given(code: int, said: str) -> None:
    with _web_server(code, "no") as port:
        assert f"{said}: give the cluster's token: RAY_AUTH_MODE=token with" in _refusal(
            JobClient, f"127.0.0.1:{port}"
        )


def test_another_ray_is_named_beside_ours() -> None:
    with _web_server(200, json.dumps({"ray_version": "1.13.0"})) as port:
        said = _refusal(JobClient, f"127.0.0.1:{port}")
    assert "Ray version 1.13.0 is running on the cluster" in said
    with _web_server(200, json.dumps({"ray_version": "2.9.3"})) as port:
        said = _refusal(JobClient, f"127.0.0.1:{port}")
    assert "the cluster runs Ray 2.9.3, and this version of distill-system runs with Ray 2." in said


def test_nobody_and_a_server_that_is_silent_are_told_apart(monkeypatch) -> None:
    monkeypatch.setattr(reach, "ANSWER_SECONDS", 0.2)
    with create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert "neither gRPC nor HTTP" in _refusal(require_cluster, address)
        assert "neither gRPC nor HTTP" in _refusal(JobClient, address)
    assert "no Ray cluster answers at RAY_ADDRESS=" in _refusal(require_cluster, address)
    assert "no Ray cluster answers at http://" in _refusal(JobClient, address)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://head:10001", "ray:// is Ray Client, through which a run cannot place its workers"),
        ("http://head:8265", "`distill-system submit --address` takes it"),
    ],
)
def test_schemes_that_cannot_be_joined_are_told_before_anything_is_asked(address, said) -> None:
    assert said in _refusal(require_cluster, address)


def test_the_address_given_counts_before_what_the_environment_says(monkeypatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    with _web_server(200, json.dumps({"ray_version": "2.1"})) as port:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:7")
        assert "the cluster runs Ray 2.1" in _refusal(JobClient, f"http://127.0.0.1:{port}")
    with pytest.raises(ResourceError, match=r"answers at http://127\.0\.0\.1:7:"):
        JobClient(None)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    with pytest.raises(ResourceError, match=r"answers at http://127\.0\.0\.1:9:"):
        JobClient(None)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    with pytest.raises(ResourceError, match="expected --address, got none"):
        JobClient(None)


def test_versions_that_differ_are_named_each(monkeypatch) -> None:
    """With the answers of a cluster that stands in for one of another Ray and Python."""
    monkeypatch.setattr(reach, "listen_at", lambda *_: reach.Speech.GRPC)
    monkeypatch.setattr(
        reach,
        "_ask_for_versions",
        lambda *_: {"ray_version": "2.59.0", "python_version": "3.10.1"},
    )
    said = _refusal(require_cluster, "10.0.0.1:6379")
    assert said.startswith(
        "RAY_ADDRESS=10.0.0.1:6379: the cluster runs Ray 2.59.0 and Python 3.10.1, this process Ray"
    )
    assert said.endswith("(`distill-system submit`)")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")  # a job whose --python is another one
    said = _refusal(require_cluster, "10.0.0.1:6379")
    assert said.endswith(
        "name the interpreter with which `ray start` ran there (`submit --python`)"
    )

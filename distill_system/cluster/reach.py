"""What answers at an address, before Ray is asked: Ray itself retries for minutes in silence.

An address in -> nothing, or one sentence within ten seconds: nobody there, another port of the
cluster, a web server, a wrong token, other versions.
"""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import ray
from ray._common.usage.usage_lib import get_cluster_metadata
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._raylet import (  # type: ignore[attr-defined]  # names of its compiled core
    AuthenticationTokenLoader,
    GcsClient,
)
from ray.exceptions import AuthenticationError, RpcError

from distill_system.errors import ResourceError
from distill_system.job_process import is_job

CONNECT_SECONDS = 5.0
"""For a connection to be accepted."""

ANSWER_SECONDS = 2.0
"""For the first bytes of an answer."""

_HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
"""How every gRPC client begins (RFC 9113, 3.4): a preface and an empty SETTINGS frame. A gRPC
server answers with SETTINGS of its own, an HTTP/1 server with a status line."""

_HTTP1_GREETING = b"GET / HTTP/1.0\r\n\r\n"

_SETTINGS = 4

TOKEN_REMEDY = (
    "give the cluster's token: RAY_AUTH_MODE=token with RAY_AUTH_TOKEN_PATH=FILE, RAY_AUTH_TOKEN, "
    "or the file ~/.ray/auth_token (on the head node `ray get-auth-token` prints it)"
)


class Speech(Enum):
    """What a server speaks that accepts connections."""

    GRPC = "gRPC"
    HTTP = "HTTP"
    OTHER = "neither gRPC nor HTTP"


def listen_at(host: str, port: int) -> Speech:
    """What answers at a port.

    Raises: OSError if nobody accepts a connection within CONNECT_SECONDS.
    """
    answer = _say(host, port, _HTTP2_GREETING)
    # A frame's header: three bytes of length, then its type.
    if len(answer) > 3 and answer[3] == _SETTINGS:
        return Speech.GRPC
    if not answer.startswith(b"HTTP/"):  # some web servers answer HTTP/2 without a status line
        answer = _say(host, port, _HTTP1_GREETING)
    return Speech.HTTP if answer.startswith(b"HTTP/") else Speech.OTHER


def _say(host: str, port: int, greeting: bytes) -> bytes:
    """The first bytes of an answer; none if the other side stays silent or closes."""
    with socket.create_connection((host, port), timeout=CONNECT_SECONDS) as connection:
        connection.settimeout(ANSWER_SECONDS)
        try:
            connection.sendall(greeting)
            return connection.recv(9)
        except OSError:
            return b""


def require_joinable() -> None:
    """Where RAY_ADDRESS is set, require_cluster; asked before what takes minutes is read."""
    address = os.environ.get("RAY_ADDRESS")
    if address:
        require_cluster(address)


def require_cluster(address: str) -> None:
    """Check that a cluster of our Ray and Python answers at RAY_ADDRESS and takes our token.

    Raises: ResourceError with what was found there instead, and the remedy.
    """
    require_token_where_asked()
    where = f"RAY_ADDRESS={address}"
    host, _, port = address.rpartition(":")
    if "://" in address:
        raise ResourceError(f"{where}: {_wrong_scheme(address)}")
    if not port.isdigit():
        return  # "auto" and "local": only Ray can resolve those
    try:
        speech = listen_at(host.strip("[]"), int(port))
    except OSError as error:
        raise ResourceError(
            f"no Ray cluster answers at {where}: {error}. Start it, or unset RAY_ADDRESS to start "
            "a local one"
        ) from error
    if speech is not Speech.GRPC:
        raise ResourceError(
            f"{where}: what answers there speaks {speech.value}, and a cluster is joined at the "
            "port of `ray start --port`, usually 6379. The dashboard's port, usually 8265, is for "
            "`distill-system submit --address`"
        )
    _require_same_versions(_ask_for_versions(address, where), where)


def require_token_where_asked() -> None:
    """Refuse token mode without a token: Ray's core ends the process with a stack of its own.

    Raises: ResourceError.
    """
    loader = AuthenticationTokenLoader.instance()
    if is_token_auth_enabled() and not loader.has_token(ignore_auth_mode=True):
        raise ResourceError(f"RAY_AUTH_MODE=token, and no token was found: {TOKEN_REMEDY}")


def _wrong_scheme(address: str) -> str:
    if address.startswith("ray://"):
        return (
            "ray:// is Ray Client, through which a run cannot place its workers; start the run on "
            "a node of the cluster with RAY_ADDRESS=HOST:6379, or send it there with "
            "`distill-system submit --address http://HOST:8265`"
        )
    return (
        "a cluster is joined by HOST:PORT of `ray start --port`, such as 10.0.0.1:6379. An http "
        "address is the dashboard's: `distill-system submit --address` takes it"
    )


def _ask_for_versions(address: str, where: str) -> dict[str, Any]:
    try:
        with _silent_stderr():  # Ray's core writes its warnings there
            return dict(get_cluster_metadata(GcsClient(address=address)))
    except AuthenticationError as error:
        raise ResourceError(f"{where}: the cluster refuses this token; {TOKEN_REMEDY}") from error
    except RpcError as error:
        raise ResourceError(
            f"{where}: what answers there is not a Ray cluster's own port (Ray says: "
            f"{str(error).splitlines()[0]}). It is that of `ray start --port`, usually 6379; 10001 "
            "is Ray Client's"
        ) from error


def _require_same_versions(cluster: dict[str, Any], where: str) -> None:
    ours = {"Ray": ray.__version__, "Python": platform.python_version()}
    theirs = {"Ray": cluster["ray_version"], "Python": cluster["python_version"]}
    differing = [name for name in ours if ours[name] != theirs[name]]
    if differing:
        there = " and ".join(f"{name} {theirs[name]}" for name in differing)
        here = " and ".join(f"{name} {ours[name]}" for name in differing)
        remedy = (
            "name the interpreter with which `ray start` ran there (`submit --python`)"
            if is_job()
            else "install the same on both, or send the run as a job, which runs with the "
            "cluster's Python (`distill-system submit`)"
        )
        raise ResourceError(
            f"{where}: the cluster runs {there}, this process {here}, and Ray joins equal versions "
            f"alone: {remedy}"
        )


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Send what C++ code writes to standard error nowhere, for the length of a block."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)

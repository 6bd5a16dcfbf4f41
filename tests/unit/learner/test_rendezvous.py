from __future__ import annotations

import socket

import pytest

from distill_system.errors import ResourceError
from distill_system.learner import rendezvous
from distill_system.learner.rendezvous import find_rendezvous


def test_the_port_can_be_listened_on_and_reached():
    address, port = find_rendezvous()
    with (
        socket.create_server(("", port)),
        socket.create_connection((address, port), timeout=5) as connection,
    ):
        assert connection.getpeername() == (address, port)


def test_a_port_lies_outside_those_that_the_kernel_gives_to_outgoing_connections():
    ports = [find_rendezvous()[1] for _ in range(20)]
    assert max(ports) < 32_768
    assert len(set(ports)) > 1


def test_a_taken_port_is_passed_over_and_none_left_is_an_error(monkeypatch):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(rendezvous, "PORTS", range(port, port + 1))
        monkeypatch.setattr(rendezvous, "MAX_TRIES", 1)
        with pytest.raises(ResourceError, match="a free port between"):
            find_rendezvous()

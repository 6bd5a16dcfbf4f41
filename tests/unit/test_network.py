from __future__ import annotations

import os
import socket

import pytest

from distill_system import network
from distill_system.errors import ResourceError

VARIABLES = ("GLOO_SOCKET_IFNAME", "DISTILL_SYSTEM_NODE_ADDRESS")
ADDRESSES = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.1.0.5", "10.1.0.6"], "ib0": ["10.2.0.5"]}


@pytest.fixture(autouse=True)
def host(monkeypatch):
    """A host with three interfaces; what a test sets in the environment is taken back."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is put back as it was
        monkeypatch.delenv(name)
    monkeypatch.setattr(network, "_addresses", lambda: ADDRESSES)


def test_gloo_is_told_the_interface_that_holds_the_address_that_ray_knows():
    network.use_node_address("10.1.0.6")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth0"
    assert network.node_address() == "10.1.0.6"
    assert network.transport_address() == "10.1.0.6", "the node's, not the interface's first"


def test_an_interface_that_is_named_stays_and_the_node_is_met_at_its_own_address(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    network.use_node_address("10.1.0.5")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
    assert (network.node_address(), network.transport_address()) == ("10.1.0.5", "10.2.0.5")


def test_an_interface_that_is_not_there_is_told_with_those_that_are(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth1")
    with pytest.raises(ResourceError) as caught:
        network.use_node_address("10.1.0.5")
    for part in ("10.1.0.5", "'eth1'", "cluster.network_interface", "ib0 (10.2.0.5)", "eth0 ("):
        assert part in str(caught.value)


def test_an_address_that_no_interface_holds_leaves_gloo_alone():
    network.use_node_address("203.0.113.9")
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    assert network.transport_address() == "203.0.113.9"


def test_the_interfaces_of_this_host_are_those_that_the_system_lists(monkeypatch):
    monkeypatch.undo()
    assert set(network._addresses()) <= {name for _, name in socket.if_nameindex()}
    assert "127.0.0.1" in network._addresses()["lo"]


def test_workers_are_told_both_libraries_the_same():
    told = network.interface_environment("ib0")
    assert told == {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib0"}
    assert network.interface_environment(None) == {}

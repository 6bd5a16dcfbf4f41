"""This process's network: its node's address, and the interface that gloo and NCCL connect over.

Left alone, gloo takes the address that the host's name resolves to, which on Debian is a loopback
address: two such hosts never meet. So the process that starts a worker says what Ray knows.
"""

from __future__ import annotations

import os
import socket

import psutil

from distill_system.errors import ResourceError

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Read by torch's gloo and by NCCL as a process opens its first connection."""

_ADDRESS_VARIABLE = "DISTILL_SYSTEM_NODE_ADDRESS"
_FAMILIES = (socket.AF_INET, socket.AF_INET6)


def interface_environment(interface: str | None) -> dict[str, str]:
    """Environment variables of workers that are to use this interface; none for None."""
    return {} if interface is None else dict.fromkeys(INTERFACE_VARIABLES, interface)


def use_node_address(address: str) -> None:
    """Say which address this process's node has; gloo is told the interface that holds it.

    An interface that is named already, by cluster.network_interface or by the node's own
    environment, stays.

    Raises: ResourceError if this host has no interface of that name.
    """
    os.environ[_ADDRESS_VARIABLE] = address
    named = os.environ.get(INTERFACE_VARIABLES[0])
    if not named:
        holder = _interface_of(address)
        if holder is not None:  # behind address translation no interface holds it: gloo's own way
            os.environ[INTERFACE_VARIABLES[0]] = holder
        return
    missing = find_missing_interface(named)
    if missing is not None:
        raise ResourceError(
            f"the node {address} ({socket.gethostname()}) has no network interface {missing!r}, "
            f"which cluster.network_interface or {INTERFACE_VARIABLES[0]} names; it has "
            f"{describe_interfaces()}. Name one that every node of the cluster has, or leave "
            "the key out: then each node uses the interface that holds its address"
        )


def find_missing_interface(named: str) -> str | None:
    """The first of these interfaces, names with commas between, that this host does not have."""
    # gloo takes a list of names; what NCCL takes beyond that is NCCL's own to refuse.
    return next((name for name in named.split(",") if name not in _addresses()), None)


def node_address() -> str:
    """The address by which other nodes reach this one: Ray's, where a Ray worker asks.

    Elsewhere that of the route to other networks; loopback without a network.
    """
    if _ADDRESS_VARIABLE in os.environ:
        return os.environ[_ADDRESS_VARIABLE]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address: nothing is sent
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def transport_address() -> str:
    """The address that this process's gloo connections have: of the interface that it was told."""
    named = os.environ.get(INTERFACE_VARIABLES[0])
    if not named:
        return node_address()
    held = _addresses().get(named.split(",")[0], [])
    # An interface may hold several addresses; the node's own says more than the first.
    return node_address() if node_address() in held or not held else held[0]


def describe_interfaces() -> str:
    """Every interface of this host with its addresses, for a message."""
    return ", ".join(
        f"{name} ({' '.join(held) or 'no address'})" for name, held in sorted(_addresses().items())
    )


def _interface_of(address: str) -> str | None:
    """The interface that holds this address."""
    return next((name for name, held in _addresses().items() if address in held), None)


def _addresses() -> dict[str, list[str]]:
    """The IP addresses of each interface that is there."""
    return {
        name: [each.address for each in held if each.family in _FAMILIES]
        for name, held in psutil.net_if_addrs().items()
    }

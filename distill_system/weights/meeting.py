"""Where the processes of one group meet: a store at rank 0, and proof that all reach one another.

gloo says of a peer that it cannot reach only that it timed out, and that after its own deadline,
which is as long as the longest call. So the ranks try one another's addresses first.
"""

from __future__ import annotations

import os
import socket
from contextlib import closing
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it is there

from distill_system.errors import ResourceError
from distill_system.network import (
    INTERFACE_VARIABLES,
    describe_interfaces,
    node_address,
    transport_address,
)

FIRST = 0
"""The rank whose process holds the store."""

MEETING_SECONDS = 60.0
"""For ranks that are all there to come to one address: a connection each."""

PATH_SECONDS = 10.0
"""For one connection between two ranks."""


def meet(
    address: str, port: int, *, rank: int, world_size: int, timeout_seconds: float, group: str
) -> TCPStore:
    """A store that all ranks share; returns when all are there and each has reached each.

    Rank 0 listens at address:port, there alone.
    group: what meets, for messages.
    timeout_seconds: for all to come; also what later waits for a key of the store may take.

    Raises: ResourceError if a rank does not come, or some do not reach one another.
    """
    store = _open_store(
        address, port, rank=rank, world_size=world_size, seconds=timeout_seconds, group=group
    )
    try:
        _prove_paths(store, rank=rank, world_size=world_size, group=group)
    except RuntimeError as error:  # torch's own: a rank has left, or took too long
        raise ResourceError(
            f"{group}: rank {rank} on {node_address()} met the others at {address}:{port} and then "
            f"lost one: {_first_line(error)}. Look for a process of the group that died"
        ) from error
    return store


def _open_store(
    address: str, port: int, *, rank: int, world_size: int, seconds: float, group: str
) -> TCPStore:
    timeout = timedelta(seconds=seconds)
    try:
        if rank != FIRST:
            return TCPStore(address, port, world_size, is_master=False, timeout=timeout)
        # torch would listen on every address of the host.
        listening = _listen(address, port)
        return TCPStore(
            address,
            port,
            world_size,
            is_master=True,
            timeout=timeout,
            master_listen_fd=listening.detach(),  # the store closes it
        )
    except (RuntimeError, OSError) as error:  # torch's DistError is a RuntimeError
        what = f"listen at {address}:{port} and be joined by {world_size - 1} others"
        if rank != FIRST:
            what = f"join rank {FIRST} at {address}:{port}"
        raise ResourceError(
            f"{group}: rank {rank} on {node_address()} could not {what} within {seconds:g} s: "
            f"{_first_line(error)}. {_remedy()}"
        ) from error


def _prove_paths(store: TCPStore, *, rank: int, world_size: int, group: str) -> None:
    """Let every rank connect to every other, where gloo will.

    Raises: ResourceError, on every rank, with what each rank could not reach.
    """
    own = transport_address()
    with closing(_listen(own, 0)) as listening:
        store.set(f"path/{rank}", f"{own} {listening.getsockname()[1]}")
        store.set(f"tried/{rank}", _find_unreached(store, rank, world_size))
        # Also keeps this rank's socket open until everyone has tried it.
        tried = [store.get(f"tried/{other}").decode() for other in range(world_size)]
    if not any(tried):
        return
    store.set(f"read/{rank}", "")
    if rank == FIRST:  # the others have read it before the store goes with this process
        store.wait([f"read/{other}" for other in range(world_size)])
    raise ResourceError(
        f"{group}: its ranks do not reach one another: {'; '.join(filter(None, tried))}. "
        f"{_remedy()}"
    )


def _find_unreached(store: TCPStore, rank: int, world_size: int) -> str:
    """The first rank that this one could not connect to, and why; empty if it reached all."""
    for other in range(world_size):
        address, port = store.get(f"path/{other}").decode().split()
        try:
            socket.create_connection((address, int(port)), timeout=PATH_SECONDS).close()
        except OSError as error:
            here = f"rank {rank} on {node_address()}"
            return f"{here} tried rank {other} at {address}: {error}"
    return ""


def _listen(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=socket.SOMAXCONN)


def _remedy() -> str:
    chosen = os.environ.get(INTERFACE_VARIABLES[0], "no interface by name")
    return (
        f"This host uses {chosen} and has {describe_interfaces()}. Set cluster.network_interface "
        "to the one that connects the nodes, and let their firewalls pass connections among them"
    )


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0] or type(error).__name__

"""Where the processes of one group meet: a store at rank 0, and proof that all reach one another.

gloo says of a peer that it cannot reach only that it timed out, and that after its own deadline,
which is as long as the longest call. So the ranks try one another's addresses first.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it is there

from distill_system.errors import ResourceError
from distill_system.network import (
    INTERFACE_VARIABLES,
    describe_interfaces,
    node_address,
    transport_address,
)

PATH_SECONDS = 10.0
"""For one connection between two ranks."""


def open_store(*, address: str, port: int, timeout_seconds: float) -> TCPStore:
    """What the members of a group find one another by; it listens at this address alone.

    It ends when the result is dropped. If some still join, their wait ends with it: one of them may
    be gone for ever.

    Raises: ResourceError if this host cannot listen there.
    """
    try:
        # torch would listen on every address of the host.
        listening = _listen(address, port)
    except OSError as error:
        raise ResourceError(
            f"a rank could not listen at {address}:{port}: {error}; its host has "
            f"{describe_interfaces()}. Start Ray with the --node-ip-address of one of these"
        ) from error
    return TCPStore(
        address,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_seconds),
        master_listen_fd=listening.detach(),  # the store closes it
    )


def join_store(
    address: str, port: int, *, rank: int, world_size: int, timeout_seconds: float, group: str
) -> TCPStore:
    """The store at address:port; returns when all ranks are there and each has reached each.

    group: what meets, for messages.
    timeout_seconds: for each rank to come; also what later waits for a key of the store may take.

    Raises: ResourceError if a rank does not come or leaves again, or some do not reach one another.
    """
    here = f"{group}: rank {rank} on {node_address()}"
    with _said_of(f"{here} could not join the others at {address}:{port}: "):
        store = TCPStore(
            address,
            port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_seconds),
        )
    with _said_of(f"{here} joined the others at {address}:{port}, and one did not come or left: "):
        _prove_paths(store, rank=rank, world_size=world_size, group=group)
    return store


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
    # The others have read it, too, before the store goes with the process that holds it.
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


@contextmanager
def _said_of(what: str) -> Iterator[None]:
    """Say what torch's own error is of."""
    try:
        yield
    except RuntimeError as error:  # torch's DistError is one
        first_line = str(error).split("\n", 1)[0]
        raise ResourceError(f"{what}{first_line}. {_remedy()}") from error


def _listen(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=socket.SOMAXCONN)


def _remedy() -> str:
    chosen = os.environ.get(INTERFACE_VARIABLES[0], "no interface by name")
    return (
        "If no process of the group died, look at the network: this host uses "
        f"{chosen} and has {describe_interfaces()}. Set cluster.network_interface to the one that "
        "connects the nodes, and let their firewalls pass connections among them"
    )

"""Where others meet a rank: its node's address and a port that is free on it."""

from __future__ import annotations

import random
import socket

from distill_system.errors import ResourceError
from distill_system.network import node_address

PORTS = range(20_000, 32_000)
"""Below the ports that Linux gives to outgoing connections (32768 and up) and above those of Ray's
own workers: one of those that is free now could be taken before the others arrive."""
MAX_TRIES = 100


def find_rendezvous() -> tuple[str, int]:
    """This node's address and a port that is free there.

    Raises: ResourceError if no port was free in MAX_TRIES tries.
    """
    address = node_address()
    # Not the run's seed: two runs of one seed on one machine must not meet at one port.
    for port in random.SystemRandom().sample(PORTS, MAX_TRIES):
        if _is_free(address, port):
            return address, port
    raise ResourceError(
        f"a rank needs a free port between {PORTS.start} and {PORTS.stop - 1} for the "
        f"others to meet at; {MAX_TRIES} were tried at {address} and all were taken"
    )


def _is_free(address: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True

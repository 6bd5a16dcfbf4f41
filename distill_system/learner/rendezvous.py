"""Where others meet a learner rank: its host's address and a port that is free on it."""

from __future__ import annotations

import random
import socket

from distill_system.errors import ResourceError

PORTS = range(20_000, 32_000)
"""Below the ports that Linux gives to outgoing connections (32768 and up) and above those of Ray's
own workers: one of those that is free now could be taken before the others arrive."""
MAX_TRIES = 100


def find_rendezvous() -> tuple[str, int]:
    """This host's address and a free port.

    Raises: ResourceError if no port was free in MAX_TRIES tries.
    """
    # Not the run's seed: two runs of one seed on one machine must not meet at one port.
    for port in random.SystemRandom().sample(PORTS, MAX_TRIES):
        if _is_free(port):
            return _host_address(), port
    raise ResourceError(
        f"a learner rank needs a free port between {PORTS.start} and {PORTS.stop - 1} for the "
        f"others to meet at; {MAX_TRIES} were tried on {socket.gethostname()} and all were taken"
    )


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _host_address() -> str:
    """The address by which other machines reach this one; loopback without a network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address: nothing is sent
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"

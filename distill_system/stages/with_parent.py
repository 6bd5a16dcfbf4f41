"""Runs a command that ends with the process that started it, however that one ends.

    python with_parent.py PARENT COMMAND...

PARENT: the id of the process that starts this. The command takes this process's place, and gets
SIGTERM when the parent is gone. A file of its own, since it imports nothing of the package.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""linux/prctl.h; it stays over an exec."""


def main() -> None:
    """Ask the kernel for the signal, then become the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it was gone before we asked
        sys.exit(128 + signal.SIGTERM)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()

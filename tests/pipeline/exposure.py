"""What others could reach or read of a run: its listening sockets, secrets in what it writes."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
from pipeline.command_line import Run

SECRETS = {
    "HF_TOKEN": "hf_planted0secret0of0the0hub",
    "WANDB_API_KEY": "planted0secret0of0the0tracker0000000000",
    "RAY_AUTH_TOKEN": "planted0secret0of0the0cluster",
    "RAY_AUTH_MODE": "token",
}
"""An environment as a person has it; the values stand nowhere else."""


def listening(run: Run) -> dict[str, set[str]]:
    """The addresses on which the run's processes listen now, by process title."""
    titles = {process.pid: _title(process) for process in run.processes()}
    found: dict[str, set[str]] = {}
    for socket in psutil.net_connections("inet"):
        if socket.pid in titles and socket.status == psutil.CONN_LISTEN:
            found.setdefault(titles[socket.pid], set()).add(socket.laddr.ip)
    return found


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches the address; IPv4 may be written as IPv6."""
    parsed = ipaddress.ip_address(address)
    inner = getattr(parsed, "ipv4_mapped", None)
    return bool((inner or parsed).is_loopback)


def session_folders(run: Run) -> set[Path]:
    """Ray's own folders of the run, with its logs."""
    lines = [" ".join(process.cmdline()) for process in run.processes()]
    return {Path(match[1]) for line in lines for match in re.finditer(r"session.dir=(\S+)", line)}


def planted() -> dict[str, str]:
    """The values of SECRETS that must stand nowhere, by variable."""
    return {name: value for name, value in SECRETS.items() if "planted" in value}


def files_with_secrets(folders: Iterable[Path]) -> Iterator[str]:
    """file: variable, for every planted value in a file below these folders."""
    for folder in folders:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            text = file.read_bytes()
            yield from (f"{file}: {n}" for n, value in planted().items() if value.encode() in text)


def _title(process: psutil.Process) -> str:
    words = process.cmdline() or [process.name()]
    script = next((word for word in words[1:] if word.endswith(".py")), words[0])
    return words[0] if words[0].startswith("ray::") else Path(script).name

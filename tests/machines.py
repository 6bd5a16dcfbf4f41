"""Machines on this machine: network, host name, processes and shared memory of their own.

Each is a set of Linux namespaces behind a switch of its own (`ip netns`, a veth pair, a bridge), so
that Ray's nodes on them meet as on a real network: by address, with no loopback in common, and with
cables that can be pulled. Files are shared, as on a cluster with a shared file system. Needs root.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import psutil

SUBNET = "10.213.0"
RAY_PORT = 6379
PREFIX = "distill"
START_SECONDS = 60.0

INIT = """
set -e
mount -t tmpfs tmpfs /dev/shm
mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray
hostname {name}
printf '127.0.0.1 localhost\\n127.0.1.1 {name}\\n' > /dev/shm/hosts
mount --bind /dev/shm/hosts /etc/hosts
echo ready
while true; do sleep 3600 & wait $!; done
"""
"""The first process of a machine. A name that resolves to a loopback address is Debian's way."""


@cache
def are_allowed() -> bool:
    """Whether this process may make namespaces."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "nsenter", "setpriv", "unshare"))):
        return False
    tried = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "true"]
    return subprocess.run(tried, capture_output=True).returncode == 0


@dataclass
class Machine:
    """One machine; its processes end with its first."""

    name: str
    address: str
    switch: str
    port: str
    init: subprocess.Popen[str] = field(repr=False)

    def command(self, *arguments: object) -> list[str]:
        """The command line that runs `arguments` on this machine."""
        return ["nsenter", "--all", "--wdns=.", f"--target={self.first}", *map(str, arguments)]

    def run(
        self,
        *arguments: object,
        seconds: float = START_SECONDS,
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """What a command on this machine prints; fails with both outputs if it fails."""
        done = subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            timeout=seconds,
            env={**os.environ, **(environment or {})},
        )
        assert done.returncode == 0, f"{arguments} on {self.name}:\n{done.stdout}{done.stderr}"
        return done.stdout

    def processes(self) -> list[psutil.Process]:
        """Every process on this machine."""
        return [p for p in psutil.process_iter() if self.holds(p.pid)]

    def holds(self, pid: int) -> bool:
        """Whether a process, by its id outside, is on this machine."""
        return _namespace(pid) == self._namespace

    def unplug(self) -> None:
        """Nothing reaches this machine, and nothing leaves it."""
        _ip("-n", self.switch, "link", "set", self.port, "down")

    def plug(self) -> None:
        """The cable is back."""
        _ip("-n", self.switch, "link", "set", self.port, "up")

    def power_off(self) -> None:
        """End every process at once."""
        with suppress(psutil.NoSuchProcess):
            psutil.Process(self.first).kill()  # a namespace's process 1 takes all with it
        self.init.kill()
        self.init.communicate()

    @cached_property
    def _namespace(self) -> str:
        return os.readlink(f"/proc/{self.first}/ns/pid")

    @cached_property
    def first(self) -> int:
        """The process id, outside, of the machine's own process 1: the child of unshare."""
        [first] = psutil.Process(self.init.pid).children()
        return int(first.pid)


class Network:
    """Machines behind one switch."""

    def __init__(self) -> None:
        self.machines: list[Machine] = []
        self._namespaces: list[str] = []
        self._switch = self._add_namespace("switch")
        _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._switch, "address", "add", f"{SUBNET}.254/24", "dev", "bridge")
        _ip("-n", self._switch, "link", "set", "bridge", "up")

    def add_machine(self) -> Machine:
        """Start one more; it has the interfaces lo, eth0, and `apart`, which leads nowhere."""
        number = len(self.machines) + 1
        name, address = f"machine-{number}", f"{SUBNET}.{number}"
        namespace, port = self._add_namespace(str(number)), f"port{number}"
        _ip(
            *("-n", namespace, "link", "add", "eth0", "type", "veth"),
            *("peer", "name", port, "netns", self._switch),
        )
        _ip("-n", self._switch, "link", "set", port, "master", "bridge", "up")
        _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", namespace, "link", "set", "eth0", "up")
        _ip("-n", namespace, "route", "add", "default", "via", f"{SUBNET}.254")
        # Its other end is on no bridge.
        _ip(
            *("-n", namespace, "link", "add", "apart", "type", "veth"),
            *("peer", "name", f"apart{number}", "netns", self._switch),
        )
        _ip("-n", self._switch, "link", "set", f"apart{number}", "up")
        _ip("-n", namespace, "address", "add", f"10.214.{number}.1/24", "dev", "apart")
        _ip("-n", namespace, "link", "set", "apart", "up")
        init = subprocess.Popen(
            [
                # Ends with this process, however that ends.
                *("setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", namespace),
                *("unshare", "--mount", "--uts", "--ipc"),
                *("--pid", "--fork", "--mount-proc", "--kill-child"),
                *("bash", "-c", INIT.format(name=name)),
            ],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        machine = Machine(name, address, self._switch, port, init)
        self.machines.append(machine)
        assert init.stdout is not None
        assert init.stdout.readline() == "ready\n", f"{name} did not start"
        return machine

    def close(self) -> None:
        """End every machine, and take the network down."""
        for machine in self.machines:
            if machine.init.poll() is None:
                machine.power_off()
        for namespace in self._namespaces:
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)

    def _add_namespace(self, name: str) -> str:
        whole = f"{PREFIX}-{os.getpid()}-{name}"
        _ip("netns", "add", whole)
        self._namespaces.append(whole)
        return whole


@contextmanager
def network() -> Iterator[Network]:
    """A network without machines; nothing of it is left afterwards."""
    _sweep()
    made = Network()
    try:
        yield made
    finally:
        made.close()


class RayNodes:
    """A Ray cluster of one node a machine; the first is its head, where drivers run."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.nodes: list[Machine] = []
        self._kinds: list[tuple[int, dict[str, float]]] = []

    @property
    def head(self) -> Machine:
        """The machine of the head node."""
        return self.nodes[0]

    @property
    def environment(self) -> dict[str, str]:
        """What a driver on the head needs to join."""
        return {"RAY_ADDRESS": f"{self.head.address}:{RAY_PORT}"}

    def add(
        self,
        *,
        cpus: int,
        resources: Mapping[str, float] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Machine:
        """Start a node on a new machine.  environment: of Ray's own processes there."""
        machine = self.network.add_machine()
        self.nodes.append(machine)
        self._kinds.append((cpus, dict(resources or {})))
        self.begin(machine, environment=environment)
        return machine

    def begin(self, machine: Machine, *, environment: Mapping[str, str] | None = None) -> None:
        """Start Ray on a machine on which it does not run, or no more."""
        cpus, resources = self._kinds[self.nodes.index(machine)]
        where = ["--head", f"--port={RAY_PORT}", "--include-dashboard=false"]
        if machine is not self.head:
            where = [f"--address={self.head.address}:{RAY_PORT}"]
        machine.run(
            *(sys.executable, "-m", "ray.scripts.scripts", "start", *where),
            *(f"--num-cpus={cpus}", f"--resources={json.dumps(resources)}"),
            *("--object-store-memory=100000000", "--disable-usage-stats"),
            environment=environment,
        )

    def replace(self, machine: Machine) -> Machine:
        """End a node with its machine, and start another of its kind."""
        at = next(at for at, node in enumerate(self.nodes) if node is machine)
        machine.power_off()
        del self.nodes[at]
        cpus, resources = self._kinds.pop(at)
        return self.add(cpus=cpus, resources=resources)

    def processes(self) -> list[psutil.Process]:
        """Every process on the nodes' machines."""
        return [process for machine in self.nodes for process in machine.processes()]

    def status(self) -> str:
        """What `ray status` prints."""
        ray = [sys.executable, "-m", "ray.scripts.scripts", "status"]
        return self.head.run(*ray, environment=self.environment)


@contextmanager
def ray_nodes(*wanted: Mapping[str, Any]) -> Iterator[RayNodes]:
    """A Ray cluster of one node for each of these; see RayNodes.add for what they may hold."""
    with network() as made:
        nodes = RayNodes(made)
        for one in wanted:
            nodes.add(**one)
        yield nodes


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {shlex.join(arguments)}: {done.stderr}"


def _namespace(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None  # it has ended


def _sweep() -> None:
    """Take down what a process left that was killed before it could."""
    folder = Path("/run/netns")
    for path in folder.glob(f"{PREFIX}-*") if folder.exists() else []:
        owner = int(path.name.split("-")[1])
        if not psutil.pid_exists(owner):
            subprocess.run(["ip", "netns", "delete", path.name], capture_output=True)

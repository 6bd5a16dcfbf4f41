"""Ranks on hosts whose names resolve to a loopback address, on networks of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from machines import are_allowed, network

ROOT = Path(__file__).parents[3]
PORT = 23_456

RANK = """
import json, os, sys
import psutil, torch
from distill_system.errors import ResourceError
from distill_system.network import use_node_address
from distill_system.weights import meeting
from distill_system.weights.communicator import GlooCommunicator

meeting.PATH_SECONDS = 1.0
stores = []
rank, first, own, port = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])


def join(interface, port):
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    if interface:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    try:
        use_node_address(own)
        if rank == 0:
            stores.append(meeting.open_store(address=first, port=port, timeout_seconds=30.0))
        return GlooCommunicator(
            address=first, port=port, rank=rank, world_size=2, timeout_seconds=30.0
        )
    except ResourceError as error:
        return str(error)


told = {interface: join(interface, port + at) for at, interface in enumerate(("apart", "eth7"), 1)}
group = join(None, port)
listening = [c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN"]
numbers = torch.arange(5) if rank == 0 else torch.zeros(5, dtype=torch.int64)
group.broadcast(numbers, src=0).wait()
print(json.dumps({"told": told, "listening": listening, "numbers": numbers.tolist()}))
"""


@pytest.mark.skipif(not are_allowed(), reason="needs to make network namespaces")
def test_ranks_meet_on_the_nodes_own_network_and_say_which_other_does_not_connect_them() -> None:
    with network() as made:
        machines = [made.add_machine() for _ in range(2)]
        first = machines[0].address
        began = [
            subprocess.Popen(
                machine.command(
                    *(sys.executable, "-c", RANK, rank, first, machine.address, PORT),
                ),
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            for rank, machine in enumerate(machines)
        ]
        answers = [json.loads(process.communicate(timeout=120)[0]) for process in began]
    for rank, answer in enumerate(answers):
        assert answer["numbers"] == [0, 1, 2, 3, 4]
        assert set(answer["listening"]) == {machines[rank].address}, "and on no other address"
        assert "no network interface 'eth7'" in answer["told"]["eth7"]
        for other in (0, 1):
            tried = f"rank {other} on {machines[other].address} tried rank {1 - other} at 10.214."
            assert tried in answer["told"]["apart"]
        assert "cluster.network_interface" in answer["told"]["apart"]

"""A run over two nodes, each with a network, a host name and processes of its own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from machines import Machine, are_allowed, ray_nodes
from pipeline.command_line import Run, wait_until, write_configuration

from distill_system.observe import RunDirectory
from distill_system.observe.metrics import MetricRow, read_metrics

Launch = Callable[..., Run]

pytestmark = pytest.mark.skipif(not are_allowed(), reason="needs to make network namespaces")

# A rank takes more than half of a node, and a node has one seat: one rank and one of the student's
# workers stand on each, so that weights travel between nodes whoever is rank 0.
POOLS = {
    "student_rollout": {"count": 2, "cpus": 0.1, "custom_resources": {"seat": 1}},
    "teacher_rollout": {"cpus": 0.1, "custom_resources": {"far": 1}},
    "teacher_scoring": {"cpus": 0.1, "custom_resources": {"near": 1}},
    "learner": {"count": 2, "cpus": 0.6},
}


def test_a_run_waits_for_a_node_and_spreads_over_both(
    launch: Launch, tmp_path: Path, tiny_model_folder: Callable[..., Path]
) -> None:
    path = write_configuration(
        tmp_path, tiny_model_folder(seed=1), tiny_model_folder(seed=2, num_layers=1)
    )
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pools": POOLS}))
    folder = RunDirectory(tmp_path / "run")
    with ray_nodes({"cpus": 1, "resources": {"near": 1, "seat": 1}}) as nodes:
        run = launch("train", path, machine=nodes.head, environment=nodes.environment)
        wait_until(lambda: "'far': 1.0" in nodes.status(), run)  # what an autoscaler would see
        assert not _rows(folder)
        second = nodes.add(cpus=1, resources={"far": 1, "seat": 1})
        wait_until(lambda: _rows(folder), run)
        assert _workers(nodes.head) == {"Learner": 1, "RolloutWorker": 1, "TeacherScorer": 1}
        assert _workers(second) == {"Learner": 1, "RolloutWorker": 2}
        run.finish()
    assert run.code == 0, run.stderr
    rows = _rows(folder)
    assert [row.step for row in rows] == [0, 1, 2, 3]
    assert max(row.metrics.get("held_out/max_logprob_gap", 0.0) for row in rows) < 1e-4
    assert (folder.path / "student/model.safetensors").exists()


def _rows(folder: RunDirectory) -> list[MetricRow]:
    return read_metrics(folder) if folder.metrics_path.exists() else []


def _workers(machine: Machine) -> Counter[str]:
    """How many workers of each class stand on a machine."""
    titles = ["".join(process.cmdline()[:1]) for process in machine.processes()]
    kinds = ("Learner", "RolloutWorker", "TeacherScorer")
    return Counter(kind for title in titles for kind in kinds if title.startswith(f"ray::{kind}"))

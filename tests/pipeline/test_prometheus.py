"""What the metric log writes stands on Ray's Prometheus endpoint."""

from __future__ import annotations

import time
import urllib.request

import pytest
import ray

from distill_system.observe import MetricLog, RunDirectory

DEADLINE_SECONDS = 90


@pytest.fixture
def metrics_url():
    context = ray.init(
        address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, namespace="test"
    )
    try:
        yield f"http://127.0.0.1:{context.address_info['metrics_export_port']}/metrics"
    finally:
        ray.shutdown()


def test_metrics_of_a_run_stand_on_rays_endpoint_with_run_and_stage(metrics_url, tmp_path):
    with MetricLog(RunDirectory(tmp_path), run_name="night") as log:
        log.log("distill", 3, {"learner/loss": 0.125, "held_out/on_policy_distance": 0.5})
        deadline = time.monotonic() + DEADLINE_SECONDS
        page = ""
        while "ray_distill_held_out_on_policy_distance" not in page:
            assert time.monotonic() < deadline, page[-2000:]
            time.sleep(1)
            page = urllib.request.urlopen(metrics_url, timeout=10).read().decode()
    [line] = [line for line in page.splitlines() if line.startswith("ray_distill_learner_loss{")]
    assert 'run="night"' in line.lower()
    assert 'stage="distill"' in line.lower()
    assert float(line.rsplit(" ", 1)[1]) == 0.125

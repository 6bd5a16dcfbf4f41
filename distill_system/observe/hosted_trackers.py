"""Weights & Biases, MLflow and Trackio as trackers; each library is imported when it is opened.

Where a server stands and who may write to it is the libraries' own environment (WANDB_API_KEY,
MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID and so on): no key of the configuration holds a secret. A
run that goes on in another process is the same run there.
"""

from __future__ import annotations

import io
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

from distill_system.observe.recorded import flatten, read_config, read_trackers
from distill_system.observe.run_directory import RunDirectory, write_json

PROJECT = "distill-system"
"""Of a run where the environment names no other."""


class HostedTracker(ABC):
    """A run in another system: opened once, found again by what was kept of it.

    run: its folder, in which tracking.json keeps identity and address.  name: the run's.
    """

    title: str
    """The tracker's name in the configuration."""
    _run: Any
    """The library's own run, in those that have one to log to and to finish."""

    def __init__(self, run: RunDirectory, name: str) -> None:
        self.folder, self.name, self.config = run.path, name, read_config(run)
        kept = read_trackers(run)
        identity = self._open(kept.get(self.title, {}))
        write_json(run.trackers_path, {**kept, self.title: identity})

    @abstractmethod
    def _open(self, kept: Mapping[str, Any]) -> dict[str, Any]:
        """Begin the run there, or go on with it.

        kept: what this returned before; empty at first.
        Returns: what is kept: `id`, and `url`, where a person sees the run.
        """

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Add a row; each stage counts its own steps, in <stage>/step."""
        named = {f"{stage}/{name}": value for name, value in values.items()}
        self._run.log({**named, f"{stage}/step": step})

    def truncate_after(self, stage: str, step: int) -> None:  # noqa: B027  (there is no taking back)
        """See Tracker: what was sent stays there, and later steps stand there twice."""

    def close(self) -> None:
        """Wait until what is left is written."""
        self._run.finish()


class WandbTracker(HostedTracker):
    """Weights & Biases; WANDB_MODE=offline writes to the run's folder, for `wandb sync`."""

    title = "wandb"

    def _open(self, kept: Mapping[str, Any]) -> dict[str, Any]:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=self.name,
            id=kept.get("id"),
            resume="allow",
            config=self.config,
            dir=str(self.folder),
            # The live view is ours to draw; code and git say nothing that environment.json does not
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, disable_code=True
            ),
        )
        self._stages: set[str] = set()
        return {"id": self._run.id, "url": None if self._run.offline else self._run.url}

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """As others, once Weights & Biases knows which step the stage's metrics are shown over."""
        if stage not in self._stages:
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._stages.add(stage)
        super().log(stage, step, values)


class MlflowTracker(HostedTracker):
    """MLflow: a server, or a local store, by MLFLOW_TRACKING_URI."""

    title = "mlflow"

    def _open(self, kept: Mapping[str, Any]) -> dict[str, Any]:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self._client.create_experiment(experiment)
        if kept.get("id"):
            self._id: str = kept["id"]
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._client.create_run(number, run_name=self.name).info.run_id
            self._client.log_dict(self._id, self.config, "config.json")
            for key, value in flatten(self.config).items():
                self._client.log_param(self._id, _allowed(key), str(value)[:500])
        address = str(self._client.tracking_uri)
        served = address.startswith("http")
        url = f"{address.rstrip('/')}/#/experiments/{number}/runs/{self._id}" if served else address
        return {"id": self._id, "url": url}

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Add the metrics of a step in one call."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [
            Metric(_allowed(f"{stage}/{name}"), value, now, step) for name, value in values.items()
        ]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self._id)


class TrackioTracker(HostedTracker):
    """Trackio: a local store, or a Hugging Face Space by TRACKIO_SPACE_ID."""

    title = "trackio"

    def _open(self, kept: Mapping[str, Any]) -> dict[str, Any]:
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        space = os.environ.get("TRACKIO_SPACE_ID")
        with redirect_stdout(io.StringIO()):  # it explains itself at length
            self._run = trackio.init(
                project=project,
                name=self.name,
                space_id=space,
                config=self.config,
                resume="allow",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )
        served = f"https://huggingface.co/spaces/{space}"
        return {"id": self.name, "url": served if space else f"trackio show --project {project}"}

    def close(self) -> None:
        """Wait until what is left is written."""
        with redirect_stdout(io.StringIO()):
            super().close()


HOSTED: dict[str, type[HostedTracker]] = {
    tracker.title: tracker for tracker in (WandbTracker, MlflowTracker, TrackioTracker)
}


def _allowed(key: str) -> str:
    """A name as MLflow takes it."""
    return re.sub(r"[^\w\-. /]", "_", key)

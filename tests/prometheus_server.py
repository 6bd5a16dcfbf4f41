"""A real Prometheus on this machine, with the configuration that deploy/ ships."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

DEPLOYED = Path(__file__).parents[1] / "deploy/prometheus"

STARTED_SECONDS = 60


class Prometheus:
    """Answers queries about what it has scraped."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, **arguments: str) -> Any:
        """What its API answers, under `data`."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(arguments)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{arguments}: {error.read().decode()}") from error

    def query(self, query: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of every series of an instant query."""
        result = self.ask("query", query=query)["result"]
        return [(each["metric"], float(each["value"][1])) for each in result]


@contextmanager
def started_prometheus(folder: Path, discovery_file: str | Path) -> Iterator[Prometheus]:
    """Prometheus in a folder, for the length of a block; it scrapes and judges once a second.

    discovery_file: where Ray writes its nodes' addresses.
    """
    config = _quickened(yaml.safe_load((DEPLOYED / "prometheus.yaml").read_text("utf-8")))
    [files] = config["scrape_configs"][0]["file_sd_configs"]
    files["files"] = [str(discovery_file)]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config), "utf-8")
    shutil.copy(DEPLOYED / "alerts.yaml", folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait_until_ready(process, f"http://{address}/-/ready", folder / "log")
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        process.wait(timeout=STARTED_SECONDS)


def _quickened(config: Mapping[str, Any]) -> dict[str, Any]:
    often = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    return {**config, "global": {**config["global"], **often}}


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + STARTED_SECONDS
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            said = log.read_text("utf-8", errors="replace")
            assert process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.1)

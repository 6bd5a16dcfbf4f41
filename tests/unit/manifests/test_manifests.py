"""What `distill-system manifests` prints, against KubeRay's schema and the run's own needs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from typer.main import get_command
from typer.testing import CliRunner

from distill_system.cli import app
from distill_system.cluster import pools_demand
from distill_system.cluster.placement import bundle_of
from distill_system.config import RunConfig, load_config
from distill_system.errors import ConfigError, ResourceError
from distill_system.manifests import ManifestRequest
from distill_system.manifests.kuberay import kubernetes_name
from distill_system.stages.manifests import render_manifests

SCHEMA = json.loads((Path(__file__).parent / "kuberay_schema.json").read_text(encoding="utf-8"))
QUICKSTART = Path(__file__).parents[3] / "configs/quickstart.yaml"
GIVEN = dict.fromkeys(
    ("student_rollout", "teacher_rollout", "teacher_scoring", "learner", "evaluation"), 4.0
)
"""Memory of every pool's pods, where a test is not about it: nothing is planned then."""


GPUS = (
    "pools.student_rollout={count: 4, min_count: 2, max_count: 8, cpus: 4, gpus: 1}",
    "pools.teacher_rollout={count: 2, cpus: 8, gpus: 2, custom_resources: {big_memory: 1.5}}",
    "pools.teacher_scoring={count: 3, max_count: 5, cpus: 4, gpus: 0.5}",
    "pools.learner={count: 4, cpus: 8, gpus: 1}",
    "learner.shard_ranks=2",
    "rollout.student_engine.dtype=bfloat16",
    "distill.student_prompts_per_step=64",
    "pools.evaluation={count: 1, cpus: 2, gpus: 1}",
)
SHARED_GPU = tuple(
    f"pools.{name}={{cpus: 1, gpus: 0.25}}"
    for name in ("student_rollout", "teacher_rollout", "teacher_scoring", "learner")
)
COLOCATED = (
    "pools.teacher_rollout={count: 2, cpus: 2, gpus: 0.5}",
    "pools.teacher_scoring={count: 2, cpus: 2, gpus: 0.5, colocate_with: teacher_rollout}",
    "pools.student_rollout={count: 1, cpus: 2, gpus: 1}",
    "pools.learner={count: 1, cpus: 2, gpus: 1}",
)
EVERYTHING = {
    "secrets": ("hub-token", "tracker"),
    "token_secret": "ray-token",
    "redis_address": "redis:6379",
    "redis_secret": "redis-password",
}
RUNS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "quickstart": ((), {}),
    "gpus": (GPUS, EVERYTHING),
    "shared_gpu": (SHARED_GPU, {"memory_gib": {"shared_gpu": 16.0}}),
    "colocated": (COLOCATED, {"kind": "cluster"}),
}


@dataclass(frozen=True)
class Rendered:
    """What one call of `distill-system manifests` printed."""

    objects: list[dict[str, Any]]

    def of(self, kind: str) -> dict[str, Any]:
        [found] = [each for each in self.objects if each["kind"] == kind]
        return found

    @property
    def cluster(self) -> dict[str, Any]:
        """The spec of the Ray cluster."""
        kinds = {each["kind"]: each for each in self.objects}
        return (
            kinds["RayJob"]["spec"]["rayClusterSpec"]
            if "RayJob" in kinds
            else (kinds["RayCluster"]["spec"])
        )

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        """The groups of worker pods by name."""
        return {group["groupName"]: group for group in self.cluster["workerGroupSpecs"]}


@pytest.fixture(scope="module")
def render() -> Callable[..., Rendered]:
    """render(*overrides, **fields): the quickstart with overrides; memory is given, not planned.

    fields: of the ManifestRequest, and memory_gib, workers_per_pod, device_gib.
    """

    def call(*overrides: str, memory_gib=None, workers_per_pod=None, device_gib=80.0, **fields):
        config = load_config([QUICKSTART], overrides)
        pools = config.pools.by_name
        known = {name: GIVEN[name] for name in pools if pools[name].colocate_with is None}
        text = render_manifests(
            config,
            ManifestRequest(**{"image": "registry/distill:1", "storage_claim": "runs", **fields}),
            memory_gib=known if memory_gib is None else memory_gib,
            workers_per_pod=workers_per_pod or {},
            device_gib=device_gib,
        )
        return Rendered(list(yaml.safe_load_all(text)))

    return call


Render = Callable[..., Rendered]


def test_a_scorers_ranks_stand_in_one_pod_up_to_a_nodes_gpus(render: Render) -> None:
    def pods(ranks: int) -> tuple[int, int, str, str]:
        shared = render(
            "pools.teacher_scoring={count: 3, max_count: 5, cpus: 2, gpus: 1}",
            f"scoring.shard_ranks={ranks}",
        ).groups["teacher-scoring"]
        limits = shared["template"]["spec"]["containers"][0]["resources"]["limits"]
        return shared["replicas"], shared["maxReplicas"], limits["nvidia.com/gpu"], limits["cpu"]

    assert pods(4) == (3, 5, "4", "8")
    assert pods(16) == (6, 10, "8", "16")


# ---- the schema of the custom resources ----------------------------------------------------------


def _faults(thing: Mapping[str, Any]) -> list[str]:
    schema = {**SCHEMA, "$ref": f"#/$defs/{thing['kind']}"}
    found = jsonschema.Draft202012Validator(schema).iter_errors(thing)
    return [f"{'.'.join(map(str, fault.absolute_path))}: {fault.message}" for fault in found]


@pytest.mark.parametrize("run", RUNS)
def test_the_objects_are_what_kuberay_takes(render: Render, run: str) -> None:
    overrides, fields = RUNS[run]
    objects = render(*overrides, **fields).objects
    kind = "RayCluster" if fields.get("kind") == "cluster" else "RayJob"
    assert [each["kind"] for each in objects] == ["ConfigMap", "NetworkPolicy", kind]
    assert _faults(objects[-1]) == []


def test_the_schema_tells_what_kuberay_would_not_take(render: Render) -> None:
    good = render().of("RayJob")
    wrong = {
        "spec.rayClusterSpec.workerGroupSpecs.0": ("minReplicas", "1"),
        "spec": ("submissionMod", "K8sJobMode"),
        "spec.rayClusterSpec.authOptions": ("mode", "tokens"),
    }
    for path, (key, value) in wrong.items():
        bad = copy.deepcopy(good)
        part: Any = bad
        for step in path.split("."):
            part = part[int(step) if step.isdigit() else step]
        part[key] = value
        assert len(_faults(bad)) == 1, path
        assert path in _faults(bad)[0]


# ---- the run's resources -------------------------------------------------------------------------


def _nodes(rendered: Rendered, size: str) -> list[tuple[str, dict[str, float]]]:
    """Every node with its resources, as Ray's own autoscaler reads them from the object."""
    cr = {"metadata": {"name": "run", "namespace": "default"}, "spec": rendered.cluster}
    kinds = _derive_autoscaling_config_from_ray_cr(cr)["available_node_types"]
    nodes = [("headgroup", kinds["headgroup"]["resources"])]
    for name, group in rendered.groups.items():
        kind = kinds[name]
        numbers = {
            "fewest": kind["min_workers"],
            "count": group["replicas"],
            "most": kind["max_workers"],
        }
        nodes += [(name, kind["resources"])] * numbers[size]
    return nodes


def _config(rendered: Rendered, tmp_path: Path) -> RunConfig:
    """The configuration that the driver will read in its pod."""
    [(name, text)] = rendered.of("ConfigMap")["data"].items()
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    return load_config([file])


def _bundles(config: RunConfig, size: str) -> list[tuple[str, dict[str, float]]]:
    """Every worker's bundle, as the run will ask Ray for it, with colocated ones joined."""
    pools = config.pools.by_name
    found = []
    for name, pool in pools.items():
        if pool.colocate_with is None:
            beside = [other for other in pools.values() if other.colocate_with == name]
            found += [(name, bundle_of(pool, *beside))] * getattr(pool, size)
    return found


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("size", ["fewest", "count", "most"])
def test_every_worker_finds_its_place_and_only_there(
    render: Render, run: str, size: str, tmp_path: Path
) -> None:
    """First fit is exact here, since a worker can stand in pods of its own group alone."""
    overrides, fields = RUNS[run]
    rendered = render(*overrides, **fields)
    nodes = [(name, dict(resources)) for name, resources in _nodes(rendered, size)]
    homes: dict[str, set[str]] = {}
    for pool, bundle in _bundles(_config(rendered, tmp_path), size):
        home = next(
            (n for n in nodes if all(n[1].get(k, 0) >= v - 1e-9 for k, v in bundle.items())), None
        )
        assert home is not None, f"no pod holds {bundle} of {pool}"
        for resource, amount in bundle.items():
            home[1][resource] -= amount
        homes.setdefault(pool, set()).add(home[0])
    shared = run == "shared_gpu"
    assert homes == {pool: {"shared-gpu" if shared else pool.replace("_", "-")} for pool in homes}


def test_a_pods_limits_are_what_ray_offers_in_it(render: Render) -> None:
    """Ray must not promise more CPUs or GPUs than the pod has."""
    for name, group in render(*GPUS).groups.items():
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert limits["cpu"] == group["resources"]["CPU"], name
        assert limits.get("nvidia.com/gpu") == group["resources"].get("GPU"), name


def test_groups_follow_the_pools(render: Render) -> None:
    groups = render(*GPUS).groups
    numbers = {
        name: (g["minReplicas"], g["replicas"], g["maxReplicas"], g["resources"].get("GPU"))
        for name, g in groups.items()
    }
    assert numbers == {
        "student-rollout": (2, 4, 8, "1"),
        "teacher-rollout": (2, 2, 2, "2"),
        "teacher-scoring": (2, 2, 3, "1"),  # two workers of half a GPU in a pod
        "learner": (2, 2, 2, "2"),  # two ranks that share one student in a pod
        "evaluation": (1, 1, 1, "1"),
    }
    assert groups["teacher-rollout"]["resources"]["big_memory"] == "2"
    assert render(*GPUS).cluster["enableInTreeAutoscaling"] is True
    assert render().cluster["enableInTreeAutoscaling"] is False


def test_workers_per_pod_may_be_given(render: Render) -> None:
    groups = render(*GPUS, workers_per_pod={"student_rollout": 4, "learner": 1}).groups
    assert groups["student-rollout"]["resources"]["GPU"] == "4"
    assert (groups["student-rollout"]["minReplicas"], groups["learner"]["replicas"]) == (1, 4)


def test_the_run_means_the_same_but_for_its_folder_and_places(
    render: Render, tmp_path: Path
) -> None:
    ours = load_config([QUICKSTART])
    theirs = _config(render(mount_path="/data"), tmp_path)
    assert theirs.runs_directory == "/data/runs"
    assert (
        theirs.model_copy(update={"runs_directory": ours.runs_directory, "pools": ours.pools})
        == ours
    )
    places = {"student_rollout", "teacher_rollout", "teacher_scoring", "learner"}
    demand = pools_demand(theirs)
    assert demand == {**pools_demand(ours), **{f"{name}_place": 1.0 for name in places}}


# ---- memory --------------------------------------------------------------------------------------


def _memory_mebibytes(group: Mapping[str, Any]) -> int:
    limit = group["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"]
    return int(limit.removesuffix("Mi"))


LITTLE = (
    *("teacher.sft.batch_size=1", "student.sft.batch_size=1"),
    *("distill.student_prompts_per_step=1", "distill.teacher_prompts_per_step=1"),
    "teacher.architecture.num_layers=1",
)
"""A plan is made by the learner's own step; this one has little to do."""


def test_memory_is_what_the_model_needs_and_what_the_pods_lend(render: Render) -> None:
    """The learner's: weights, gradients, two moments; a checkpoint's copy of all but gradients."""
    wide = "student.architecture={hidden_size: 1024, intermediate_size: 4096, num_layers: 2}"
    groups = render(*LITTLE, wide, memory_gib={}).groups
    parameters = 2 * (4 * 1024**2 + 3 * 1024 * 4096)
    least = parameters * 4 * 7 / 2**20
    learner = _memory_mebibytes(groups["learner"])
    assert least < learner < 4 * least + 4 * 1024
    for group in groups.values():
        store = int(group["rayStartParams"]["object-store-memory"]) / 2**20
        assert store + 1024 < _memory_mebibytes(group), "Ray's own processes need room too"


def test_a_worker_that_does_not_fit_its_gpu_is_refused(render: Render) -> None:
    with pytest.raises(ResourceError, match=r"fine-tuning does not fit its GPU.*--device-gib"):
        render(*SHARED_GPU, *LITTLE, memory_gib={}, device_gib=1.0)


def test_models_that_are_elsewhere_need_memory_by_hand(render: Render) -> None:
    elsewhere = (
        "teacher={path: /shared/t, architecture: null, sft: null}",
        "student={path: /shared/s, architecture: null}",
        "tokenizer.type=pretrained",
    )
    with pytest.raises(ConfigError, match=r"cannot be read here.*--memory POOL=GIB"):
        render(*elsewhere, memory_gib={})
    assert _memory_mebibytes(render(*elsewhere).groups["learner"]) == 4 * 1024


# ---- what a pod may and sees ---------------------------------------------------------------------


def test_no_door_is_open(render: Render) -> None:
    """A token for Ray, no ingress, no root, and only the run's own pods reach one another."""
    rendered = render()
    assert rendered.cluster["authOptions"] == {"mode": "token"}
    assert rendered.cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert rendered.cluster["headGroupSpec"]["enableIngress"] is False
    job = rendered.of("RayJob")["spec"]
    templates = [
        job["submitterPodTemplate"],
        job["rayClusterSpec"]["headGroupSpec"]["template"],
        *(group["template"] for group in rendered.groups.values()),
    ]
    policy = rendered.of("NetworkPolicy")["spec"]
    for template in templates:
        assert (
            policy["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        )
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        assert template["spec"]["automountServiceAccountToken"] is False
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
    [own, operator, prometheus] = policy["ingress"]
    assert own["from"] == [{"podSelector": policy["podSelector"]}]
    assert [port["port"] for port in operator["ports"] + prometheus["ports"]] == [8265, 8080]


def test_secrets_are_named_and_never_written(
    render: Render, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, f"planted-{name}")
    rendered = render(**EVERYTHING)
    assert "planted-" not in json.dumps(rendered.objects)
    assert rendered.cluster["authOptions"]["secretName"] == "ray-token"
    password = rendered.cluster["gcsFaultToleranceOptions"]["redisPassword"]
    assert password == {
        "valueFrom": {"secretKeyRef": {"name": "redis-password", "key": "password"}}
    }
    for group in [rendered.cluster["headGroupSpec"], *rendered.groups.values()]:
        [container] = group["template"]["spec"]["containers"]
        assert [each["secretRef"]["name"] for each in container["envFrom"]] == [
            "hub-token",
            "tracker",
        ]


def test_paths_that_pods_do_not_see_are_told_at_once(render: Render) -> None:
    with pytest.raises(ConfigError) as caught:
        render(
            "teacher={path: ./models/teacher, architecture: null}",
            "tokenizer.type=pretrained",
            "runs_directory=/home/me/runs",
            "data.prompts={type: jsonl, path: prompts.jsonl}",
            "data.evaluation.mine={type: files, path: [/shared/a.jsonl, ../b.jsonl]}",
        )
    said = str(caught.value)
    for key in ("teacher.path: ./models", "runs_directory: /home/me", "data.prompts.path: prompts"):
        assert key in said
    assert "data.evaluation.mine.path: ../b.jsonl" in said
    assert "a.jsonl;" not in said
    assert "data.directory=/shared/data" in said
    seen = "data.prompts={type: jsonl, path: prompts.jsonl}"
    render(seen, "data.directory=/shared/data", "runs_directory=/shared/mine")


def test_a_stopped_job_has_the_time_of_its_checkpoint(render: Render) -> None:
    head = render("deadlines.stop_seconds=200").cluster["headGroupSpec"]["template"]["spec"]
    environment = {each["name"]: each["value"] for each in head["containers"][0]["env"]}
    assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) > 200
    assert head["terminationGracePeriodSeconds"] > int(environment["RAY_JOB_STOP_WAIT_TIME_S"])


def test_probes_ask_what_rays_agent_answers_without_a_token(render: Render) -> None:
    source = (Path(ray.__file__).parent / "dashboard/http_server_agent.py").read_text("utf-8")
    [container] = render().cluster["headGroupSpec"]["template"]["spec"]["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        path = container[probe]["httpGet"]["path"]
        assert f'"{path}"' in source


# ---- names and the command -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "name"),
    [
        ("quickstart", "quickstart"),
        ("My_Run.7", "my-run-7"),
        ("7b", "run-7b"),
        ("a" * 47, "a" * 47),
    ],
)
def test_names_are_what_kubernetes_takes(run: str, name: str) -> None:
    assert kubernetes_name(run) == name


def test_the_entrypoint_is_a_line_that_the_command_takes(render: Render) -> None:
    words = render().of("RayJob")["spec"]["entrypoint"].split()
    assert words[:4] == ["exec", "python", "-m", "distill_system"]
    command, *rest = words[4:]
    commands = get_command(app).commands  # type: ignore[attr-defined]
    context = commands[command].make_context(command, rest)
    [config] = context.params["settings"]
    head = render().cluster["headGroupSpec"]["template"]["spec"]
    [mount] = [m for m in head["containers"][0]["volumeMounts"] if m["name"] == "config"]
    [file] = render().of("ConfigMap")["data"]
    assert config == f"{mount['mountPath']}/{file}"


def test_long_names_stay_apart() -> None:
    one, two = (kubernetes_name("a" * 60 + end) for end in "bc")
    assert one != two
    assert max(len(one), len(two)) <= 47


def test_the_command_prints_documents_and_refuses_in_one_line(tmp_path: Path) -> None:
    given = ["--image", "i:1", "--storage-claim", "runs"]
    memory = [f"--memory={name}=4" for name in ("student_rollout", "teacher_rollout", "learner")]
    memory.append("--memory=teacher_scoring=4")
    done = CliRunner().invoke(app, ["manifests", str(QUICKSTART), *given, *memory])
    assert done.exit_code == 0, done.output
    assert [each["kind"] for each in yaml.safe_load_all(done.stdout)][-1] == "RayJob"
    for wrong, said in {
        "--memory=learners=4": "--memory learners: expected one of student_rollout",
        "--memory=learner": "--memory learner: expected POOL=NUMBER",
        "--workers-per-pod=learner=0": "--workers-per-pod learner=0: expected POOL=NUMBER",
    }.items():
        refused = CliRunner().invoke(app, ["manifests", str(QUICKSTART), *given, *memory, wrong])
        assert refused.exit_code == 1
        assert said in refused.output


def test_a_pools_resource_may_not_be_called_as_a_place(render: Render) -> None:
    with pytest.raises(ConfigError, match="learner_place is what the pods of one kind offer"):
        render("pools.learner.custom_resources={learner_place: 1}")

"""Groups of pods in -> the objects that KubeRay runs: RayJob or RayCluster, ConfigMap, policy.

Field names are those of ray.io/v1 (KubeRay 1.6 or newer) and of Kubernetes' own objects. A probe, a
port or a parameter that is not here is what KubeRay's operator gives by itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import PurePosixPath
from typing import Any, Literal

from distill_system.config import RunConfig, dump_config
from distill_system.errors import ConfigError
from distill_system.manifests.groups import DRIVER_PLACE, PodGroup, with_places
from distill_system.manifests.pod_memory import LEAST_STORE_BYTES, PodMemory
from distill_system.planning.memory import GIB

Object = dict[str, Any]
"""A Kubernetes object, or a part of one: what json.dumps takes."""

CONFIG_FOLDER = "/etc/distill-system"
CONFIG_FILE = "config.json"
MOST_CONFIG_BYTES = 2**20
"""Kubernetes takes no larger ConfigMap."""
LONGEST_NAME = 47
"""Of a RayJob: KubeRay adds to it, and the names of services end at 63 letters."""
RUN_LABEL = "distill-system/run"
HEAD_CPUS = 2
SUBMITTER_MEMORY = "1Gi"
GCS_PORT, DASHBOARD_PORT, METRICS_PORT, AGENT_PORT = 6379, 8265, 8080, 52365
KEPT_SECONDS = 600
"""How long the cluster of a job that has ended is kept for whoever wants to look at it."""
IDLE_SECONDS = 120
"""The autoscaler removes a pod that no worker has used for this long."""
TOKEN_KEY = "auth_token"
"""KubeRay's name of the token in its Secret."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestRequest:
    """What a cluster must be told beside the run's configuration.

    image: one that deploy/Dockerfile builds.  storage_claim: a PersistentVolumeClaim that all pods
    may write at once (ReadWriteMany), seen at mount_path.  kind: a cluster for one job, or one that
    stays.  retries: new clusters for a job that failed, each going on from the newest checkpoint.
    secrets: Secrets whose keys become environment variables of every worker, such as HF_TOKEN.
    token_secret: a Secret with the cluster's token; None lets KubeRay make one.
    redis_address, redis_secret: a Redis that keeps Ray's own tables, and the Secret with its
    password under the key `password`; None keeps them in the head's memory alone.
    head_memory_gib: of the pod with Ray's head and the driver.
    """

    image: str
    storage_claim: str
    mount_path: str = "/shared"
    namespace: str = "default"
    kind: Literal["job", "cluster"] = "job"
    retries: int = 2
    secrets: tuple[str, ...] = field(default=())
    token_secret: str | None = None
    redis_address: str | None = None
    redis_secret: str | None = None
    head_memory_gib: float = 8.0


def build_objects(
    config: RunConfig,
    groups: list[PodGroup],
    memory: Mapping[str, PodMemory],
    request: ManifestRequest,
) -> list[Object]:
    """The objects of a run in the order in which they are to be made.

    Raises: ConfigError if the configuration is too large for a ConfigMap.
    """
    run = _Run(kubernetes_name(config.name), request, config)
    theirs = config_for_pods(config, groups, request.mount_path)
    cluster = _cluster_spec(run, groups, memory)
    return [
        _config_map(run, theirs),
        _network_policy(run),
        _ray_job(run, theirs, cluster) if request.kind == "job" else _ray_cluster(run, cluster),
    ]


def config_for_pods(config: RunConfig, groups: list[PodGroup], mount_path: str) -> RunConfig:
    """The run as its driver reads it in a pod: its folder on the volume, its workers' places."""
    folder = PurePosixPath(mount_path) / config.runs_directory
    return with_places(config, groups).model_copy(update={"runs_directory": str(folder)})


def kubernetes_name(run_name: str) -> str:
    """A run's name as Kubernetes takes it: small letters, digits and '-', a letter first."""
    name = re.sub(r"[^a-z0-9-]+", "-", run_name.lower()).strip("-")
    name = name if name[:1].isalpha() else f"run-{name}".strip("-")
    if len(name) <= LONGEST_NAME:
        return name
    # Long names that begin alike stay apart.
    digest = hashlib.sha256(run_name.encode()).hexdigest()[:8]
    return f"{name[: LONGEST_NAME - 9].rstrip('-')}-{digest}"


@dataclass(frozen=True, slots=True)
class _Run:
    """What all objects of a run are made from."""

    name: str
    request: ManifestRequest
    config: RunConfig

    @property
    def labels(self) -> dict[str, str]:
        """On every object and pod of the run."""
        return {RUN_LABEL: self.name, "app.kubernetes.io/part-of": "distill-system"}

    def head(self, kind: str, api_version: str, name: str | None = None) -> Object:
        """The beginning of an object."""
        return {
            "apiVersion": api_version,
            "kind": kind,
            "metadata": {
                "name": name or self.name,
                "namespace": self.request.namespace,
                "labels": self.labels,
            },
        }


# ---- the objects ---------------------------------------------------------------------------------


def _config_map(run: _Run, config: RunConfig) -> Object:
    text = dump_config(config)
    if len(text.encode()) > MOST_CONFIG_BYTES:
        raise ConfigError(
            f"the configuration of {config.name} is {len(text.encode())} bytes and a ConfigMap "
            f"holds {MOST_CONFIG_BYTES}: put long texts, such as data.chat_template, into files"
        )
    return {**run.head("ConfigMap", "v1", f"{run.name}-config"), "data": {CONFIG_FILE: text}}


def _ray_job(run: _Run, config: RunConfig, cluster: Object) -> Object:
    spec = {
        "submissionMode": "K8sJobMode",
        "entrypoint": entrypoint(),
        "entrypointNumCpus": 1,
        "entrypointResources": json.dumps({DRIVER_PLACE: 1}),
        "metadata": _job_metadata(config),
        # Each retry is a new cluster; the run goes on from its newest checkpoint on the volume.
        "backoffLimit": run.request.retries,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": KEPT_SECONDS,
        "submitterPodTemplate": _submitter(run),
        "rayClusterSpec": cluster,
    }
    return {**run.head("RayJob", "ray.io/v1"), "spec": spec}


def _job_metadata(config: RunConfig) -> dict[str, str]:
    """What Ray's dashboard shows of the job, and what `distill-system status` knows it by."""
    folder = PurePosixPath(config.runs_directory) / config.name
    return {
        "job_name": config.name,
        "run": config.name,
        "folder": str(folder),
        "report": str(folder / "report.html"),
        "steps": str(config.distill.steps),
    }


def _ray_cluster(run: _Run, cluster: Object) -> Object:
    return {**run.head("RayCluster", "ray.io/v1"), "spec": cluster}


def entrypoint() -> str:
    """The command of the job; by exec, so that Ray's SIGTERM meets the driver and no shell."""
    return f"exec python -m distill_system train {CONFIG_FOLDER}/{CONFIG_FILE} --resume auto"


def _network_policy(run: _Run) -> Object:
    """Only the run's own pods reach one another; KubeRay reads job states, Prometheus metrics."""
    anywhere: Object = {"namespaceSelector": {}}
    operator = {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}
    prometheus = {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}
    ingress = [
        {"from": [{"podSelector": {"matchLabels": {RUN_LABEL: run.name}}}]},
        {"from": [{**anywhere, "podSelector": operator}], "ports": [{"port": DASHBOARD_PORT}]},
        {"from": [{**anywhere, "podSelector": prometheus}], "ports": [{"port": METRICS_PORT}]},
    ]
    return {
        **run.head("NetworkPolicy", "networking.k8s.io/v1"),
        "spec": {
            "podSelector": {"matchLabels": {RUN_LABEL: run.name}},
            "policyTypes": ["Ingress"],
            "ingress": ingress,
        },
    }


# ---- the Ray cluster -----------------------------------------------------------------------------


def _cluster_spec(run: _Run, groups: list[PodGroup], memory: Mapping[str, PodMemory]) -> Object:
    request, grows = run.request, any(group.is_elastic for group in groups)
    token = {} if request.token_secret is None else {"secretName": request.token_secret}
    spec: Object = {
        "rayVersion": metadata.version("ray"),
        "authOptions": {"mode": "token", **token},
        "enableInTreeAutoscaling": grows,
    }
    if grows:
        spec["autoscalerOptions"] = {"version": "v2", "idleTimeoutSeconds": IDLE_SECONDS}
    if request.redis_address is not None:
        spec["gcsFaultToleranceOptions"] = _fault_tolerance(request)
    spec["headGroupSpec"] = _head_group(run, grows=grows)
    spec["workerGroupSpecs"] = [
        _worker_group(run, group, memory[group.name], grows=grows) for group in groups
    ]
    return spec


def _fault_tolerance(request: ManifestRequest) -> Object:
    options: Object = {"redisAddress": request.redis_address}
    if request.redis_secret is not None:
        key = {"name": request.redis_secret, "key": "password"}
        options["redisPassword"] = {"valueFrom": {"secretKeyRef": key}}
    return options


def _head_group(run: _Run, *, grows: bool) -> Object:
    """Ray's head with the driver beside it, and no worker: those ask for places it has not."""
    stop_seconds = int(run.config.deadlines.stop_seconds)
    memory = run.request.head_memory_gib * GIB
    container = _container(run, "ray-head", cpus=HEAD_CPUS, gpus=0, num_bytes=memory)
    container["ports"] = [
        {"name": "gcs-server", "containerPort": GCS_PORT},
        {"name": "dashboard", "containerPort": DASHBOARD_PORT},
        {"name": "metrics", "containerPort": METRICS_PORT},
    ]
    # A stopped job has the time to write its checkpoint; Ray's own patience is 3 s.
    container["env"].append({"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": str(stop_seconds + 30)})
    container["volumeMounts"].append(
        {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True}
    )
    template = _template(run, container, grows=grows, reads_config=True)
    template["spec"]["terminationGracePeriodSeconds"] = stop_seconds + 60
    return {
        "serviceType": "ClusterIP",
        "enableIngress": False,
        "rayStartParams": {"object-store-memory": str(int(LEAST_STORE_BYTES))},
        "resources": {"CPU": "1", DRIVER_PLACE: "1"},
        "template": template,
    }


def _worker_group(run: _Run, group: PodGroup, memory: PodMemory, *, grows: bool) -> Object:
    cpus, gpus = group.cpus, group.gpus
    container = _container(run, "ray-worker", cpus=cpus, gpus=gpus, num_bytes=memory.num_bytes)
    offered = {"CPU": cpus, **({"GPU": gpus} if gpus else {}), **group.custom_resources}
    return {
        "groupName": group.name.replace("_", "-"),
        "replicas": group.count,
        "minReplicas": group.fewest,
        "maxReplicas": group.most,
        "rayStartParams": {"object-store-memory": str(memory.store_bytes)},
        "resources": {name: str(amount) for name, amount in offered.items()},
        "template": _template(run, container, grows=grows, on_gpu=gpus > 0),
    }


# ---- pods ----------------------------------------------------------------------------------------


def _container(run: _Run, name: str, *, cpus: int, gpus: int, num_bytes: float) -> Object:
    """A Ray container; KubeRay writes its command."""
    request = run.request
    return {
        "name": name,
        "image": request.image,
        "env": [
            {"name": "HF_HOME", "value": str(PurePosixPath(request.mount_path) / "huggingface")},
            {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
        ],
        **_secrets(request),
        "volumeMounts": [{"name": "shared", "mountPath": request.mount_path}],
        "resources": _resources(cpus, gpus, num_bytes),
        "securityContext": _container_security(),
        **_probes(),
    }


def _secrets(request: ManifestRequest) -> Object:
    """Environment variables by the names of Secrets; no value of one stands in any object."""
    if not request.secrets:
        return {}
    return {"envFrom": [{"secretRef": {"name": secret}} for secret in request.secrets]}


def _probes() -> dict[str, Object]:
    """Ray's agent answers for its node, on the head for Ray's own tables too; it needs no token."""
    asked = {"httpGet": {"path": "/api/healthz", "port": AGENT_PORT}, "timeoutSeconds": 5}
    return {
        "startupProbe": {**asked, "periodSeconds": 5, "failureThreshold": 60},
        "readinessProbe": {**asked, "periodSeconds": 5, "failureThreshold": 10},
        # Ten minutes, as KubeRay's own: a node under load is late, and its end costs the run.
        "livenessProbe": {**asked, "periodSeconds": 5, "failureThreshold": 120},
    }


def _template(
    run: _Run, container: Object, *, grows: bool, on_gpu: bool = False, reads_config: bool = False
) -> Object:
    volumes: list[Object] = [
        {
            "name": "shared",
            "persistentVolumeClaim": {"claimName": run.request.storage_claim},
        }
    ]
    if reads_config:
        volumes.append({"name": "config", "configMap": {"name": f"{run.name}-config"}})
    spec: Object = {
        "securityContext": _pod_security(),
        # On the head the autoscaler needs the account that KubeRay makes for it.
        "automountServiceAccountToken": grows and reads_config,
        "containers": [container],
        "volumes": volumes,
    }
    if grows:
        spec["restartPolicy"] = "Never"  # the autoscaler makes a new pod instead
    if on_gpu:
        spec["tolerations"] = [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        ]
    return {"metadata": {"labels": run.labels}, "spec": spec}


def _submitter(run: _Run) -> Object:
    """The pod that hands the job in and prints what the driver says; KubeRay writes its command."""
    container = {
        "name": "ray-job-submitter",
        "image": run.request.image,
        "securityContext": _container_security(),
        "resources": {
            "requests": {"cpu": "500m", "memory": SUBMITTER_MEMORY},
            "limits": {"cpu": "1", "memory": SUBMITTER_MEMORY},
        },
    }
    spec = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": _pod_security(),
        "containers": [container],
    }
    return {"metadata": {"labels": run.labels}, "spec": spec}


def _resources(cpus: int, gpus: int, num_bytes: float) -> Object:
    amounts = {"cpu": str(cpus), "memory": f"{int(num_bytes / 2**20)}Mi"}
    if gpus:
        amounts["nvidia.com/gpu"] = str(gpus)
    return {"requests": amounts, "limits": dict(amounts)}


def _pod_security() -> Object:
    """The user and group of deploy/Dockerfile; files on the volume belong to the group."""
    return {
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "runAsGroup": 1000,
        "fsGroup": 1000,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _container_security() -> Object:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}

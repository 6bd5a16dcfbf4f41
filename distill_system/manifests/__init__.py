"""A run's pools and its plan in -> the Kubernetes objects of KubeRay that run it."""

from distill_system.manifests.groups import PodGroup, pod_groups
from distill_system.manifests.kuberay import ManifestRequest, build_objects
from distill_system.manifests.pod_memory import plan_pod_memory
from distill_system.manifests.visible_paths import check_paths

__all__ = [
    "ManifestRequest",
    "PodGroup",
    "build_objects",
    "check_paths",
    "plan_pod_memory",
    "pod_groups",
]

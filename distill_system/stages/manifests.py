"""A configuration in -> the text of the Kubernetes objects that run it; nothing is started."""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from distill_system.config import RunConfig, require_one_run
from distill_system.errors import ConfigError, ModelError
from distill_system.manifests import (
    ManifestRequest,
    build_objects,
    check_paths,
    plan_pod_memory,
    pod_groups,
)
from distill_system.planning import Plan, make_plan
from distill_system.stages.plan import find_vocabulary


def render_manifests(
    config: RunConfig,
    request: ManifestRequest,
    *,
    memory_gib: Mapping[str, float],
    workers_per_pod: Mapping[str, int],
    device_gib: float,
) -> str:
    """The objects as YAML documents.

    memory_gib: memory of the pods of a group, where it is not to be what the plan predicts.
    workers_per_pod: workers of a pool in one of its pods.  device_gib: memory of each GPU.
    Raises: ConfigError for a path that pods do not see, or for memory that nobody knows;
        ResourceError for a worker that does not fit its GPU.
    """
    require_one_run(config, "manifests")
    check_paths(config, request.mount_path)
    groups = pod_groups(config, workers_per_pod=workers_per_pod)
    plan = None
    if not {group.name for group in groups} <= memory_gib.keys():
        plan = _plan(config, device_gib)
    memory = plan_pod_memory(config, groups, plan, given_gib=memory_gib)
    return yaml.dump_all(
        build_objects(config, groups, memory, request),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=100,
        explicit_start=True,
    )


def _plan(config: RunConfig, device_gib: float) -> Plan:
    try:
        return make_plan(config, vocabulary=find_vocabulary(config), device_gib=device_gib)
    except ModelError as error:
        raise ConfigError(
            f"the memory of the pods follows from the models, and these cannot be read here: "
            f"{error}. Or give the memory of every pool's pods yourself: --memory POOL=GIB"
        ) from error


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, and every value in full: aliases are hard to read."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)

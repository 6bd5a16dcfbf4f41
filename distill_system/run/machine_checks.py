"""What this machine's GPUs and network cannot do for a run; looked at before anything starts.

Of a cluster that is joined nothing is known here: its nodes say so as their workers start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from distill_system.cluster import joins_a_cluster
from distill_system.config import RunConfig
from distill_system.errors import ResourceError
from distill_system.network import describe_interfaces, find_missing_interface
from distill_system.observe.environment import Gpu, read_gpus

BFLOAT16_CAPABILITY = 8.0
"""Ampere. vLLM refuses bfloat16 on older GPUs, and torch emulates it."""
EQUAL = 1.05
"""Memories of one kind of GPU differ by what their firmware keeps."""


def require_machine(config: RunConfig) -> None:
    """Refuse a run whose dtype or network interface this machine does not have.

    Raises: ResourceError with all that it lacks.
    """
    problems = machine_problems(config)
    if problems:
        raise ResourceError("; ".join(problems))


def machine_problems(config: RunConfig, gpus: Sequence[Gpu] | None = None) -> list[str]:
    """A sentence for each; none where a cluster is joined.  gpus: None asks nvidia-smi."""
    if joins_a_cluster():
        return []
    return [
        *_missing_interface(config),
        *_missing_dtype(config, read_gpus() if gpus is None else gpus),
    ]


def machine_notes(config: RunConfig, gpus: Sequence[Gpu] | None = None) -> list[str]:
    """What to know of GPUs that differ, where the run uses any and no cluster is joined."""
    uses_gpus = any(pool.gpus for pool in config.started_pools.values())
    if joins_a_cluster() or not uses_gpus:
        return []
    gpus = read_gpus() if gpus is None else gpus
    sizes = sorted({gpu.mebibytes for gpu in gpus})
    if not sizes or sizes[-1] <= EQUAL * sizes[0]:
        return []
    named = ", ".join(f"{gpu.name} {gpu.mebibytes / 1024:.0f} GiB" for gpu in gpus)
    return [
        f"this machine's GPUs differ in memory ({named}), and a worker of any pool may get any: "
        "expected equal ones. Leave some out by CUDA_VISIBLE_DEVICES, or plan with --device-gib of "
        "the smallest"
    ]


def _missing_interface(config: RunConfig) -> Iterator[str]:
    named = config.cluster.network_interface
    missing = None if named is None else find_missing_interface(named)
    if missing is not None:
        yield (
            f"cluster.network_interface: this machine has no network interface {missing!r}; it has "
            f"{describe_interfaces()}. Name one of these, or leave the key out"
        )


def _missing_dtype(config: RunConfig, gpus: Sequence[Gpu]) -> Iterator[str]:
    oldest = min(gpus, key=lambda gpu: gpu.capability, default=None)
    if oldest is None or oldest.capability >= BFLOAT16_CAPABILITY:
        return
    student, teacher = config.rollout.student_engine.dtype, config.rollout.teacher_engine.dtype
    dtypes = {
        "student_rollout": ("rollout.student_engine.dtype", student),
        "evaluation": ("rollout.student_engine.dtype", student),
        "teacher_rollout": ("rollout.teacher_engine.dtype", teacher),
        "teacher_scoring": ("scoring.dtype", config.scoring.dtype),
        "learner": ("learner.compute_dtype", config.learner.compute_dtype),
    }
    first = {"teacher_rollout"} if config.teacher_writes_first else set()
    used = {*config.started_pools, *first}
    keys = [
        key
        for pool, (key, dtype) in dtypes.items()
        if pool in used and config.pools.by_name[pool].gpus and dtype == "bfloat16"
    ]
    if keys:
        yield (
            f"{', '.join(dict.fromkeys(keys))}: expected a dtype that the GPU has, got bfloat16 on "
            f"{oldest.name} of compute capability {oldest.capability:g}; bfloat16 needs "
            f"{BFLOAT16_CAPABILITY:g}. Set float32 (an engine may have float16)"
        )

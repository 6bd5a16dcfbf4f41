"""A whole run's plan: each pool's workers and their memory, and what travels between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from distill_system.config.model import ModelConfig
from distill_system.config.pools import PoolConfig
from distill_system.config.rollout import EngineConfig
from distill_system.config.run import RunConfig
from distill_system.planning.learner_memory import learner_memory
from distill_system.planning.loads import (
    NUMBER_BYTES,
    distillation_load,
    longest_sequence,
    streams_read,
    supervised_load,
    teacher_needs,
    wire_bytes_per_token,
)
from distill_system.planning.memory import GIB, PROCESS_BYTES, Memory
from distill_system.planning.scorer_memory import scorer_memory
from distill_system.planning.shapes import ModelShape, architecture_shape, read_shape

MIB = 2**20
CPU_CACHE_MEBIBYTES = 256
"""What rollout.*_engine.kv_cache_mebibytes=null takes on a CPU."""
CPU_VLLM_BYTES = 0.3 * GIB
"""What a worker with vLLM on a CPU holds beside weights, cache and PROCESS_BYTES: 0.89 GiB in all
where a Llama of 270 MiB wrote 32 responses."""
MORE_RANKS = (2, 4, 8, 16)
"""Ranks of a scorer that are tried where it does not fit."""
Role = Literal["teacher", "student"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPlan:
    """One kind of worker.

    what: what it holds. memory: of one worker without the process itself. gpus: of one worker, 0
    on a CPU. room_bytes: what its share of a device holds, None on a CPU. trains: whether it is a
    learner's rank, of the distillation or of a fine-tuning. note: what to know.
    """

    pool: str
    count: int
    what: str
    memory: Memory
    gpus: float
    room_bytes: float | None
    trains: bool = False
    note: str = ""

    @property
    def num_bytes(self) -> float:
        """Of one worker, or of one of its GPUs, the process included."""
        return self.memory.num_bytes + PROCESS_BYTES["cuda" if self.gpus else "cpu"]

    @property
    def fits(self) -> bool | None:
        """Whether a worker fits its share of a device; None on a CPU, where nobody said a size."""
        return None if self.room_bytes is None else self.num_bytes <= self.room_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run before it starts.

    at_once: workers that run side by side in the distillation; before: the fine-tunings, which come
    first, and teacher engines that no step reads. wire_bytes_per_token: what a scorer sends of one
    response token; publish_bytes: of one weight version to one student worker.
    """

    name: str
    student: ModelShape
    teacher: ModelShape
    before: tuple[WorkerPlan, ...]
    at_once: tuple[WorkerPlan, ...]
    device_bytes: float
    longest: int
    step_tokens: int
    scored_tokens: int
    wire_bytes_per_token: int
    publish_bytes: float

    @property
    def workers(self) -> tuple[WorkerPlan, ...]:
        """Every kind of worker of the run."""
        return (*self.before, *self.at_once)

    @property
    def fits(self) -> bool:
        """Whether every worker with a GPU fits it."""
        return all(worker.fits is not False for worker in self.workers)

    @property
    def host_bytes(self) -> float:
        """CPU memory of the distillation: workers without a GPU, and what others offload."""
        resident = sum(w.count * w.num_bytes for w in self.at_once if not w.gpus)
        return resident + sum(w.count * w.memory.host_bytes for w in self.at_once)


def make_plan(config: RunConfig, *, vocabulary: int | None, device_gib: float) -> Plan:
    """The plan of a run; reads its models' config.json.

    vocabulary: tokens of a tokenizer that the run makes itself; None if the models bring one.
    device_gib: memory of each GPU.
    Raises: ModelError if a model's configuration is not on this machine.
    """
    teacher = _shape(config.teacher, "teacher", vocabulary, None)
    student = _shape(config.student, "student", vocabulary, teacher)
    device = device_gib * GIB
    shapes: dict[Role, ModelShape] = {"teacher": teacher, "student": student}
    distill, longest = config.distill, config.rollout.sampling.longest
    streams = streams_read(config)
    scored = [s for s in streams if distill.objective.teacher_needs(s.side).anything]
    return Plan(
        name=config.name,
        student=student,
        teacher=teacher,
        before=tuple(_before(config, shapes, device)),
        at_once=tuple(
            plan
            for plan in _distillation(config, shapes, device)
            if plan.pool in config.started_pools
        ),
        device_bytes=device,
        longest=longest_sequence(config),
        step_tokens=sum(longest(s.side) * distill.sequences(s.side) for s in streams),
        scored_tokens=sum(longest(s.side) * distill.sequences(s.side) for s in scored),
        wire_bytes_per_token=wire_bytes_per_token(config, teacher),
        publish_bytes=float(
            NUMBER_BYTES[config.rollout.student_engine.dtype] * student.num_parameters
        ),
    )


def _shape(
    model: ModelConfig, role: Role, vocabulary: int | None, other: ModelShape | None
) -> ModelShape:
    if model.path is not None:
        return read_shape(model.path, key=f"{role}.path", trust_remote_code=model.trust_remote_code)
    assert model.architecture is not None, "the configuration gives a path or an architecture"
    size = vocabulary if vocabulary is not None else other.vocabulary if other else None
    assert size is not None, "a model of random weights takes its vocabulary from a tokenizer"
    return architecture_shape(model.architecture, vocabulary=size)


def _before(
    config: RunConfig, shapes: Mapping[Role, ModelShape], device: float
) -> Iterator[WorkerPlan]:
    """The fine-tunings, and the teacher's engines where they write and end before the others."""
    for role, shape in shapes.items():
        sft = getattr(config, role).sft
        if sft is not None:
            memory = learner_memory(supervised_load(config, shape, sft))
            learner, what = f"{role} fine-tuning", f"the {role}"
            yield _worker(learner, config.pools.learner, what, memory, device, trains=True)
    if config.teacher_writes_first:
        yield replace(_engine(config, "teacher", shapes["teacher"], device), note="")


def _distillation(
    config: RunConfig, shapes: Mapping[Role, ModelShape], device: float
) -> Iterator[WorkerPlan]:
    """Its pools, those that nobody reads as well."""
    pools, student, teacher = config.pools, shapes["student"], shapes["teacher"]
    yield _engine(config, "student", student, device)
    yield _engine(config, "teacher", teacher, device)
    yield _scorer(config, teacher, device)
    memory = learner_memory(distillation_load(config, student, teacher))
    what = "student, optimizer, critics"
    yield _worker("learner", pools.learner, what, memory, device, trains=True)
    if pools.evaluation is not None:
        yield _engine(config, "student", student, device, pool_name="evaluation")


def _scorer(config: RunConfig, teacher: ModelShape, device: float) -> WorkerPlan:
    """A scorer, or each of its ranks; where it does not fit, how many ranks would."""
    pool, ranks = config.pools.teacher_scoring, config.scoring.shard_ranks
    what = "the teacher in torch" if ranks == 1 else f"a part of {ranks} of the teacher in torch"
    if not teacher_needs(config).anything:
        what += ", to measure"
    memory = scorer_memory(config, teacher)
    plan = _worker("teacher_scoring", pool, what, memory, device)
    plan = replace(plan, count=pool.count * ranks)
    return plan if plan.fits is not False else replace(plan, note=_advise(config, teacher, device))


def _advise(config: RunConfig, teacher: ModelShape, device: float) -> str:
    """How many ranks of a GPU each the teacher fits."""
    room = device - PROCESS_BYTES["cuda"]
    for ranks in MORE_RANKS:
        scoring = config.scoring.model_copy(update={"shard_ranks": ranks})
        tried = config.model_copy(update={"scoring": scoring})
        if scorer_memory(tried, teacher).num_bytes <= room:
            return f"fits with scoring.shard_ranks={ranks}, pools.teacher_scoring.gpus=1"
    return f"fits with no scoring.shard_ranks up to {MORE_RANKS[-1]}: lower the keys named below"


def _worker(
    pool_name: str,
    pool: PoolConfig,
    what: str,
    memory: Memory,
    device: float,
    *,
    trains: bool = False,
) -> WorkerPlan:
    return WorkerPlan(
        pool=pool_name,
        count=pool.count,
        what=what,
        memory=memory,
        gpus=pool.gpus,
        room_bytes=device * min(1.0, pool.gpus) if pool.gpus else None,
        trains=trains,
    )


def _engine(
    config: RunConfig, role: Role, shape: ModelShape, device: float, pool_name: str | None = None
) -> WorkerPlan:
    """A rollout worker; on a GPU without a size of its own the cache takes what is left."""
    pool_name = pool_name or f"{role}_rollout"
    pool, key = config.pools.by_name[pool_name], f"rollout.{role}_engine"
    engine: EngineConfig = getattr(config.rollout, f"{role}_engine")
    size, number = max(1, int(pool.gpus)), NUMBER_BYTES[engine.dtype]
    weights = number * shape.num_parameters / size
    # Keys and values of every block, for each token of each sequence that is being written.
    sequence = longest_sequence(config) * 2.0 * number * shape.num_blocks * shape.key_size / size
    cache, room = float(CPU_CACHE_MEBIBYTES * MIB), None
    if engine.kv_cache_mebibytes is not None:
        cache = float(engine.kv_cache_mebibytes * MIB)
    elif config.rollout.engine == "transformers":
        cache = engine.max_num_sequences * sequence  # at the most, all of full length
    elif pool.gpus:
        room = device * engine.gpu_memory_utilization
        # At least one sequence must fit, or vLLM does not start.
        cache = max(room - PROCESS_BYTES["cuda"] - weights, sequence)
    parts = {"weights": weights, "key-value cache": cache}
    received = elsewhere = 0.0
    if role == "student" and pool.gpus and config.transfer_backend == "nccl":
        # Loaded as it comes: the largest tensor whole, as it is sent, and what vLLM makes of it.
        received = number * shape.largest_parameter * (1.0 + 1.0 / size)
    elif role == "student":
        # What a publish brings stands beside the old weights, and its room is kept for the next.
        whole = float(number * shape.num_parameters)
        received, elsewhere = (0.0, size * whole) if pool.gpus else (whole, 0.0)
    if received:
        parts["received weights"] = received
        room = None if room is None else min(device, room + received)  # beside vLLM's own share
    if config.rollout.engine == "vllm" and not pool.gpus:
        parts["vLLM's own"] = CPU_VLLM_BYTES
    memory = Memory(
        moment="generating",
        parts=parts,
        lowered_by={
            "weights": f"{key}.dtype=bfloat16, more GPUs a worker",
            "received weights": f"{key}.dtype=bfloat16, {key}.gpu_memory_utilization",
            "key-value cache": f"{key}.kv_cache_mebibytes",
        },
        host_bytes=elsewhere,
    )
    library = {"vllm": "vLLM", "transformers": "transformers"}[config.rollout.engine]
    plan = _worker(pool_name, pool, f"the {role} in {library}", memory, device)
    note = f"cache for {int(cache // sequence)} sequences of {longest_sequence(config)} tokens"
    return replace(plan, room_bytes=plan.room_bytes if room is None else room, note=note)

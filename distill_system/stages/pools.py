"""The workers of a run: which classes, with which arguments, on which resources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from distill_system.cluster import EveryWorker, RayWorkers, WorkerRequest
from distill_system.config.model import ModelConfig, OptimizerConfig
from distill_system.config.objective import ObjectiveConfig
from distill_system.config.pools import PoolConfig
from distill_system.config.rollout import EngineConfig
from distill_system.learner import Learner, LearnerGroup, ModelSource
from distill_system.records import Author, WorkDone
from distill_system.rollout import RolloutPool, RolloutWorker, engine_environment
from distill_system.scoring import ScoringPool, TeacherScorer
from distill_system.seeds import derive_seed
from distill_system.stages.context import RunContext
from distill_system.stages.vocabulary import stop_token_ids, vocabulary_size
from distill_system.weights import FanOutClient


@dataclass(frozen=True, slots=True, kw_only=True)
class Pools:
    """The four pools of a distillation, loaded and connected."""

    students: RolloutPool
    teachers: RolloutPool
    scorers: ScoringPool
    learner: LearnerGroup

    def work_done(self) -> dict[str, WorkDone]:
        """Tokens and busy worker-seconds of the pools that serve the learner, since they began."""
        return {
            "student_rollout": self.students.work_done(),
            "teacher_rollout": self.teachers.work_done(),
            "teacher_scoring": self.scorers.work_done(),
        }


def open_pools(context: RunContext, *, student_path: str) -> Pools:
    """Start all four pools at once, wait until each is ready, join learner and student rollouts."""
    config = context.config
    students = start_rollouts(context, Author.STUDENT, student_path)
    teachers = start_rollouts(context, Author.TEACHER, context.teacher_path)
    scorers = _start_scorers(context)
    learner, _ = start_learner(
        context,
        name="learner",
        source=ModelSource(
            path=student_path,
            trust_remote_code=config.student.trust_remote_code,
            teacher_path=context.teacher_path,
            teacher_dtype=config.scoring.dtype,
            vocabulary_size=vocabulary_size(context.tokenizer),
            update=config.distill.update,
            action_dimension=config.distill.action_dimension,
        ),
        objective=config.distill.objective,
        compute_dtype=config.learner.compute_dtype,
        optimizer=config.distill.optimizer,
        total_steps=config.distill.steps,
    )
    for workers in (students, teachers, scorers):
        wait_until_ready(context, workers)
    _join(context, learner, students)
    return Pools(
        students=RolloutPool(students),
        teachers=RolloutPool(teachers),
        scorers=ScoringPool(scorers),
        learner=learner,
    )


def start_learner(
    context: RunContext,
    *,
    name: str,
    source: ModelSource,
    objective: ObjectiveConfig | None,
    compute_dtype: str,
    optimizer: OptimizerConfig,
    total_steps: int,
) -> tuple[LearnerGroup, RayWorkers]:
    """A learner group whose ranks have met; objective None is supervised fine-tuning."""
    config, pool = context.config, context.config.pools.learner
    shared = {
        "world_size": pool.count,
        "source": source,
        "objective": objective,
        "optimizer": optimizer,
        "config": config.learner.model_copy(update={"compute_dtype": compute_dtype}),
        "total_steps": total_steps,
        "max_response_tokens": config.rollout.sampling.max_response_tokens,
        "seed": derive_seed(config.seed, name, "weights"),
        "uses_gpu": pool.gpus > 0,
        "timeout_seconds": config.deadlines.call_seconds,
    }
    workers = context.cluster.start_workers(
        WorkerRequest(
            name=name,
            worker_class=Learner,
            arguments=[{"rank": rank, **shared} for rank in range(pool.count)],
            pool=pool,
            environment=_torch_environment(pool, config.learner.threads),
            gang=True,
        )
    )
    group = LearnerGroup(workers)
    wait_until_ready(context, workers)
    group.connect()
    return group, workers


def model_source(context: RunContext, model: ModelConfig) -> ModelSource:
    """Where supervised fine-tuning takes a model from."""
    tokenizer = context.tokenizer
    return ModelSource(
        path=model.path,
        architecture=model.architecture,
        vocabulary_size=vocabulary_size(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        trust_remote_code=model.trust_remote_code,
    )


def start_rollouts(context: RunContext, author: Author, path: str) -> RayWorkers:
    """A pool of rollout workers, placed but not yet loaded; only the student's receive weights."""
    config = context.config
    is_student = author is Author.STUDENT
    pool = config.pools.student_rollout if is_student else config.pools.teacher_rollout
    engine: EngineConfig = getattr(config.rollout, f"{author}_engine")
    uses_gpu = pool.gpus > 0
    name = f"{author}_rollout"
    arguments = [
        {
            "name": f"{name}-{index}",
            "model_path": path,
            "author": author,
            "engine": engine,
            "max_model_length": context.max_model_length,
            "uses_gpu": uses_gpu,
            "tensor_parallel_size": _tensor_parallel_size(pool),
            "weight_transfer_backend": _transfer_backend(context) if is_student else None,
            "trust_remote_code": getattr(config, author).trust_remote_code,
            "vocabulary_size": vocabulary_size(context.tokenizer),
            "stop_token_ids": stop_token_ids(config, context.tokenizer),
        }
        for index in range(pool.count)
    ]
    return context.cluster.start_workers(
        WorkerRequest(
            name=name,
            worker_class=RolloutWorker,
            arguments=arguments,
            pool=pool,
            environment=engine_environment(uses_gpu=uses_gpu, threads=engine.threads),
        )
    )


def _start_scorers(context: RunContext) -> RayWorkers:
    config, pool = context.config, context.config.pools.teacher_scoring
    arguments = {
        "model_path": context.teacher_path,
        "config": config.scoring,
        "vocabulary_chunk_tokens": config.learner.vocabulary_chunk_tokens,
        "uses_gpu": pool.gpus > 0,
        "vocabulary_size": vocabulary_size(context.tokenizer),
        "action_dimension": config.distill.action_dimension,
        "trust_remote_code": config.teacher.trust_remote_code,
    }
    return context.cluster.start_workers(
        WorkerRequest(
            name="teacher_scoring",
            worker_class=TeacherScorer,
            arguments=[arguments] * pool.count,
            pool=pool,
            environment=_torch_environment(pool, config.scoring.threads),
        )
    )


def _join(context: RunContext, learner: LearnerGroup, students: RayWorkers) -> None:
    """Open the weight-transfer group between learner rank 0 and every student engine."""
    seconds = context.config.deadlines.publish_seconds
    size = _tensor_parallel_size(context.config.pools.student_rollout)
    client = FanOutClient(EveryWorker(students.handles, seconds=seconds), [size] * students.count)
    learner.connect_rollouts(_transfer_backend(context), client, client.num_receivers, seconds)


def wait_until_ready(context: RunContext, workers: RayWorkers) -> None:
    """Return once every worker has loaded its model; raises what kept it from that."""
    workers.finish(
        [workers.start(index, "ready") for index in range(workers.count)],
        what="the workers to load their model",
        seconds=context.config.deadlines.start_seconds,
    )


def _transfer_backend(context: RunContext) -> str:
    return "nccl" if context.config.pools.learner.gpus > 0 else "gloo"


def _tensor_parallel_size(pool: PoolConfig) -> int:
    return max(1, int(pool.gpus))


def _torch_environment(pool: PoolConfig, threads: int) -> Mapping[str, str]:
    if pool.gpus > 0:
        return {}
    return {
        "OMP_NUM_THREADS": str(threads),
        # Threads that spin while they wait starve the other workers of a small machine.
        "OMP_WAIT_POLICY": "PASSIVE",
        # oneDNN keeps compiled code for each shape it meets, and every ragged batch is a new one:
        # by default 1,024 of them, over 2 GB for a bfloat16 model of 5 million parameters.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    }

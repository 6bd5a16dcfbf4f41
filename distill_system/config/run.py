"""The configuration of a run: everything `distill-system train` reads, in one frozen model."""

from __future__ import annotations

import difflib
import math
import re
from typing import Literal

from pydantic import JsonValue, NonNegativeInt, field_validator, model_validator

from distill_system.config.base import ConfigModel, LocalPath
from distill_system.config.data import DataConfig, PretrainedTokenizer, TokenizerConfig
from distill_system.config.distill import DistillConfig
from distill_system.config.evaluation import HELD_OUT_MEASURES, EvaluationConfig
from distill_system.config.export import ExportConfig, HubConfig
from distill_system.config.model import LearnerConfig, ModelConfig
from distill_system.config.pool_readers import find_readers
from distill_system.config.pools import (
    ELASTIC_POOLS,
    ClusterConfig,
    DeadlinesConfig,
    FaultsConfig,
    LoggingConfig,
    PoolConfig,
    PoolsConfig,
    ScalingConfig,
)
from distill_system.config.rollout import RolloutConfig, ScoringConfig

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
LONGEST_RUN_NAME = 200
"""A folder's name, and with an ending that of files beside it."""


class RunConfig(ConfigModel):
    """A whole run: data, two models, rollouts, scoring, learning, evaluation."""

    name: str
    """Name of the run, whose folder is runs_directory/name."""
    runs_directory: LocalPath = "runs"
    """Folder of all runs."""
    runs_mirror: str | None = None
    """Object store where the run's folder is kept too, such as s3://bucket/runs or gs://bucket/runs:
    what is complete is sent there every minute and at the end, and fetched where the folder does
    not hold the run. Credentials come from the environment alone."""
    seed: NonNegativeInt = 0
    """Every random choice of the run derives from it."""
    tokenizer: TokenizerConfig = PretrainedTokenizer()
    """The one tokenizer of teacher and student."""
    data: DataConfig
    teacher: ModelConfig
    student: ModelConfig
    rollout: RolloutConfig
    scoring: ScoringConfig = ScoringConfig()
    learner: LearnerConfig = LearnerConfig()
    distill: DistillConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    export: ExportConfig = ExportConfig()
    hub: HubConfig | None = None
    """Where the student is pushed when the run is done; null pushes nothing."""
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Who is told of every metric, beside metrics.jsonl. Address and secret of wandb, mlflow and
    trackio are read from their own environment variables; without any they write locally or say
    what they lack."""
    cluster: ClusterConfig = ClusterConfig()
    pools: PoolsConfig = PoolsConfig()
    scaling: ScalingConfig = ScalingConfig()
    deadlines: DeadlinesConfig = DeadlinesConfig()
    faults: FaultsConfig = FaultsConfig()
    logging: LoggingConfig = LoggingConfig()
    curriculum: tuple[dict[str, JsonValue], ...] = ()
    """Stages one after another (docs/curriculum.md): each a `name` and the keys of this
    configuration that differ in it. A stage begins with the student and the teacher of the stage
    before and a new optimizer; its `teacher` or `student` may also be the name of an earlier stage,
    `previous`, or `initial`; `label_weight` takes the weight of the labels from two of them."""

    @property
    def max_model_length(self) -> int:
        """Longest prompt plus longest response, in tokens, as the student reads them."""
        return self.data.max_prompt_tokens + self.rollout.sampling.max_response_tokens

    @property
    def teacher_model_length(self) -> int:
        """The same as the teacher reads them: with data.teacher_context."""
        return self.max_model_length + self.context_tokens

    @property
    def context_tokens(self) -> int:
        """Most tokens that the teacher's prompts have more; 0 without data.teacher_context."""
        context = self.data.teacher_context
        return 0 if context is None else context.max_tokens

    @property
    def rounding(self) -> Literal["none", "nearest", "stochastic"]:
        """How the learner's weights become the student engine's: rollout.weight_rounding, where
        there is a choice."""
        dtype = self.rollout.student_engine.dtype
        if dtype == "float32":
            return "none"
        return self.rollout.weight_rounding if dtype == "bfloat16" else "nearest"

    @property
    def transfer_backend(self) -> Literal["gloo", "nccl"]:
        """How weights travel from the learner to the student's engines.

        nccl, from GPU to GPU, where the engine is vLLM's and each worker has whole GPUs of its own;
        else gloo, through CPU memory, which lets learner and engine share a GPU.
        """
        gpus = [self.pools.learner.gpus, *(pool.gpus for pool in self._student_pools.values())]
        whole = all(number >= 1.0 for number in gpus)
        return "nccl" if whole and self.rollout.engine == "vllm" else "gloo"

    def ranks_per_worker(self, pool: str) -> int:
        """Processes that make up one worker of a pool, each with the pool's cpus and gpus."""
        return self.scoring.shard_ranks if pool == "teacher_scoring" else 1

    @property
    def pool_readers(self) -> dict[str, tuple[str, ...]]:
        """Each configured pool with those who read it while the steps go on; () if nobody does."""
        follows = self.data.source_policy is not None
        return find_readers(self.distill, self.pools, follows_sources=follows)

    @property
    def started_pools(self) -> dict[str, PoolConfig]:
        """The pools of the steps, by name: those that somebody reads. One that would stand beside
        a pool that is not started stands by itself."""
        names = [name for name, readers in self.pool_readers.items() if readers]
        pools = {name: self.pools.by_name[name] for name in names}
        return {
            name: pool
            if pool.colocate_with is None or pool.colocate_with in names
            else pool.model_copy(update={"colocate_with": None})
            for name, pool in pools.items()
        }

    @property
    def teacher_writes_first(self) -> bool:
        """Whether teacher_rollout starts before the others, writes what is measured and evaluated
        of it, and ends: no step reads it."""
        return not self.pool_readers["teacher_rollout"] and self.distill.measure_every is not None

    @property
    def _student_pools(self) -> dict[str, PoolConfig]:
        """The pools whose workers hold the student and receive its weights, by name."""
        names = ("student_rollout", "evaluation")
        return {name: pool for name, pool in self.pools.by_name.items() if name in names}

    @property
    def export_dtype(self) -> Literal["float32", "bfloat16"]:
        """Precision of the exported student: export.dtype, or that which the run computed in."""
        if self.export.dtype is not None:
            return self.export.dtype
        computed = {self.learner.compute_dtype, self.rollout.student_engine.dtype}
        return "bfloat16" if "bfloat16" in computed else "float32"

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(f"name must be letters, digits, '.', '_' and '-', got {name!r}")
        if len(name) > LONGEST_RUN_NAME:
            raise ValueError(
                f"name must have at most {LONGEST_RUN_NAME} characters, got {len(name)}"
            )
        return name

    @field_validator("curriculum")
    @classmethod
    def _check_stages(
        cls, stages: tuple[dict[str, JsonValue], ...]
    ) -> tuple[dict[str, JsonValue], ...]:
        names = [stage.get("name") for stage in stages]
        for name in names:
            is_plain = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][\w-]{0,99}", name)
            if not is_plain or name in ("previous", "initial") or names.count(name) > 1:
                raise ValueError(
                    "each stage needs a name of its own of letters, digits, '_' and '-', other "
                    f"than previous and initial, got {names}"
                )
        return stages

    @model_validator(mode="after")
    def _check_ranks(self) -> RunConfig:
        ranks, distill = self.pools.learner.count, self.distill
        for stream in ("on_policy", "off_policy"):
            count = distill.sequences(stream)
            if 0 < count < ranks:
                raise ValueError(
                    f"each step's {stream} stream must have at least pools.learner.count={ranks} "
                    f"sequences, so that every rank has a share, got {count}"
                )
        if 0 < distill.plain_text_sequences < ranks:
            raise ValueError(
                f"distill.language_model.sequences_per_step must be at least pools.learner.count="
                f"{ranks}, so that every rank has a share, got {distill.plain_text_sequences}"
            )
        share = distill.staleness.min_on_policy_share
        fewest = math.ceil(distill.sequences("on_policy") * share)
        if 0 < fewest < ranks:
            raise ValueError(
                f"distill.staleness.min_on_policy_share={share} lets a step begin with {fewest} of "
                f"the student's sequences: expected at least pools.learner.count={ranks}, so that "
                "every rank has a share"
            )
        for role in ("teacher", "student"):
            sft = getattr(self, role).sft
            if sft is not None and sft.batch_size < ranks:
                raise ValueError(
                    f"{role}.sft.batch_size must be at least pools.learner.count={ranks}, so that "
                    f"every rank has a share, got {sft.batch_size}"
                )
        return self

    @model_validator(mode="after")
    def _check_importance(self) -> RunConfig:
        importance, sampling = self.distill.staleness.importance, self.rollout.sampling
        if importance != "none" and not sampling.can_be_read_again:
            raise ValueError(
                "distill.staleness.importance divides the student's probability of a token by that "
                "which it was sampled with; rollout.sampling.top_p and min_p cut tokens off and "
                "scale up the rest, otherwise under each version of the student: expected top_k "
                "too, with which the tokens that are left are recorded, or top_p=1 and min_p=0, or "
                f"importance=none, got top_p={sampling.top_p}, min_p={sampling.min_p}, top_k=null "
                f"and importance={importance}"
            )
        return self

    @model_validator(mode="after")
    def _check_best(self) -> RunConfig:
        distill = self.distill
        measured = HELD_OUT_MEASURES if distill.measure_every is not None else ()
        known = [f"held_out/{name}" for name in measured]
        known += [name for split in self.data.evaluation for name in self.evaluation.names(split)]
        asked = {"keep_best": distill.keep_best, "early_stopping": distill.early_stopping}
        for key, chosen in asked.items():
            if chosen is not None and chosen.metric not in known:
                near = difflib.get_close_matches(chosen.metric, known, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(
                    f"distill.{key}.metric: this run measures no {chosen.metric!r}; {hint}choose "
                    f"one of {', '.join(known)}"
                )
        return self

    @model_validator(mode="after")
    def _check_export(self) -> RunConfig:
        if self.export.weights == "best" and self.distill.keep_best is None:
            raise ValueError(
                "export.weights=best exports the best checkpoint, and nothing says by which metric "
                "it is best: give distill.keep_best, such as "
                "{metric: held_out/cross_entropy, mode: min}"
            )
        return self

    @model_validator(mode="after")
    def _check_shards(self) -> RunConfig:
        ranks, share = self.pools.learner.count, self.learner.shard_ranks
        if ranks % self.learner.shard_size(ranks):
            raise ValueError(
                "learner.shard_ranks ranks share one copy of the model: expected a divisor of "
                f'pools.learner.count={ranks} or "all", got {share}'
            )
        return self

    @model_validator(mode="after")
    def _check_scorers(self) -> RunConfig:
        ranks, pool = self.scoring.shard_ranks, self.pools.teacher_scoring
        if pool.gpus > 1.0:
            raise ValueError(
                "a scorer's rank computes on one GPU: expected pools.teacher_scoring.gpus of at "
                f"most 1, got {pool.gpus}. A teacher is shared by {pool.gpus:g} GPUs with "
                f"pools.teacher_scoring.gpus=1 and scoring.shard_ranks={pool.gpus:g}"
            )
        if ranks > 1 and 0.0 < pool.gpus < 1.0:
            raise ValueError(
                "a scorer's ranks meet over NCCL, which wants a GPU of its own for each: expected "
                f"pools.teacher_scoring.gpus of 0 or 1 for scoring.shard_ranks={ranks}, got "
                f"{pool.gpus}"
            )
        if ranks > 1 and pool.colocate_with is not None:
            raise ValueError(
                f"a scorer of scoring.shard_ranks={ranks} takes as many places, a rollout worker "
                "one: expected pools.teacher_scoring.colocate_with=null, got "
                f"{pool.colocate_with}"
            )
        return self

    @model_validator(mode="after")
    def _check_scaling(self) -> RunConfig:
        staleness = self.distill.staleness.max_staleness
        if self.scaling.automatic and staleness == 0:
            raise ValueError(
                "scaling.automatic reads which pool waits for which, and with "
                "distill.staleness.max_staleness=0 they take turns: expected max_staleness >= 1 or "
                "scaling.automatic=false"
            )
        if self.scaling.automatic and not any(
            pool.is_elastic for name, pool in self.started_pools.items() if name in ELASTIC_POOLS
        ):
            raise ValueError(
                "scaling.automatic has nothing to change: expected min_count below max_count in "
                f"one of pools.{', pools.'.join(ELASTIC_POOLS)}"
            )
        if self.scaling.budget is not None:
            self._check_budget(*self.scaling.budget)
        return self

    def _check_budget(self, resource: Literal["gpus", "cpus"], total: float) -> None:
        pools = {name: pool for name, pool in self.started_pools.items() if pool.is_elastic}
        without = [name for name, pool in pools.items() if getattr(pool, resource) == 0.0]
        if without:
            raise ValueError(
                f"scaling.total_{resource} is shared by the pools that may change: expected "
                f"pools.{without[0]}.{resource} > 0, got 0"
            )
        held = sum(
            pool.count * self.ranks_per_worker(name) * float(getattr(pool, resource))
            for name, pool in pools.items()
        )
        if held > total + 1e-6:
            raise ValueError(
                f"scaling.total_{resource}: {' and '.join(pools)} begin with {held:g} together, "
                f"count times {resource}: expected at most {total:g}"
            )

    @model_validator(mode="after")
    def _check_devices(self) -> RunConfig:
        learner = self.pools.learner.gpus
        for name, pool in self._student_pools.items():
            if self.rollout.engine == "vllm" and (learner > 0) != (pool.gpus > 0):
                raise ValueError(
                    f"learner and {name} must both have GPUs or both have none where vLLM "
                    f"generates, got pools.learner.gpus={learner} and pools.{name}.gpus="
                    f"{pool.gpus}; with rollout.engine=transformers either may"
                )
        return self

    @model_validator(mode="after")
    def _check_engine(self) -> RunConfig:
        if self.rollout.engine == "vllm":
            return self
        for name in ("student_rollout", "teacher_rollout", "evaluation"):
            pool = self.pools.by_name.get(name)
            if pool is not None and pool.gpus > 1.0:
                raise ValueError(
                    f"rollout.engine=transformers computes on one GPU: expected pools.{name}.gpus "
                    f"of at most 1, got {pool.gpus}. Tensor parallelism is vLLM's"
                )
        for key in ("sleep_when_idle", "enable_prefix_caching"):
            for role in ("student", "teacher"):
                if getattr(getattr(self.rollout, f"{role}_engine"), key):
                    raise ValueError(
                        f"rollout.{role}_engine.{key} is vLLM's: expected false with "
                        "rollout.engine=transformers"
                    )
        return self

    @model_validator(mode="after")
    def _check_sleep(self) -> RunConfig:
        if self.rollout.student_engine.sleep_when_idle:
            raise ValueError(
                "rollout.student_engine.sleep_when_idle: new weights come while the student's "
                "engine is idle; expected false, only the teacher's may sleep"
            )
        if self.rollout.teacher_engine.sleep_when_idle and self.pools.teacher_rollout.gpus == 0:
            raise ValueError(
                "rollout.teacher_engine.sleep_when_idle gives a GPU's memory free, and vLLM has no "
                "sleep on a CPU: expected pools.teacher_rollout.gpus > 0 or sleep_when_idle=false"
            )
        return self

    def say_context(self, role: str) -> str:
        """What the teacher's length has more, for messages."""
        has_more = role == "teacher" and self.data.teacher_context is not None
        return " + data.teacher_context.max_tokens" if has_more else ""

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        for role in ("teacher", "student"):
            model: ModelConfig = getattr(self, role)
            if model.sft is not None and getattr(self.data, f"{role}_sft") is None:
                raise ValueError(f"{role}.sft needs rows: give data.{role}_sft")
            if model.architecture is not None:
                is_teacher = role == "teacher"
                longest = self.teacher_model_length if is_teacher else self.max_model_length
                if longest > model.architecture.max_position_embeddings:
                    raise ValueError(
                        f"{role}.architecture.max_position_embeddings must be at least "
                        "data.max_prompt_tokens + rollout.sampling.max_response_tokens"
                        f"{self.say_context(role)} = {longest}, got "
                        f"{model.architecture.max_position_embeddings}"
                    )
        sources = self.distill.off_policy_mixture
        if "store" in sources and self.data.teacher_context is not None:
            raise ValueError(
                "data.teacher_context: stored samples do not say after which prompt the teacher "
                "wrote them; expected distill.off_policy_source of teacher or dataset, got store"
            )
        if "dataset" in sources and self.data.student_sft is None:
            raise ValueError(
                "distill.off_policy_source=dataset needs rows: give data.student_sft, or "
                "distill.off_policy_source=teacher, which needs prompts alone: the teacher writes "
                "the text. Recipes of --objective such as gkd set dataset"
            )
        if "store" in sources and self.data.trajectory_store is None:
            raise ValueError(
                "distill.off_policy_source=store needs samples: give data.trajectory_store, and "
                "fill it with `distill-system generate`"
            )
        if "preferences" in sources and self.data.preferences is None:
            raise ValueError(
                "distill.off_policy_source=preferences needs pairs: give data.preferences, rows "
                "with a preferred and a rejected answer"
            )
        if self.distill.plain_text_sequences and self.data.plain_text is None:
            raise ValueError(
                "distill.language_model needs text: give data.plain_text, such as "
                "{type: datasets, name: Skylion007/openwebtext}, or set distill.language_model=null"
            )
        pretrained = isinstance(self.tokenizer, PretrainedTokenizer) and self.tokenizer.path is None
        if pretrained and self.teacher.path is None:
            raise ValueError(
                "the teacher starts from random weights and has no tokenizer of its own: "
                "give tokenizer.type=embedded or train_bpe, or tokenizer.path"
            )
        if isinstance(self.tokenizer, PretrainedTokenizer):
            return self
        for role in ("teacher", "student"):
            if getattr(self, role).path is not None:
                raise ValueError(
                    f"{role}.path is a pretrained model, whose vocabulary a tokenizer of "
                    f"type {self.tokenizer.type} cannot match: use tokenizer.type=pretrained"
                )
        return self

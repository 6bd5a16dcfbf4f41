"""One learner rank's load in -> the memory of its fullest moment, by the learner's own step.

The step runs under sizes.SizeTracker, on tensors without values. Three things differ from a run:

    ranks       one, in a process group that sends nothing; FSDP2 shards and gathers as it would
    device      the CPU's kernels, since torch without CUDA makes no fake tensors of its: in
                bfloat16 attention and products make a copy more than they do on a GPU
    parts       of a step in many microbatches few are read, and a line drawn to the others
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from distill_system.config.model import LoraUpdate
from distill_system.config.objective import TeacherNeeds
from distill_system.language_model import LanguageModel, count_parts, unembedding
from distill_system.learner import Learner, ModelSource
from distill_system.learner.acting_weights import set_aside
from distill_system.learner.adapters import add_adapters
from distill_system.learner.collate import LearnerBatch, StreamTotals
from distill_system.learner.optimizer import build_optimizers
from distill_system.learner.ranks import Ranks
from distill_system.learner.sharding import (
    Policy,
    allocate,
    build_mesh,
    prepare_blocks,
    shard_policy,
    shard_rows,
)
from distill_system.learner.teacher_matrices import TeacherMatrices
from distill_system.objectives import (
    Importance,
    PolicyHeads,
    TeacherRows,
    build_objective,
    chunked_products,
)
from distill_system.planning.loads import LearnerLoad
from distill_system.planning.memory import Memory, fullest_moment
from distill_system.planning.shapes import build_empty
from distill_system.planning.sizes import Sizes, SizeTracker
from distill_system.records import Stream, TeacherTargets, TrajectoryChunk

CPU = torch.device("cpu")
_SHARING = "learner.shard_ranks, learner.offload"
LOWERED_BY = {
    "weights": _SHARING,
    "weights set aside": f"{_SHARING}, learner.compute_dtype=float32",
    "optimizer state": f"{_SHARING}, an optimizer of type muon, distill.update.type=lora",
    "gradients": f"{_SHARING}, distill.update.type=lora",
    "optimizer's workspace": f"{_SHARING}, distill.update.type=lora",
    "teacher's matrices": "distill.action_dimension, scoring.dtype=bfloat16, learner.shard_ranks",
    "activations": "learner.max_tokens_per_microbatch, learner.activation_checkpointing",
    "backward": "learner.max_tokens_per_microbatch, learner.vocabulary_chunk_tokens",
    "loss": "learner.vocabulary_chunk_tokens",
    "rows of the step": (
        "distill.student_prompts_per_step, distill.teacher_prompts_per_step, "
        "distill.language_model.sequences_per_step, more ranks"
    ),
}
RESTING = frozenset({"weights", "weights set aside", "optimizer state", "gradients"})
"""What learner.offload keeps in CPU memory."""
FEW_PARTS = (2, 3)
"""Microbatches that are read of a step in more: each further one brings but its rows."""


def learner_memory(load: LearnerLoad) -> Memory:
    """The fullest moment of a learner rank's step."""
    lengths = [t.token_ids.size for chunk in load.chunks for t in chunk.trajectories]
    num_parts = count_parts(lengths, load.config.max_tokens_per_microbatch)
    steps = [load.chunks]
    if num_parts > max(FEW_PARTS):
        steps = [[_first(chunk, few / num_parts) for chunk in load.chunks] for few in FEW_PARTS]
    leaves = load.config.offload and load.on_gpu  # on a CPU it is the same memory
    elsewhere = RESTING if leaves else frozenset[str]()
    sizes, model = SizeTracker(elsewhere), _build_empty_student(load)
    is_alone = load.num_ranks == 1 and not load.config.offload
    shards = load.config.shard_size(load.num_ranks)
    meeting = nullcontext() if is_alone else mesh_of_one(load.num_ranks, shard_ranks=shards)
    with meeting as mesh, blocks_of_a_gpu(on_gpu=load.on_gpu), sizes:
        learner = SizedLearner(load, model, sizes, mesh)
        moments = [learner.measure_step(chunks) for chunks in steps]
    if len(steps) == 1:
        return fullest_moment(moments[0], LOWERED_BY, elsewhere)
    fewer, more = (sum(len(chunk.trajectories) for chunk in chunks) for chunks in steps)
    line = _draw_line(moments[0], moments[1], (len(lengths) - fewer) / (more - fewer))
    return fullest_moment(line, LOWERED_BY, elsewhere)


def _build_empty_student(load: LearnerLoad) -> LanguageModel:
    model = build_empty(load.student)
    if isinstance(load.update, LoraUpdate):
        add_adapters(model, load.update, seed=0)
    return model


def _first(chunk: TrajectoryChunk, share: float) -> TrajectoryChunk:
    count = max(1, round(share * len(chunk.trajectories)))
    return replace(chunk, trajectories=chunk.trajectories[:count])


def _draw_line(
    start: Mapping[str, Sizes], end: Mapping[str, Sizes], length: float
) -> dict[str, Sizes]:
    """Each moment's bytes at `length` times the way from start to end."""
    return {
        moment: {
            label: (1.0 - length) * start[moment].get(label, 0.0) + length * held.get(label, 0.0)
            for label in {*held, *start[moment]}
        }
        for moment, held in end.items()
    }


@contextmanager
def mesh_of_one(num_ranks: int, *, shard_ranks: int) -> Iterator[DeviceMesh]:
    """The mesh that the first of these ranks is on; none of the others is there."""
    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    try:
        yield build_mesh(CPU, num_ranks=num_ranks, shard_ranks=shard_ranks)
    finally:
        dist.destroy_process_group()


@contextmanager
def blocks_of_a_gpu(*, on_gpu: bool) -> Iterator[None]:
    """Elementwise work over the vocabulary in a GPU's blocks, on the CPU's tensors as well."""
    elements = chunked_products.GPU_BLOCK_ELEMENTS
    with (
        patch.object(chunked_products, "CPU_BLOCK_ELEMENTS", elements) if on_gpu else nullcontext()
    ):
        yield


class _Alike(Ranks):
    """One rank of several that all say the same."""

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor if self.world_size == 1 else tensor.clone()

    def max(self, value: Any) -> Any:
        return value


def _step_in_place() -> None:
    """A fused AdamW's: it holds nothing beside its state."""


class _SizedPolicy(Policy):
    """What is made while the model is read are activations."""

    sizes: SizeTracker

    def __call__(self, *arguments: Any) -> Any:
        with self.sizes.labelled("activations"):
            return super().__call__(*arguments)


class SizedLearner(Learner):
    """The learner with weights that nobody reads, that tells the tracker what it does."""

    def __init__(
        self, load: LearnerLoad, model: LanguageModel, sizes: SizeTracker, mesh: DeviceMesh | None
    ) -> None:
        self.load_of, self.model, self.sizes = load, model, sizes
        chunk_tokens = load.config.chunk_tokens(on_gpu=load.on_gpu)
        self.config = load.config.model_copy(update={"vocabulary_chunk_tokens": chunk_tokens})
        self.optimizer_config, self.total_steps = load.optimizer, 1
        self.device, self.source = CPU, ModelSource(update=load.update)
        self.ranks = _Alike(
            rank=0, world_size=load.num_ranks, device=CPU, timeout_seconds=1.0, alone=mesh is None
        )
        self.reads_older_text = load.staleness.max_staleness > 0
        self.language_model_weight = 1.0  # of whatever weight, it holds as much
        self.importance = Importance(
            kind=load.staleness.importance, cap=load.staleness.importance_cap
        )
        self.objective = build_objective(
            load.objective,
            max_response_tokens=max(
                t.num_response_tokens for chunk in load.chunks for t in chunk.trajectories
            ),
            total_steps=1,
            importance=self.importance,
        )
        with sizes.labelled("weights"):
            self._build_policy(mesh)
        with sizes.labelled("teacher's matrices"):
            self._build_teacher(mesh)
        ends = [self.model.get_input_embeddings().weight, unembedding(self.model)]
        self.optimizers = build_optimizers(self.model, ends, load.optimizer)
        with sizes.labelled("optimizer's workspace"):
            self._make_optimizer_state()

    def _build_policy(self, mesh: DeviceMesh | None) -> None:
        load = self.load_of
        allocate(self.model, CPU)
        policy = _SizedPolicy(self.model, device=CPU, compute_dtype=load.config.compute_dtype)
        policy.sizes, self.policy = self.sizes, policy
        prepare_blocks(self.model, load.config)
        if mesh is not None:
            shard_policy(policy, mesh, load.config)
            policy(lambda model: None)  # so that what is gathered once a step has been
            policy.release()

    def _build_teacher(self, mesh: DeviceMesh | None) -> None:
        """Its matrices, as large as those that a run reads from files."""
        load, rows = self.load_of, self.load_of.student.vocabulary
        self.teacher = TeacherMatrices(self.source, None, vocabulary_size=0, device=CPU, mesh=None)
        actions_VE = torch.empty(rows, load.action_columns)
        self.teacher.action_embeddings_VE = shard_rows(actions_VE, CPU, mesh)
        if load.objective is not None and load.objective.needs_teacher_distribution:
            assert load.teacher is not None, "a distribution of the teacher's has a teacher"
            dtype = getattr(torch, load.teacher_dtype)
            matrix_VF = torch.empty(rows, load.teacher.row_size, dtype=dtype)
            self.teacher.unembedding_VF = shard_rows(matrix_VF, CPU, mesh)

    def _make_optimizer_state(self) -> None:
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
                parameter.register_post_accumulate_grad_hook(
                    lambda p: self.sizes.relabel(p.grad, "gradients")
                )
        adamws = [each for each in self.optimizers if isinstance(each, torch.optim.AdamW)]
        for group in (group for each in adamws for group in each.param_groups):
            # An offloaded one's parameters are a CPU's, where torch goes one by one as well.
            group["foreach"] = False if self.load_of.on_gpu else None
        self._update(0)
        if self.load_of.on_gpu and not self.config.offload:
            for each in adamws:
                each.step = _step_in_place  # type: ignore[method-assign,assignment]
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                for tensor in state.values():
                    self.sizes.relabel(tensor, "optimizer state")

    def measure_step(self, chunks: Sequence[TrajectoryChunk]) -> dict[str, Sizes]:
        """What is held in each moment of a step of these."""
        totals = {chunk.stream: StreamTotals.of(chunk.trajectories) for chunk in chunks}
        self.sizes.forget_peaks()
        with self.sizes.labelled("rows of the step"):
            self.step(0, chunks, totals)
        return self.sizes.fullest

    def _collate(
        self,
        chunks: Sequence[TrajectoryChunk],
        targets: Sequence[Sequence[TeacherTargets] | None],
        totals: Mapping[Any, StreamTotals],
    ) -> LearnerBatch:
        batch = super()._collate(chunks, (), totals)
        objective = self.load_of.objective
        if objective is None:
            return batch
        rows = {
            stream: self._teacher_rows(objective.teacher_needs(stream.side), total.num_tokens)
            for stream, total in totals.items()
            if stream is not Stream.PLAIN_TEXT
        }
        return replace(batch, teacher=rows)

    def _teacher_rows(self, needs: TeacherNeeds, num_tokens: int) -> TeacherRows:
        load = self.load_of
        assert load.teacher is not None, "an objective has a teacher"
        return TeacherRows(
            features_NF=torch.empty(num_tokens, load.teacher.row_size) if needs.features else None,
            expected_embedding_NE=(
                torch.empty(num_tokens, load.action_columns) if needs.expected_embedding else None
            ),
            logprobs_N=torch.empty(num_tokens) if needs.logprobs else None,
            top_k_ids_NK=(
                torch.empty(num_tokens, needs.top_k, dtype=torch.int64) if needs.top_k else None
            ),
            top_k_logprobs_NK=torch.empty(num_tokens, needs.top_k) if needs.top_k else None,
        )

    @contextmanager
    def _acting(self, version: int) -> Iterator[None]:
        with self.sizes.labelled("weights set aside"):
            own = set_aside(self.model) if self.load_of.sets_aside else []
        yield
        del own

    def _heads(self) -> PolicyHeads:
        self.sizes.label = "loss"
        return super()._heads()

    def _require_finite(self, loss: float, step: int) -> None:
        self.sizes.label = "backward"

    def _update(self, step: int) -> tuple[float, float]:
        self.sizes.label = "optimizer's workspace"
        return super()._update(step)

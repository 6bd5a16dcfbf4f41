"""A scorer's call in -> the memory of its fullest moment, by the scorer's own code (sizes.py)."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distill_system.config.model import LearnerConfig
from distill_system.config.objective.needs import Signal
from distill_system.config.run import RunConfig
from distill_system.language_model import LanguageModel
from distill_system.learner.sharding import Policy, allocate, shard_policy, shard_rows
from distill_system.planning.learner_memory import CPU, blocks_of_a_gpu, mesh_of_one
from distill_system.planning.loads import scored_at_once, teacher_needs
from distill_system.planning.memory import Memory, fullest_moment
from distill_system.planning.shapes import ModelShape, build_empty
from distill_system.planning.sizes import SizeTracker
from distill_system.scoring import RankedScorer, TeacherScorer

LOWERED_BY = {
    "weights": "scoring.shard_ranks, scoring.dtype=bfloat16",
    "gathered weights": "scoring.dtype=bfloat16",
    "action embeddings": "distill.action_dimension, scoring.shard_ranks",
    "a forward pass": "scoring.max_tokens_per_batch",
    "rows of a call": "more learner ranks, learner.vocabulary_chunk_tokens",
}


def scorer_memory(config: RunConfig, teacher: ModelShape) -> Memory:
    """The fullest moment of a scorer's call; of one that several ranks make up, of one of them."""
    (chunk,) = scored_at_once(config)
    ranks = config.scoring.shard_ranks
    share = chunk.trajectories[: -(-len(chunk.trajectories) // ranks)]
    meeting = nullcontext() if ranks == 1 else mesh_of_one(ranks, shard_ranks=ranks)
    model = build_empty(teacher).to(getattr(torch, config.scoring.dtype)).requires_grad_(False)
    on_gpu = config.pools.teacher_scoring.gpus > 0
    with meeting as mesh, blocks_of_a_gpu(on_gpu=on_gpu), SizeTracker() as sizes, torch.no_grad():
        kind = SizedScorer if mesh is None else SizedRank
        scorer = kind(config, model, sizes, mesh)
        sizes.forget_peaks()
        with sizes.labelled("a forward pass"):
            scorer._read_batch(scorer._collate(share), share, teacher_needs(config))
        return fullest_moment(sizes.fullest, LOWERED_BY)


class SizedScorer(TeacherScorer):
    """The scorer with weights that nobody reads; its answers are empty."""

    def __init__(
        self, config: RunConfig, model: LanguageModel, sizes: SizeTracker, mesh: DeviceMesh | None
    ) -> None:
        on_gpu = config.pools.teacher_scoring.gpus > 0
        self.config, self.chunk_tokens = config.scoring, config.learner.chunk_tokens(on_gpu=on_gpu)
        self.device, self.shares_gpu, self.sizes = CPU, False, sizes
        self.model, self.vocabulary_size = model, None
        rows, columns = model.get_input_embeddings().weight.shape
        with sizes.labelled("weights"):
            self._place(mesh)
        with sizes.labelled("action embeddings"):
            actions_VE = torch.empty(rows, min(columns, config.distill.action_dimension or columns))
            self.action_embeddings_VE = shard_rows(actions_VE, CPU, mesh)

    def _place(self, mesh: DeviceMesh | None) -> None:
        allocate(self.model, CPU)

    def _require_finite(self, hidden_NH: Tensor, trajectories: object) -> None:
        self.sizes.label = "rows of a call"

    def _to_wire(self, rows: Tensor, signal: Signal) -> np.ndarray:
        """The copy that the scorer makes is counted; the array has rows and no columns."""
        half = signal.may_be_half and self.config.dtype == "bfloat16"
        full = signal.dtypes[0 if half else -1]
        rows.to(getattr(torch, full))
        return np.zeros((len(rows), 0)[: rows.ndim], dtype=full)


class SizedRank(SizedScorer, RankedScorer):
    """A rank's share, in a group that sends nothing."""

    def _place(self, mesh: DeviceMesh | None) -> None:
        assert mesh is not None, "ranks have met"
        self.policy = Policy(self.model, device=CPU, compute_dtype="float32")
        shard_policy(self.policy, mesh, LearnerConfig())
        allocate(self.model, CPU)
        self.policy(lambda model: None)  # so that what is gathered has been, once
        self.policy.release()

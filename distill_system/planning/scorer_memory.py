"""A scorer's call in -> the memory of its fullest moment, by the scorer's own code (sizes.py)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distill_system.config.objective.needs import Signal
from distill_system.config.run import RunConfig
from distill_system.language_model import LanguageModel, unembedding
from distill_system.learner.sharding import allocate
from distill_system.planning.learner_memory import CPU, blocks_of_a_gpu
from distill_system.planning.loads import scored_at_once, teacher_needs
from distill_system.planning.memory import Memory, fullest_moment
from distill_system.planning.shapes import ModelShape, build_empty
from distill_system.planning.sizes import SizeTracker
from distill_system.scoring import TeacherScorer

LOWERED_BY = {
    "weights": "scoring.dtype=bfloat16",
    "action embeddings": "distill.action_dimension",
    "a forward pass": "scoring.max_tokens_per_batch",
    "rows of a call": "more learner ranks, learner.vocabulary_chunk_tokens",
}


def scorer_memory(config: RunConfig, teacher: ModelShape) -> Memory:
    """The fullest moment of a scorer's call."""
    (chunk,) = scored_at_once(config)
    model = build_empty(teacher).to(getattr(torch, config.scoring.dtype)).requires_grad_(False)
    with blocks_of_a_gpu(on_gpu=config.pools.teacher_scoring.gpus > 0), SizeTracker() as sizes:
        scorer = SizedScorer(config, model, sizes)
        with torch.no_grad(), sizes.labelled("a forward pass"):
            scorer._score(chunk.trajectories, teacher_needs(config))
        return fullest_moment(sizes.fullest, LOWERED_BY)


class SizedScorer(TeacherScorer):
    """The scorer with weights that nobody reads; its answers are empty."""

    def __init__(self, config: RunConfig, model: LanguageModel, sizes: SizeTracker) -> None:
        on_gpu = config.pools.teacher_scoring.gpus > 0
        self.config, self.chunk_tokens = config.scoring, config.learner.chunk_tokens(on_gpu=on_gpu)
        self.device, self.shares_gpu, self.sizes = CPU, False, sizes
        with sizes.labelled("weights"):
            allocate(model, CPU)
        self.model = model
        self.unembedding_VH = unembedding(self.model)
        with sizes.labelled("action embeddings"):
            rows, columns = model.get_input_embeddings().weight.shape
            most = config.distill.action_dimension or columns
            self.action_embeddings_VE = torch.empty(rows, min(columns, most))

    def _require_finite(self, hidden_NH: Tensor, trajectories: object) -> None:
        self.sizes.label = "rows of a call"

    def _to_wire(self, rows: Tensor, signal: Signal) -> np.ndarray:
        """The copy that the scorer makes is counted; the array has rows and no columns."""
        half = signal.may_be_half and self.config.dtype == "bfloat16"
        full = signal.dtypes[0 if half else -1]
        rows.to(getattr(torch, full))
        return np.zeros((len(rows), 0)[: rows.ndim], dtype=full)

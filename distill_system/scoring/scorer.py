"""One teacher scorer: trajectories in -> MomentTargets out.

Axes: N response tokens, H teacher hidden size, E action-embedding size, V vocabulary.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from distill_system.config.run import ScoringConfig
from distill_system.errors import NonFiniteError
from distill_system.language_model import (
    SequenceBatch,
    load_language_model,
    read_hidden,
    unembedding,
)
from distill_system.objectives import read_vocabulary, unit_rows
from distill_system.records import FloatArray, MomentTargets, TrajectoryChunk, WorkDone

FLOAT16_MAX = float(np.finfo(np.float16).max)


class TeacherScorer:
    """Reads trajectories with the frozen teacher, batched by length under a token budget."""

    def __init__(
        self,
        *,
        model_path: str,
        config: ScoringConfig,
        vocabulary_chunk_tokens: int,
        uses_gpu: bool,
        trust_remote_code: bool = False,
    ) -> None:
        torch.set_num_threads(config.threads)
        self.config = config
        self.chunk_tokens = vocabulary_chunk_tokens
        self.device = torch.device("cuda" if uses_gpu else "cpu")
        self.model = load_language_model(
            model_path,
            dtype=getattr(torch, config.dtype),
            device=self.device,
            trust_remote_code=trust_remote_code,
        ).requires_grad_(False)
        self.action_embeddings_VE = unit_rows(self.model.get_input_embeddings().weight)
        self._work = WorkDone()

    def ready(self) -> None:
        """Return once the teacher is loaded."""

    def work_done(self) -> WorkDone:
        """Tokens read, prompts included, and the seconds that took."""
        return self._work

    @torch.inference_mode()
    def score(self, chunk: TrajectoryChunk) -> list[MomentTargets]:
        """Targets of each trajectory, in the chunk's order.

        Features and expected embeddings travel as float16 when the teacher computes in bfloat16
        (whose 8 bits of precision float16 holds), as float32 when it computes in float32.
        Raises: NonFiniteError if the teacher's output is not finite.
        """
        started = time.perf_counter()
        trajectories = chunk.trajectories
        batch = SequenceBatch.collate(
            trajectories, self.device, max_tokens=self.config.max_tokens_per_batch
        )
        hidden_NH = read_hidden(self.model, batch)
        rows = read_vocabulary(
            hidden_NH,
            batch.token_ids_N,
            unembedding(self.model),
            self.action_embeddings_VE,
            chunk_tokens=self.chunk_tokens,
        )
        features_NH = self._to_wire(hidden_NH)
        expected_NE = self._to_wire(rows.expected_embedding_NE)
        logprobs_N = rows.logprobs_N.cpu().numpy()
        if not np.isfinite(logprobs_N).all():
            raise NonFiniteError(
                "the teacher's log-probabilities must be finite, got NaN or infinity on "
                f"{trajectories[0].trajectory_id!r} or a trajectory beside it; "
                "try scoring.dtype=float32"
            )
        ends = np.cumsum([trajectory.num_response_tokens for trajectory in trajectories])
        starts = [0, *ends[:-1]]
        self._work += WorkDone(
            num_tokens=chunk.num_tokens, busy_seconds=time.perf_counter() - started
        )
        return [
            MomentTargets(
                trajectory_id=trajectory.trajectory_id,
                features=features_NH[start:end],
                expected_embedding=expected_NE[start:end],
                logprobs=logprobs_N[start:end],
            )
            for trajectory, start, end in zip(trajectories, starts, ends, strict=True)
        ]

    def _to_wire(self, rows_NX: Tensor) -> FloatArray:
        values = rows_NX.float().cpu().numpy()
        small = self.config.dtype == "bfloat16" and np.abs(values).max(initial=0.0) < FLOAT16_MAX
        return values.astype(np.float16) if small else values

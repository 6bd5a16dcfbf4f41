"""One teacher scorer: trajectories in -> TeacherTargets out.

Axes: N response tokens, H teacher hidden size, E action-embedding size, V vocabulary, X columns of
a signal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from distill_system.config.objective.needs import SIGNALS, Signal, TeacherNeeds
from distill_system.config.rollout import ScoringConfig
from distill_system.errors import NonFiniteError
from distill_system.language_model import (
    LanguageModel,
    SequenceBatch,
    cut_rows,
    find_decoder_start,
    load_language_model,
    logit_cap,
    read_hidden,
    unembedding,
)
from distill_system.objectives import make_action_embeddings, read_top_k, read_vocabulary
from distill_system.records import (
    FloatArray,
    TeacherTargets,
    Trajectory,
    TrajectoryChunk,
)

FLOAT16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True, slots=True)
class Shipped:
    """What scorers have handed on: bytes by the name of the signal, and the response tokens."""

    num_bytes: Mapping[str, int] = field(default_factory=dict)
    num_response_tokens: int = 0

    @classmethod
    def of(cls, targets: Sequence[TeacherTargets]) -> Shipped:
        """Count these."""
        num_bytes = Counter[str]()
        for target in targets:
            for signal in SIGNALS:
                array = getattr(target, signal.name)
                if array is not None:
                    num_bytes[signal.name] += array.nbytes
        return cls(dict(num_bytes), sum(target.num_tokens for target in targets))

    def __add__(self, other: Shipped) -> Shipped:
        return self._joined(other, 1)

    def __sub__(self, other: Shipped) -> Shipped:
        return self._joined(other, -1)

    def _joined(self, other: Shipped, sign: int) -> Shipped:
        names = self.num_bytes.keys() | other.num_bytes.keys()
        return Shipped(
            {n: self.num_bytes.get(n, 0) + sign * other.num_bytes.get(n, 0) for n in sorted(names)},
            self.num_response_tokens + sign * other.num_response_tokens,
        )


class KnownTargets(Protocol):
    """What the teacher has said before, of trajectories that stand somewhere."""

    def read(self, trajectory_ids: Sequence[str]) -> dict[str, TeacherTargets]:
        """Those of them that are known, by id."""


class TeacherScorer:
    """Reads trajectories with the frozen teacher, packed under a token budget.

    vocabulary_size: V, the tokens that its policy is a distribution over; None: every row.
    shares_gpu: with a process that needs the memory between two calls.
    known_targets: what need not be read again; None if nothing is known.
    """

    def __init__(
        self,
        *,
        model_path: str,
        config: ScoringConfig,
        vocabulary_chunk_tokens: int,
        uses_gpu: bool,
        vocabulary_size: int | None = None,
        action_dimension: int | None = None,
        trust_remote_code: bool = False,
        shares_gpu: bool = False,
        known_targets: KnownTargets | None = None,
    ) -> None:
        torch.set_num_threads(config.threads)
        self.config = config
        self.shares_gpu = shares_gpu
        self.known_targets = known_targets
        self.chunk_tokens = vocabulary_chunk_tokens
        self.vocabulary_size, self.action_dimension = vocabulary_size, action_dimension
        self.device = torch.device("cuda" if uses_gpu else "cpu")
        self._shipped = Shipped()
        self._load(model_path, trust_remote_code=trust_remote_code)

    def ready(self) -> None:
        """Return once the teacher is loaded."""

    def _load(self, path: str, *, trust_remote_code: bool) -> None:
        self.model = load_language_model(
            path,
            dtype=getattr(torch, self.config.dtype),
            device=self.device,
            trust_remote_code=trust_remote_code,
        ).requires_grad_(False)
        self.action_embeddings_VE = self._make_actions(self.model)

    def _make_actions(self, model: LanguageModel) -> Tensor:
        embeddings_VE = cut_rows(model.get_input_embeddings().weight, self.vocabulary_size)
        return make_action_embeddings(embeddings_VE, self.action_dimension)

    def shipped(self) -> Shipped:
        """What this scorer has handed on since it started."""
        return self._shipped

    @torch.no_grad()  # not inference_mode, in which no sharded model can be read
    def score(self, chunk: TrajectoryChunk, needs: TeacherNeeds) -> list[TeacherTargets]:
        """Targets of each trajectory, in the chunk's order: what is needed, and no more.

        Each response is read after the teacher's prompt (Trajectory.as_teacher_reads).
        Features and expected embeddings travel as float16 when the teacher computes in bfloat16
        (whose 8 bits of precision float16 holds), as float32 when it computes in float32.
        Raises: NonFiniteError if the teacher's output is not finite.
        """
        ids = [trajectory.trajectory_id for trajectory in chunk.trajectories]
        known = {} if self.known_targets is None else self.known_targets.read(ids)
        unread = [
            each.as_teacher_reads for each in chunk.trajectories if each.trajectory_id not in known
        ]
        if unread:
            known |= {target.trajectory_id: target for target in self._score(unread, needs)}
        targets = [known[trajectory_id] for trajectory_id in ids]
        self._shipped += Shipped.of(targets)
        return targets

    def score_with_receipt(
        self, chunk: TrajectoryChunk, needs: TeacherNeeds
    ) -> tuple[int, list[TeacherTargets]]:
        """The chunk's number of tokens, by which one knows that the rest is there; see score."""
        return chunk.num_tokens, self.score(chunk, needs)

    @torch.no_grad()
    def read_logprobs(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """log pi*(y_t | s_t) of each response token at temperature 1, nats, float32 [T] each.

        What the model says now: nothing that is known is taken, and nothing counts as shipped.
        Raises: NonFiniteError if the teacher's output is not finite.
        """
        read = [each.as_teacher_reads for each in trajectories]
        targets = self._score(read, TeacherNeeds(logprobs=True))
        return [target.logprobs for target in targets if target.logprobs is not None]

    def _score(
        self, trajectories: Sequence[Trajectory], needs: TeacherNeeds
    ) -> list[TeacherTargets]:
        """What the teacher says now."""
        return self._read_batch(self._collate(trajectories), trajectories, needs)

    def _collate(
        self, trajectories: Sequence[Trajectory], num_parts: int | None = None
    ) -> SequenceBatch:
        return SequenceBatch.collate(
            trajectories,
            self.device,
            max_tokens=self.config.max_tokens_per_batch,
            num_parts=num_parts,
            decoder_start=find_decoder_start(self.model),
        )

    def _read_hidden(self, batch: SequenceBatch) -> Tensor:
        return read_hidden(self.model, batch)

    def _read_batch(
        self, batch: SequenceBatch, trajectories: Sequence[Trajectory], needs: TeacherNeeds
    ) -> list[TeacherTargets]:
        hidden_NH = self._read_hidden(batch)
        self._require_finite(hidden_NH, trajectories)
        rows = self._read(hidden_NH, batch.token_ids_N, needs)
        if self.shares_gpu:
            del batch, hidden_NH
            torch.cuda.empty_cache()  # torch would keep what is free for its next call
        counts = np.array([each.num_response_tokens for each in trajectories], dtype=np.int64)
        ends = counts.cumsum()
        return [
            TeacherTargets(
                trajectory_id=trajectory.trajectory_id,
                num_tokens=trajectory.num_response_tokens,
                **{name: array[start:end] for name, array in rows.items()},
            )
            for trajectory, start, end in zip(trajectories, ends - counts, ends, strict=True)
        ]

    def _read(
        self, hidden_NH: Tensor, token_ids_N: Tensor, needs: TeacherNeeds
    ) -> dict[str, np.ndarray]:
        """Every signal that is needed, for all rows, by its name."""
        made: dict[str, Tensor] = {"features": hidden_NH}
        cap, unembedding_VH = logit_cap(self.model.config), self._unembedding()
        if needs.expected_embedding or needs.logprobs:
            actions_VE = self._actions()
            rows = read_vocabulary(
                hidden_NH,
                token_ids_N,
                unembedding_VH,
                # no columns: the product is empty, the log-probabilities are made all the same
                actions_VE if needs.expected_embedding else actions_VE[:, :0],
                chunk_tokens=self.chunk_tokens,
                logit_cap=cap,
            )
            made["expected_embedding"] = rows.expected_embedding_NE
            made["logprobs"] = rows.logprobs_N
        if needs.top_k:
            made["top_k_ids"], made["top_k_logprobs"] = read_top_k(
                hidden_NH,
                unembedding_VH,
                k=min(needs.top_k, len(unembedding_VH)),  # a small vocabulary has no more
                chunk_tokens=self.chunk_tokens,
                logit_cap=cap,
            )
        return {each.name: self._to_wire(made[each.name], each) for each in needs.signals}

    def _unembedding(self) -> Tensor:
        return unembedding(self.model, self.vocabulary_size)

    def _actions(self) -> Tensor:
        return self.action_embeddings_VE

    def _require_finite(self, hidden_NH: Tensor, trajectories: Sequence[Trajectory]) -> None:
        if not self._is_finite(hidden_NH):
            first = trajectories[0].trajectory_id if trajectories else "none"
            raise NonFiniteError(
                "the teacher's hidden states: expected finite numbers, got NaN or infinity on "
                f"{first!r} or a trajectory of the same call; try scoring.dtype=float32"
            )

    def _is_finite(self, hidden_NH: Tensor) -> bool:
        return bool(hidden_NH.isfinite().all())

    def _to_wire(self, rows: Tensor, signal: Signal) -> np.ndarray:
        """[N] or [N, X] in the smallest of the signal's dtypes that loses nothing."""
        dtype = getattr(torch, signal.dtypes[-1])
        # float16 has more digits than bfloat16 but less range: 65504 against 3e38. One number
        # beyond it and the whole array stays in float32.
        if signal.may_be_half and self.config.dtype == "bfloat16" and _is_within_float16(rows):
            dtype = torch.float16
        # Cast where it was made: half the bytes travel, and no thread of the host works on them.
        return _copy_to_host(rows.to(dtype)).numpy()


def _is_within_float16(rows: Tensor) -> bool:
    """Whether no number of these is beyond float16's range; false of NaN."""
    if rows.numel() == 0:
        return True
    return float(torch.linalg.vector_norm(rows, float("inf"))) < FLOAT16_MAX


def _copy_to_host(rows: Tensor) -> Tensor:
    """In CPU memory; from a GPU through pinned memory, four times as fast."""
    if not rows.is_cuda:
        return rows
    host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    host.copy_(rows, non_blocking=True)
    torch.cuda.current_stream(rows.device).synchronize()
    return host

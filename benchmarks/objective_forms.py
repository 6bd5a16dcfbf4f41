"""One objective in one of three forms, timed in this process: ours, dense, or TRL's.

objectives.py starts one process for each, so that the peak of memory is its own, and lets them take
turns: at each message the process makes one forward and backward and answers with the seconds; at
the last message it answers with its peak.

Axes: N tokens, H student hidden size, F teacher feature size, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill_system.config.objective import AmmdConfig, MinillmConfig, TokenMatchingConfig
from distill_system.objectives import (
    PolicyHeads,
    TeacherRows,
    TokenRows,
    build_objective,
    make_action_embeddings,
)
from distill_system.objectives.rows import TokenRows as Rows
from distill_system.objectives.vocabulary import (
    ChunkLoss,
    VocabularyChunk,
    VocabularyRows,
    VocabularySum,
    read_top_k,
)

SEED = 0
ACTION_DIMENSION = 256
"""The default of distill.action_dimension."""
STEP, STOP = "step", "stop"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""Seconds that pass, or that this process has a processor: what a busy machine leaves as it is."""
RESPONSE_TOKENS = 64
TRL_BETAS = {"forward_kl": 0.0, "generalized_jsd": 0.5, "reverse_kl": 1.0}
"""Ours by name -> beta of TRL's ChunkedDivergenceFunction."""


@dataclass(frozen=True)
class Case:
    """What one process measures. objective: a token loss, ammd or minillm, with its settings."""

    form: str
    objective: str
    vocabulary: int
    tokens: int
    hidden: int
    features: int
    chunk_tokens: int
    device: str
    threads: int
    clock: str
    settings: dict[str, Any] = field(default_factory=dict)


class DenseHeads(PolicyHeads):
    """Reads of the whole vocabulary for all tokens at once, as plain PyTorch has them."""

    __slots__ = ()

    def read(self, rows: Rows) -> VocabularyRows:
        logprobs_NV = self._student_logprobs(rows, 1.0)
        return VocabularyRows(
            logprobs_N=logprobs_NV.gather(1, rows.token_ids_N[:, None]).squeeze(1),
            expected_embedding_NE=logprobs_NV.exp() @ self.action_embeddings_VE,
        )

    def sum(
        self,
        rows: Rows,
        chunk_loss: ChunkLoss,
        weights_N: Tensor,
        *,
        temperature: float = 1.0,
        tokens_together: int = 1,
    ) -> VocabularySum:
        logprobs_NV = self._student_logprobs(rows, temperature)
        chunk = VocabularyChunk(
            student_logprobs_cV=logprobs_NV,
            token_ids_c=rows.token_ids_N,
            rows=slice(0, len(rows.token_ids_N)),
            read_teacher=lambda: self._teacher_logprobs(rows, temperature),
        )
        values_N = chunk_loss(chunk)
        return VocabularySum(
            total=(weights_N * values_N).sum(),
            values_N=values_N.detach(),
            logprobs_N=chunk.written_logprobs_c.detach(),
        )

    def _student_logprobs(self, rows: Rows, temperature: float) -> Tensor:
        logits_NV = rows.hidden_NH @ self.unembedding_VH.T
        return (logits_NV.float() / temperature).log_softmax(-1)

    def _teacher_logprobs(self, rows: Rows, temperature: float) -> Tensor:
        with torch.no_grad():
            features_NF = rows.teacher.features_NF.to(self.teacher_unembedding_VF.dtype)
            logits_NV = features_NF @ self.teacher_unembedding_VF.T
            return (logits_NV.float() / temperature).log_softmax(-1)


class Problem:
    """The same tensors in every process: weights of unit-variance logits, random tokens."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.device = torch.device(case.device)
        self.generator = torch.Generator(self.device).manual_seed(SEED)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.hidden_NH = self._draw(case.tokens, case.hidden).requires_grad_()
        self.features_NF = self._draw(case.tokens, case.features)
        self.unembedding_VH = self._draw(case.vocabulary, case.hidden).div_(case.hidden**0.5)
        self.unembedding_VH.requires_grad_()
        self.teacher_unembedding_VF = self._draw(case.vocabulary, case.features)
        self.teacher_unembedding_VF.div_(case.features**0.5)
        self.action_embeddings_VE = make_action_embeddings(
            self._draw(case.vocabulary, case.features), ACTION_DIMENSION
        )
        self.token_ids_N = torch.randint(
            case.vocabulary, (case.tokens,), generator=self.generator, device=self.device
        )

    def build_step(self) -> Callable[[], Tensor]:
        """What computes the loss in the case's form."""
        return self._trl_loss if self.case.form == "trl" else self._build_objective()

    def clear_gradients(self) -> None:
        self.hidden_NH.grad = self.unembedding_VH.grad = None

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device, dtype=self.dtype)

    def _trl_loss(self) -> Tensor:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        values_N, _ = ChunkedDivergenceFunction.apply(
            self.hidden_NH,
            self.unembedding_VH,
            None,
            self.features_NF,
            self.teacher_unembedding_VF,
            None,
            TRL_BETAS[self.case.objective],
        )
        return values_N.mean()

    def _build_objective(self) -> Callable[[], Tensor]:
        config = build_config(self.case.objective, self.case.settings)
        objective = build_objective(config, max_response_tokens=RESPONSE_TOKENS, total_steps=1000)
        heads = (DenseHeads if self.case.form == "dense" else PolicyHeads)(
            unembedding_VH=self.unembedding_VH,
            action_embeddings_VE=self.action_embeddings_VE,
            teacher_unembedding_VF=self.teacher_unembedding_VF,
            chunk_tokens=self.case.chunk_tokens,
        )
        teacher = self._read_teacher(config.teacher_needs("on_policy").top_k)

        def compute() -> Tensor:
            rows = self._streams(config, teacher)
            return objective.compute_loss(heads, *rows, lambda share: share).loss_share

        return compute

    def _read_teacher(self, top_k: int) -> TeacherRows:
        tokens, width = self.case.tokens, self.action_embeddings_VE.shape[1]
        ids_NK = logprobs_NK = None
        if top_k:
            ids_NK, logprobs_NK = read_top_k(
                self.features_NF, self.teacher_unembedding_VF, k=top_k, chunk_tokens=64
            )
        return TeacherRows(
            features_NF=self.features_NF.float(),
            expected_embedding_NE=torch.full((tokens, width), 0.01, device=self.device),
            logprobs_N=torch.full((tokens,), -10.0, device=self.device),
            top_k_ids_NK=ids_NK,
            top_k_logprobs_NK=logprobs_NK,
        )

    def _streams(
        self, config: AmmdConfig | MinillmConfig | TokenMatchingConfig, teacher: TeacherRows
    ) -> list[Rows | None]:
        """All tokens on-policy, or half of them in each stream where the objective reads both."""
        if not config.reads("off_policy"):
            return [None, self._rows(slice(0, self.case.tokens), teacher)]
        half = self.case.tokens // 2
        return [self._rows(slice(0, half), teacher), self._rows(slice(half, 2 * half), teacher)]

    def _rows(self, rows: slice, teacher: TeacherRows) -> Rows:
        number = rows.stop - rows.start
        index_N = torch.arange(number, device=self.device)
        part = {
            name: None if getattr(teacher, name) is None else getattr(teacher, name)[rows]
            for name in TeacherRows.__slots__
        }
        return TokenRows(
            hidden_NH=self.hidden_NH[rows],
            token_ids_N=self.token_ids_N[rows],
            sequence_ids_N=index_N // RESPONSE_TOKENS,
            positions_N=index_N % RESPONSE_TOKENS,
            num_global_tokens=number,
            num_global_sequences=number // RESPONSE_TOKENS,
            teacher=TeacherRows(**part),
        )


def build_config(
    objective: str, settings: dict[str, Any]
) -> AmmdConfig | MinillmConfig | TokenMatchingConfig:
    """The configuration of an objective, or of a token loss on the student's text."""
    match objective:
        case "ammd":
            return AmmdConfig(**settings)
        case "minillm":
            return MinillmConfig(type="minillm", **settings)
        case _:
            loss = {"type": objective, **settings}
            return TokenMatchingConfig(type="token_matching", on_policy=loss, on_policy_weight=1.0)


class PeakMemory:
    """Bytes above what was held when the object was made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from here
        self.base_bytes = self._read()

    def above_base(self) -> int:
        return self._read() - self.base_bytes

    def _read(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        lines = Path("/proc/self/status").read_text().splitlines()
        [line] = [line for line in lines if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024


def serve(case: Case, pipe: Connection) -> None:
    """Answer each STEP with the seconds of one, and the STOP with the peak of memory in bytes."""
    torch.set_num_threads(case.threads)
    read_clock = CLOCKS[case.clock]
    problem = Problem(case)
    compute = problem.build_step()
    memory = PeakMemory(problem.device)
    while pipe.recv() == STEP:
        problem.clear_gradients()
        _synchronise(problem.device)
        started = read_clock()
        compute().backward()
        _synchronise(problem.device)
        pipe.send(read_clock() - started)
    pipe.send(memory.above_base())


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

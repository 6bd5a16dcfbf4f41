"""The student's step in our learner, packed; and the same step with a padded batch, as its rival.

Supervised, so that TRL's SFTTrainer does the same: loss on the responses alone, AdamW, clipping.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from learner_case import (
    SEED,
    Case,
    begin_memory,
    build_plain_model,
    deal_steps,
    measure_peak_flops,
    synchronise,
)
from learner_case import Sequence as Ragged
from objective_forms import CLOCKS, STEP

from distill_system.config.model import LearnerConfig, OptimizerConfig
from distill_system.language_model import unembedding
from distill_system.learner import Learner, ModelSource
from distill_system.learner.collate import StreamTotals
from distill_system.learner.optimizer import build_optimizers, clip_gradients
from distill_system.objectives import PolicyHeads, TokenRows, build_objective
from distill_system.records import Author, Finish, Stream, Trajectory, TrajectoryChunk

OPTIMIZER = OptimizerConfig(learning_rate=1e-4)
CHUNK_TOKENS = LearnerConfig().chunk_tokens(on_gpu=False)
Step = Callable[[Sequence[Ragged]], None]


def serve(case: Case, pipe: Connection, rank: int, rendezvous: tuple[str, int]) -> None:
    """Answer each STEP with (seconds, tokens, response tokens), STOP with the peak in bytes.

    Rank 0 says first what a matrix product reaches here, in operations per second.
    """
    torch.set_num_threads(case.threads)
    warnings.simplefilter("ignore")
    peak_flops = measure_peak_flops(case)
    build = _build_padded if case.form == "padded" else _build_packed
    tiny = case.alone_and_tiny
    for sequences in deal_steps(tiny):
        build(tiny, 0, rendezvous)(sequences)
    memory = begin_memory(case)
    step = build(case, rank, rendezvous)
    batches = deal_steps(case)
    if rank == 0:
        pipe.send(peak_flops)
    read_clock = CLOCKS[case.clock]
    for sequences in batches:
        if pipe.recv() != STEP:
            break
        started = read_clock()
        step(sequences)
        synchronise(case.device)
        seconds = read_clock() - started
        tokens = sum(len(sequence.token_ids) for sequence in sequences)
        pipe.send((seconds, tokens, sum(s.num_response_tokens for s in sequences)))
    else:
        pipe.recv()
    pipe.send(memory.above_base())


def _build_packed(case: Case, rank: int, rendezvous: tuple[str, int]) -> Step:
    learner = Learner(
        rank=rank,
        world_size=case.ranks,
        source=ModelSource(architecture=case.architecture, vocabulary_size=case.vocabulary),
        objective=None,
        optimizer=OPTIMIZER,
        config=LearnerConfig(
            threads=case.threads,
            compute_dtype=case.dtype,
            max_tokens_per_microbatch=case.microbatch_tokens,
            activation_checkpointing=case.checkpointing,
            shard_ranks="all",
        ),
        total_steps=1000,
        max_response_tokens=case.longest,
        seed=SEED,
        uses_gpu=case.device == "cuda",
        timeout_seconds=600.0,
    )
    learner.connect(*rendezvous)
    number = 0

    def step(sequences: Sequence[Ragged]) -> None:
        nonlocal number
        trajectories = [to_trajectory(s, str(i)) for i, s in enumerate(sequences)]
        totals = {Stream.OFF_POLICY: StreamTotals.of(trajectories)}
        chunks = TrajectoryChunk.deal(trajectories, Stream.OFF_POLICY, case.ranks)
        learner.step(number, [chunks[rank]], totals)
        number += 1

    return step


def to_trajectory(sequence: Ragged, name: str) -> Trajectory:
    """As a row of data comes to the learner."""
    return Trajectory(
        trajectory_id=name,
        prompt_id=name,
        author=Author.DATASET,
        token_ids=sequence.token_ids,
        num_prompt_tokens=sequence.num_prompt_tokens,
        behaviour_logprobs=np.zeros(0, dtype=np.float32),
        temperature=1.0,
        finish=Finish.STOP,
    )


def _build_padded(case: Case, rank: int, rendezvous: tuple[str, int]) -> Step:
    """What a padding collator makes of a step: one batch, as long as its longest sequence."""
    model = build_plain_model(case).eval()
    if case.checkpointing:
        model.train()  # transformers checkpoints in training mode alone; Llama has no dropout
        model.gradient_checkpointing_enable({"use_reentrant": False})
    embeddings = [model.get_input_embeddings().weight, unembedding(model)]
    optimizers = build_optimizers(model, embeddings, OPTIMIZER)
    objective = build_objective(None, max_response_tokens=case.longest, total_steps=1000)
    number = 0

    def step(sequences: Sequence[Ragged]) -> None:
        nonlocal number
        with _autocast(case):
            hidden_BLH = _read_padded(model, sequences, case.device)
            rows = _response_rows(hidden_BLH, sequences)
            heads = PolicyHeads(
                unembedding_VH=unembedding(model),
                action_embeddings_VE=torch.zeros(case.vocabulary, 0, device=case.device),
                chunk_tokens=CHUNK_TOKENS,
            )
            loss = objective.compute_loss(heads, rows, None, lambda share: share).loss_share
        loss.backward()
        clip_gradients(model, OPTIMIZER.max_gradient_norm, step=number)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        number += 1

    return step


def _autocast(case: Case) -> AbstractContextManager[Any]:
    lower = case.dtype == "bfloat16"
    return torch.autocast(case.device, dtype=torch.bfloat16, enabled=lower)


def _read_padded(model: Any, sequences: Sequence[Ragged], device: str) -> torch.Tensor:
    longest = max(len(sequence.token_ids) for sequence in sequences)
    ids_BL = torch.zeros(len(sequences), longest, dtype=torch.int64)
    mask_BL = torch.zeros_like(ids_BL)
    for line, sequence in enumerate(sequences):
        size = len(sequence.token_ids)
        ids_BL[line, :size] = torch.from_numpy(sequence.token_ids.astype(np.int64))
        mask_BL[line, :size] = 1
    output = model.base_model(
        input_ids=ids_BL.to(device), attention_mask=mask_BL.to(device), use_cache=False
    )
    return output.last_hidden_state


def _response_rows(hidden_BLH: torch.Tensor, sequences: Sequence[Ragged]) -> TokenRows:
    lines, columns, ids, positions = [], [], [], []
    for line, sequence in enumerate(sequences):
        prompt, size = sequence.num_prompt_tokens, len(sequence.token_ids)
        lines += [line] * (size - prompt)
        columns += range(prompt - 1, size - 1)
        positions += range(size - prompt)
        ids.append(sequence.token_ids[prompt:])
    device = hidden_BLH.device
    lines_N, columns_N = torch.tensor(lines, device=device), torch.tensor(columns, device=device)
    return TokenRows(
        hidden_NH=hidden_BLH[lines_N, columns_N],
        token_ids_N=torch.from_numpy(np.concatenate(ids).astype(np.int64)).to(device),
        sequence_ids_N=lines_N,
        positions_N=torch.tensor(positions, device=device),
        num_global_tokens=len(lines),
        num_global_sequences=len(sequences),
    )

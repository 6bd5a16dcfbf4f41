"""One learner rank: collate -> forward -> critics up -> student down -> optimizer.

Axes: N response tokens, H student hidden size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from distill_system.config.distill import StalenessConfig
from distill_system.config.model import LearnerConfig, LoraUpdate, OptimizerConfig
from distill_system.config.objective import ObjectiveConfig
from distill_system.errors import NonFiniteError
from distill_system.language_model import (
    SequenceBatch,
    count_parts,
    find_decoder_start,
    logit_cap,
    unembedding,
)
from distill_system.learner.acting_weights import acting_weights, round_parameters
from distill_system.learner.adapters import (
    MergedSource,
    fold_adapters,
    gather_adapters,
    merged_tensors,
    save_adapters,
)
from distill_system.learner.checkpoint import CheckpointWriter, load_checkpoint
from distill_system.learner.checkpoint_files import FileRecord, find_alterations
from distill_system.learner.collate import LearnerBatch, StreamTotals, collate
from distill_system.learner.export_weights import PRECISIONS, save_model
from distill_system.learner.microbatches import Microbatches
from distill_system.learner.optimizer import (
    build_optimizers,
    clip_gradients,
    learning_rate_at,
    set_learning_rate,
)
from distill_system.learner.peak_memory import read_peak_memory_bytes
from distill_system.learner.ranks import Ranks
from distill_system.learner.rendezvous import find_rendezvous
from distill_system.learner.rollout_shares import rollout_shares
from distill_system.learner.sampler import (
    compare_with_sampler,
    measure_gap,
    measure_largest_gap,
    measure_staleness,
)
from distill_system.learner.sharding import (
    Policy,
    build_mesh,
    gather_weights,
    prepare_blocks,
    shard_policy,
)
from distill_system.learner.student import ModelSource, build_student, fill_from_folder
from distill_system.learner.teacher_matrices import TeacherMatrices
from distill_system.objectives import (
    Importance,
    PolicyHeads,
    build_objective,
    language_model_loss,
    measure_overlap,
    measure_stream,
    read_vocabulary,
)
from distill_system.objectives.importance import compute_log_ratios
from distill_system.objectives.rows import ObjectiveOutput, TokenRows
from distill_system.records import (
    OBJECTIVE_STREAMS,
    FloatArray,
    StepResult,
    Stream,
    TeacherTargets,
    Trajectory,
    TrajectoryChunk,
)
from distill_system.weights import WeightPublisher, WireFormat
from distill_system.weights.rounding import AS_THEY_ARE
from distill_system.workers import Reference


class Learner:
    """Holds the student, its optimizers and the objective; one of world_size equal ranks."""

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        source: ModelSource,
        objective: ObjectiveConfig | None,
        optimizer: OptimizerConfig,
        config: LearnerConfig,
        total_steps: int,
        max_response_tokens: int,
        seed: int,
        uses_gpu: bool,
        timeout_seconds: float,
        staleness: StalenessConfig | None = None,
        language_model_weight: float = 0.0,
        wire: WireFormat = AS_THEY_ARE,
    ) -> None:
        torch.set_num_threads(config.threads)
        self.config = config
        self.optimizer_config = optimizer
        self.total_steps = total_steps
        self.device = torch.device("cuda" if uses_gpu else "cpu")
        self.ranks = Ranks(
            rank=rank,
            world_size=world_size,
            device=self.device,
            timeout_seconds=timeout_seconds,
            alone=world_size == 1 and not config.offload,
        )
        self.source, self.objective_config, self.seed = source, objective, seed
        self.model = build_student(
            source, seed=seed, device=self.device, empty=not self.ranks.alone
        )
        stale = staleness or StalenessConfig()
        self.reads_older_text = stale.max_staleness > 0
        self.importance = Importance(kind=stale.importance, cap=stale.importance_cap)
        self.objective = build_objective(
            objective,
            max_response_tokens=max_response_tokens,
            total_steps=total_steps,
            importance=self.importance,
        )
        self.language_model_weight = language_model_weight
        self.wire = wire
        self.version = 0
        self.publisher: WeightPublisher | None = None
        self.writer = CheckpointWriter(rank=rank, timeout=self.ranks.timeout)
        self.folded_adapters: dict[str, Tensor] = {}
        if self.ranks.alone:
            self._prepare()

    def ready(self) -> int:
        """Return the number of parameters once the model is built."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def address(self) -> tuple[str, int]:
        """This rank's host address and a free port on it, for the others to meet at."""
        return find_rendezvous()

    def connect(self, address: str, port: int) -> None:
        """Join the other ranks, and share the model with them."""
        self.ranks.connect(address, port)
        if not self.ranks.alone:
            self._prepare()

    def _prepare(self) -> None:
        """What follows the model, and where ranks share it what needs them to have met."""
        config, source = self.config, self.source
        self.policy = Policy(self.model, device=self.device, compute_dtype=config.compute_dtype)
        prepare_blocks(self.model, config)
        mesh = None
        if not self.ranks.alone:
            count = self.ranks.world_size
            mesh = build_mesh(self.device, num_ranks=count, shard_ranks=config.shard_size(count))
            shard_policy(self.policy, mesh, config)
            rest = torch.device("cpu") if config.offload else self.device
            fill_from_folder(self.policy, source, seed=self.seed, device=rest)
        embeddings = [self.model.get_input_embeddings().weight, unembedding(self.model)]
        self.optimizers = build_optimizers(self.model, embeddings, self.optimizer_config)
        self.teacher = TeacherMatrices(
            source,
            self.objective_config,
            vocabulary_size=source.vocabulary_size or unembedding(self.model).shape[0],
            device=self.device,
            mesh=mesh,
        )

    def step(
        self,
        step: int,
        chunks: Sequence[TrajectoryChunk],
        totals: Mapping[Stream, StreamTotals],
        *targets: Sequence[TeacherTargets] | None,
    ) -> StepResult:
        """One update from this rank's chunks; every rank calls it with its own.

        targets[i] belongs to chunks[i]; None, or none at all, where the teacher did not read.
        Raises: NonFiniteError before any weight has changed.
        """
        started = time.perf_counter()
        batch = self._collate(chunks, targets, totals)
        with self._acting(step):
            microbatches = Microbatches(self.policy, batch.sequences)
            hidden_NH = microbatches.read()
            on_policy = batch.stream_rows(Stream.ON_POLICY, hidden_NH)
            with self.policy.precision():
                heads = self._heads()
                output = self.objective.compute_loss(
                    heads,
                    batch.stream_rows(Stream.OFF_POLICY, hidden_NH),
                    on_policy,
                    self.ranks.sum,
                )
                texts = batch.stream_rows(Stream.PLAIN_TEXT, hidden_NH)
                if texts is not None:
                    output = self._add_plain_text(output, heads, texts)
            # One transfer. Every rank then has the same loss, so that all refuse it, or none.
            sums = self.ranks.sum_scalars(
                {"loss": output.loss_share, **output.metric_shares, **rollout_shares(batch)}
            )
            sampler = self._compare_with_sampler(batch, on_policy, output, step=step)
            self._require_finite(sums["loss"], step)
            microbatches.backward(output.loss_share)
        gradient_norm, rate = self._update(step)
        num_tokens = sum(totals[s].num_tokens for s in OBJECTIVE_STREAMS if s in totals)
        metrics = {
            **sums,
            **output.metrics,
            **sampler,
            "gradient_norm": gradient_norm,
            "learning_rate": rate,
            "response_tokens": num_tokens,
        }
        if self.config.max_tokens_per_microbatch is not None:
            metrics["microbatches"] = len(batch.sequences.parts)
        return StepResult(
            step=step,
            metrics={f"learner/{name}": value for name, value in metrics.items()},
            num_response_tokens=num_tokens,
            seconds=time.perf_counter() - started,
            peak_memory_bytes=read_peak_memory_bytes(self.device),
        )

    def _add_plain_text(
        self, output: ObjectiveOutput, heads: PolicyHeads, texts: TokenRows
    ) -> ObjectiveOutput:
        loss = language_model_loss(heads, texts)
        return replace(
            output,
            loss_share=output.loss_share + self.language_model_weight * loss,
            metric_shares={**output.metric_shares, "language_model_loss": loss.detach()},
            metrics={**output.metrics, "language_model_tokens": float(texts.num_global_tokens)},
        )

    def _acting(self, version: int) -> AbstractContextManager[None]:
        """A block in which the student computes as this version of it writes.

        Adapters are small, and follow small steps in bfloat16 too: they are read as they are.
        """
        rounds = self.config.compute_dtype == "bfloat16" and self.wire.is_stochastic
        if not rounds or isinstance(self.source.update, LoraUpdate):
            return nullcontext()
        return acting_weights(self.model, self.wire, version=version, device=self.device)

    def _compare_with_sampler(
        self, batch: LearnerBatch, rows: TokenRows | None, output: ObjectiveOutput, *, step: int
    ) -> dict[str, float]:
        """What the student says of the text that it learns from, against who wrote it."""
        student_logprobs_N = output.student_logprobs_N
        if batch.behaviour is None or rows is None or student_logprobs_N is None:
            return {}
        gap = compare_with_sampler(batch.behaviour, student_logprobs_N, self.ranks, step=step)
        if not self.reads_older_text:
            return gap
        return gap | measure_staleness(rows, student_logprobs_N, self.importance, self.ranks)

    def _update(self, step: int) -> tuple[float, float]:
        """Clip gradients, step every optimizer; returns the gradient's norm before and the rate."""
        norm = clip_gradients(self.model, self.optimizer_config.max_gradient_norm, step=step)
        rate = learning_rate_at(step, config=self.optimizer_config, total_steps=self.total_steps)
        set_learning_rate(self.optimizers, rate)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm, rate

    @torch.no_grad()
    def measure(
        self,
        chunks: Sequence[TrajectoryChunk],
        totals: Mapping[Stream, StreamTotals],
        *targets: Sequence[TeacherTargets] | None,
    ) -> dict[str, float]:
        """Both moment-matching distances on these chunks (C = 1, spectral ball), no update.

        Keyed off_policy_distance, on_policy_distance, cross_entropy (of the teacher's text), and
        logprob_gap and max_logprob_gap of the student's text, which is to be sampled at
        temperature 1 without truncation under the weights that the learner holds. Where the scorers
        told the teacher's most likely tokens of that text, top_token_overlap too.
        """
        with self._acting(self.version):
            return self._measure(chunks, totals, targets)

    def _measure(
        self,
        chunks: Sequence[TrajectoryChunk],
        totals: Mapping[Stream, StreamTotals],
        targets: Sequence[Sequence[TeacherTargets] | None],
    ) -> dict[str, float]:
        batch = self._collate(chunks, targets, totals)
        hidden_NH = Microbatches(self.policy, batch.sequences).read()
        heads = self._heads()
        measures: dict[str, float] = {}
        for stream in totals:
            rows = batch.stream_rows(stream, hidden_NH)
            assert rows is not None, "every rank holds a part of every stream"
            with self.policy.precision():
                measured = measure_stream(heads, rows, self.ranks.sum, stream=stream.side)
            measures[f"{stream.value}_distance"] = measured.distance
            if stream is Stream.OFF_POLICY:
                measures["cross_entropy"] = measured.cross_entropy
            else:
                assert rows.behaviour_logprobs_N is not None, "collate brings them on-policy"
                log_ratios_N = compute_log_ratios(
                    measured.student_logprobs_N, rows.behaviour_logprobs_N
                )
                measures |= measure_gap(log_ratios_N, self.ranks)
                measures |= measure_largest_gap(log_ratios_N, self.ranks)
                if rows.teacher is not None and rows.teacher.top_k_ids_NK is not None:
                    with self.policy.precision():
                        overlap = measure_overlap(heads, rows, self.ranks.sum)
                    measures["top_token_overlap"] = overlap
        self.policy.release()
        return measures

    @torch.no_grad()
    def read_logprobs(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """log pi_theta(y_t | s_t) of each response token at temperature 1, nats, float32 [T] each.

        Every rank reads all of them, since ranks that share a model go in step: for a few.
        """
        limit = self.config.max_tokens_per_microbatch
        sequences = SequenceBatch.collate(
            trajectories,
            self.device,
            max_tokens=limit,
            decoder_start=find_decoder_start(self.model),
        )
        with self._acting(self.version):
            hidden_NH = Microbatches(self.policy, sequences).read()
            heads = self._heads()
            with self.policy.precision():
                rows = read_vocabulary(
                    hidden_NH,
                    sequences.token_ids_N,
                    heads.unembedding_VH,
                    heads.action_embeddings_VE[:, :0],  # no expected embedding is asked for
                    chunk_tokens=heads.chunk_tokens,
                    logit_cap=heads.logit_cap,
                )
            self.policy.release()
        ends = np.cumsum([trajectory.num_response_tokens for trajectory in trajectories])
        return np.split(rows.logprobs_N.cpu().numpy(), ends[:-1])

    def connect_rollouts(
        self,
        backend: Literal["gloo", "nccl"],
        client: Any,
        address: str,
        port: int,
        num_receivers: int,
        timeout_seconds: float,
    ) -> None:
        """Open the weight-transfer group with the rollout workers; rank 0 sends.

        A group that there was is left before.
        """
        if self.publisher is not None:
            self.publisher.close()
            self.publisher = None  # with the last hold on its connections
        as_they_are = not (isinstance(self.source.update, LoraUpdate) or self.config.offload)
        self.publisher = WeightPublisher(
            self.model if as_they_are else MergedSource(self.model, self.device),
            backend=backend,
            client=client,
            master_address=address,
            master_port=port,
            num_receivers=num_receivers,
            rank=self.ranks.rank,
            timeout_seconds=timeout_seconds,
            wire=self.wire,
        )

    def start_publish(self, version: int) -> list[Reference]:
        """Begin to send the current weights to every rollout worker under this version.

        Returns once they are packed and may change again; on rank 0 with a reference to each
        worker's receive_weights, on other ranks with none.
        """
        assert self.publisher is not None, "connect_rollouts comes before publish"
        self.version = version
        return self.publisher.start(version)

    def start_save(self, folder: str) -> None:
        """Begin this rank's part of a checkpoint; returns once the state is copied."""
        self.policy.release()  # a shard is saved by the rank that has it
        self.writer.start(Path(folder), self.model, self.optimizers, self.objective)

    def finish_save(self, wait: bool) -> dict[str, FileRecord] | None:
        """The files of this rank's part, by their paths in the folder; None if not yet written.

        wait: for a few seconds.
        """
        return self.writer.finish(wait=wait)

    def find_alterations(self, folder: str, files: Mapping[str, FileRecord]) -> list[str]:
        """Read files of a checkpoint through; those that are not as they were written, and why."""
        return find_alterations(Path(folder), files)

    def load(self, folder: str) -> None:
        """Take back a checkpoint."""
        load_checkpoint(
            Path(folder), self.model, self.optimizers, self.objective, rank=self.ranks.rank
        )

    def round_weights(self, dtype: Literal["float32", "bfloat16"]) -> None:
        """Give every weight a value of this precision; it stays float32 in memory.

        For what is exported in it: what is published and measured from here on are the exported
        weights. Engines whose weights are stochastically rounded hold them already, else they are
        the nearest. Adapters are folded into the weights, so that no step may follow.
        """
        self.policy.release()
        if isinstance(self.source.update, LoraUpdate):
            self.folded_adapters = fold_adapters(self.model)
        nearest = WireFormat(dtype=PRECISIONS[dtype])
        wire = self.wire if self.wire.dtype is nearest.dtype else nearest
        round_parameters(self.model, wire, version=self.version, device=self.device)

    def export(self, folder: str, dtype: Literal["float32", "bfloat16"] = "float32") -> None:
        """Write the model in Hugging Face form (safetensors, config, generation config); rank 0."""
        writes, update, precision = self.ranks.rank == 0, self.source.update, PRECISIONS[dtype]
        if isinstance(update, LoraUpdate):
            weights = {name: tensor.cpu() for name, tensor in merged_tensors(self.model) if writes}
            adapters = self.folded_adapters or gather_adapters(self.model)
        else:
            weights = self.model.state_dict() if self.ranks.alone else gather_weights(self.model)
        if not writes:
            return
        save_model(self.model, Path(folder), weights, dtype=precision)
        if isinstance(update, LoraUpdate) and update.save_adapter:
            save_adapters(self.model, Path(folder), adapters)

    def close(self) -> None:
        """Finish a checkpoint under way, then leave both groups."""
        self.writer.close()
        if self.publisher is not None:
            self.publisher.close()
        self.ranks.close()

    def _collate(
        self,
        chunks: Sequence[TrajectoryChunk],
        targets: Sequence[Sequence[TeacherTargets] | None],
        totals: Mapping[Stream, StreamTotals],
    ) -> LearnerBatch:
        """This rank's batch, in as many parts as the rank that needs most: they go in step."""
        limit, num_parts = self.config.max_tokens_per_microbatch, 1
        if limit is not None:
            lengths = [int(t.token_ids.size) for chunk in chunks for t in chunk.trajectories]
            num_parts = self.ranks.max(count_parts(lengths, limit))
        return collate(
            chunks,
            targets,
            totals,
            self.device,
            num_parts=num_parts,
            decoder_start=find_decoder_start(self.model),
        )

    def _heads(self) -> PolicyHeads:
        return self.teacher.build_heads(
            unembedding(self.model, self.source.vocabulary_size),
            chunk_tokens=self.config.chunk_tokens(on_gpu=self.device.type == "cuda"),
            logit_cap=logit_cap(self.model.config),
        )

    def _require_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the loss must be finite, got {loss} at step {step}; no weight was changed. "
                "Start a run of another name with a lower learning rate or with "
                "learner.compute_dtype=float32"
            )

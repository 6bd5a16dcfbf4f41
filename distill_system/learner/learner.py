"""One learner rank: collate -> forward -> critics up -> student down -> optimizer.

Axes: N response tokens, H student hidden size, V vocabulary, E action-embedding size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from distill_system.config.model import ArchitectureConfig, LearnerConfig, OptimizerConfig
from distill_system.config.objective import ObjectiveConfig
from distill_system.errors import NonFiniteError
from distill_system.language_model import (
    LanguageModel,
    build_language_model,
    load_embedding,
    load_language_model,
    read_hidden,
    unembedding,
)
from distill_system.learner.checkpoint import load_checkpoint, save_checkpoint
from distill_system.learner.collate import LearnerBatch, StreamTotals, collate
from distill_system.learner.meeting_point import find_meeting_point
from distill_system.learner.optimizer import (
    build_optimizers,
    clip_gradients,
    learning_rate_at,
    set_learning_rate,
)
from distill_system.learner.ranks import Ranks
from distill_system.objectives import (
    PolicyHeads,
    build_objective,
    make_action_embeddings,
    measure_stream,
)
from distill_system.objectives.rows import ObjectiveOutput
from distill_system.peak_memory import read_peak_memory_bytes
from distill_system.records import (
    Finish,
    StepResult,
    Stream,
    TeacherTargets,
    TrajectoryChunk,
    WeightVersion,
)
from distill_system.weights import WeightPublisher


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where the learner's model comes from: a folder, or random weights of a shape.

    teacher_path: the teacher's folder, None for supervised fine-tuning. teacher_dtype: the
        precision in which the scorers multiply by its unembedding. action_dimension: the most
        columns of action embeddings, as the scorers have them.
    """

    path: str | None = None
    architecture: ArchitectureConfig | None = None
    vocab_size: int = 0
    pad_token_id: int = 0
    bos_token_id: int | None = None
    eos_token_id: int = 0
    trust_remote_code: bool = False
    teacher_path: str | None = None
    teacher_dtype: str = "float32"
    action_dimension: int | None = None


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
    ) -> None:
        torch.set_num_threads(config.threads)
        self.config = config
        self.optimizer_config = optimizer
        self.total_steps = total_steps
        self.device = torch.device("cuda" if uses_gpu else "cpu")
        self.ranks = Ranks(
            rank=rank, world_size=world_size, device=self.device, timeout_seconds=timeout_seconds
        )
        self.model = _build_model(source, seed=seed, device=self.device)
        embeddings = [self.model.get_input_embeddings().weight, unembedding(self.model)]
        self.optimizers = build_optimizers(self.model, embeddings, optimizer)
        self.objective = build_objective(
            objective, max_response_tokens=max_response_tokens, total_steps=total_steps
        )
        self.action_embeddings_VE = self._load_actions(source)
        self.teacher_unembedding_VF = self._load_teacher_unembedding(source, objective)
        self.publisher: WeightPublisher | None = None

    def ready(self) -> int:
        """Return the number of parameters once the model is loaded."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def address(self) -> tuple[str, int]:
        """This rank's host address and a free port on it, for the others to meet at."""
        return find_meeting_point()

    def connect(self, address: str, port: int) -> None:
        """Join the other ranks."""
        self.ranks.connect(address, port)

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
        batch = collate(chunks, targets, totals, self.device)
        with self._autocast():
            hidden_NH = read_hidden(self.model, batch.sequences)
            output = self.objective.compute_loss(
                self._heads(),
                batch.stream_rows(Stream.OFF_POLICY, hidden_NH),
                batch.stream_rows(Stream.ON_POLICY, hidden_NH),
                self.ranks.sum,
            )
        sums = self.ranks.sum_scalars(
            {"loss": output.loss_share, **output.metric_shares, **_rollout_shares(batch, output)}
        )
        self._require_finite(sums["loss"], step)
        output.loss_share.backward()
        gradient_norm, rate = self._update(step)
        num_tokens = sum(total.num_tokens for total in totals.values())
        metrics = {
            **sums,
            **output.metrics,
            "gradient_norm": gradient_norm,
            "learning_rate": rate,
            "response_tokens": num_tokens,
        }
        return StepResult(
            step=step,
            metrics={f"learner/{name}": value for name, value in metrics.items()},
            num_response_tokens=num_tokens,
            seconds=time.perf_counter() - started,
            peak_memory_bytes=read_peak_memory_bytes(self.device),
        )

    def _update(self, step: int) -> tuple[float, float]:
        """Sum gradients over ranks, clip, step every optimizer; returns gradient norm and rate."""
        self.ranks.sum_gradients(self.model.parameters())
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

        Keyed off_policy_distance, on_policy_distance, and cross_entropy (of the teacher's text).
        """
        batch = collate(chunks, targets, totals, self.device)
        hidden_NH = read_hidden(self.model, batch.sequences)
        measures: dict[str, float] = {}
        for stream in totals:
            rows = batch.stream_rows(stream, hidden_NH)
            assert rows is not None, "every rank holds a part of every stream"
            measured = measure_stream(self._heads(), rows, self.ranks.sum, stream=stream.value)
            measures[f"{stream.value}_distance"] = measured.distance
            if stream is Stream.OFF_POLICY:
                measures["cross_entropy"] = measured.cross_entropy
        return measures

    def connect_rollouts(
        self,
        backend: Literal["gloo", "nccl"],
        client: Any,
        address: str,
        port: int,
        num_receivers: int,
        timeout_seconds: float,
    ) -> None:
        """Open the weight-transfer group with the rollout workers; rank 0 sends."""
        self.publisher = WeightPublisher(
            self.model,
            backend=backend,
            client=client,
            master_address=address,
            master_port=port,
            num_receivers=num_receivers,
            rank=self.ranks.rank,
            timeout_seconds=timeout_seconds,
        )

    def publish(self, version: int) -> WeightVersion:
        """Send the current weights to every rollout worker under this version."""
        assert self.publisher is not None, "connect_rollouts comes before publish"
        return self.publisher.publish(version)

    def save(self, folder: str) -> None:
        """Write this rank's part of a checkpoint."""
        save_checkpoint(
            Path(folder), self.model, self.optimizers, self.objective, rank=self.ranks.rank
        )

    def load(self, folder: str) -> None:
        """Take back a checkpoint."""
        load_checkpoint(
            Path(folder), self.model, self.optimizers, self.objective, rank=self.ranks.rank
        )

    def export(self, folder: str) -> None:
        """Write the model in Hugging Face form (safetensors, config, generation config); rank 0."""
        if self.ranks.rank == 0:
            self.model.save_pretrained(folder)

    def close(self) -> None:
        """Leave both groups."""
        if self.publisher is not None:
            self.publisher.close()
        self.ranks.close()

    def _heads(self) -> PolicyHeads:
        return PolicyHeads(
            unembedding_VH=unembedding(self.model),
            action_embeddings_VE=self.action_embeddings_VE,
            teacher_unembedding_VF=self.teacher_unembedding_VF,
            chunk_tokens=self.config.vocabulary_chunk_tokens,
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        lower = self.config.compute_dtype == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=lower)

    def _load_actions(self, source: ModelSource) -> Tensor:
        """The teacher's, as its scorers have them; no columns where there is no teacher."""
        if source.teacher_path is None:
            return torch.zeros(unembedding(self.model).shape[0], 0, device=self.device)
        embeddings_VE = load_embedding(
            source.teacher_path, which="input", trust_remote_code=source.trust_remote_code
        )
        return make_action_embeddings(embeddings_VE, source.action_dimension).to(self.device)

    def _load_teacher_unembedding(
        self, source: ModelSource, objective: ObjectiveConfig | None
    ) -> Tensor | None:
        """The teacher's own, where the objective rebuilds the teacher's distribution."""
        if source.teacher_path is None or objective is None:
            return None
        if not objective.needs_teacher_distribution:
            return None
        unembedding_VF = load_embedding(
            source.teacher_path, which="output", trust_remote_code=source.trust_remote_code
        )
        return unembedding_VF.to(self.device, getattr(torch, source.teacher_dtype))

    def _require_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the loss must be finite, got {loss} at step {step}; no weight was changed. "
                "Start a run of another name with a lower learning rate or with "
                "learner.compute_dtype=float32"
            )


def _build_model(source: ModelSource, *, seed: int, device: torch.device) -> LanguageModel:
    """Float32 master weights, in evaluation mode: dropout would part learner from sampler."""
    if source.path is not None:
        return load_language_model(
            source.path,
            dtype=torch.float32,
            device=device,
            trust_remote_code=source.trust_remote_code,
        )
    assert source.architecture is not None, "the configuration gives a path or an architecture"
    model = build_language_model(
        source.architecture,
        vocab_size=source.vocab_size,
        pad_token_id=source.pad_token_id,
        bos_token_id=source.bos_token_id,
        eos_token_id=source.eos_token_id,
        seed=seed,
    )
    return model.to(device).eval()


def _rollout_shares(batch: LearnerBatch, output: ObjectiveOutput) -> dict[str, Tensor]:
    """What the on-policy stream looks like: lengths, ends, and sampler against learner.

    logprob_gap is comparable where sampling is neither truncated nor tempered.
    """
    trajectories = batch.trajectories.get(Stream.ON_POLICY)
    if trajectories is None or output.student_logprobs_N is None:
        return {}
    totals = batch.totals[Stream.ON_POLICY]
    ended = sum(trajectory.finish is Finish.STOP for trajectory in trajectories)
    tokens = sum(trajectory.num_response_tokens for trajectory in trajectories)
    behaviour_N = torch.cat(
        [torch.from_numpy(trajectory.behaviour_logprobs.copy()) for trajectory in trajectories]
    )
    gap = (output.student_logprobs_N.cpu() - behaviour_N).abs().sum() / totals.num_tokens
    return {
        "mean_student_response_tokens": torch.tensor(tokens / totals.num_sequences),
        "student_ended_share": torch.tensor(ended / totals.num_sequences),
        "logprob_gap": gap,
    }

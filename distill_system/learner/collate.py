"""Chunks and their targets in -> one batch of both streams, and its rows stream by stream, out.

Axes: N response tokens, H student hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor

from distill_system.config.objective.needs import SIGNALS, Signal
from distill_system.errors import RecordError
from distill_system.language_model import SequenceBatch
from distill_system.objectives import PairRows, TeacherRows, TokenRows
from distill_system.records import (
    OBJECTIVE_STREAMS,
    REJECTED,
    Stream,
    TeacherTargets,
    Trajectory,
    TrajectoryChunk,
)

_ORDER = (Stream.OFF_POLICY, Stream.ON_POLICY, Stream.PLAIN_TEXT)
"""Of the streams in a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamTotals:
    """Counts of one stream over all ranks: the denominators.

    names: prompt id and trajectory id of its sequences, by which the answers to a prompt are found.
    """

    num_tokens: int
    num_sequences: int
    names: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory]) -> StreamTotals:
        """Count response tokens and sequences."""
        return cls(
            num_tokens=sum(trajectory.num_response_tokens for trajectory in trajectories),
            num_sequences=len(trajectories),
            names=tuple((t.prompt_id, t.trajectory_id) for t in trajectories),
        )


def number_pairs(totals: Mapping[Stream, StreamTotals]) -> dict[tuple[Stream, str], int]:
    """Each sequence's pair: the k-th better and the k-th worse answer to a prompt have one number.

    Worse are the student's answers and rejected ones; the same on every rank.
    """
    numbers: dict[tuple[str, int], int] = {}
    seen = Counter[tuple[str, bool]]()
    found: dict[tuple[Stream, str], int] = {}
    for stream in (each for each in _ORDER if each in totals):
        for prompt_id, name in totals[stream].names:
            worse = is_worse(stream, name)
            place = (prompt_id, seen[prompt_id, worse])
            seen[prompt_id, worse] += 1
            found[stream, name] = numbers.setdefault(place, len(numbers))
    return found


def is_worse(stream: Stream, name: str) -> bool:
    """Whether a trajectory of this id is the worse half of a pair, if it is of one."""
    return stream is Stream.ON_POLICY or name.startswith(f"{REJECTED}:")


@dataclass(frozen=True, slots=True, kw_only=True)
class BehaviourRows:
    """What the student said of the on-policy tokens as it wrote them.

    logprobs_N: float32, nats, at temperature. versions_N: int64, of the weights that wrote each.
    kept_NK: int32, of which tokens each was sampled, -1 where there are fewer; None: of all.
    """

    logprobs_N: Float32[Tensor, " N"]
    temperature: float
    versions_N: Int64[Tensor, " N"]
    kept_NK: Int32[Tensor, "N K"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerBatch:
    """What one rank learns from in one step: off-policy sequences, on-policy ones, plain text.

    behaviour: None without an on-policy stream.  pairs: see number_pairs.
    """

    sequences: SequenceBatch
    trajectories: dict[Stream, tuple[Trajectory, ...]]
    teacher: dict[Stream, TeacherRows]
    totals: Mapping[Stream, StreamTotals]
    behaviour: BehaviourRows | None = None
    pairs: Mapping[tuple[Stream, str], int] = field(default_factory=dict)

    def stream_rows(self, stream: Stream, hidden_NH: Float[Tensor, "N H"]) -> TokenRows | None:
        """The stream's part of the hidden states; None if this step has no such stream."""
        if stream not in self.trajectories:
            return None
        before = [self.trajectories.get(each, ()) for each in _ORDER[: _ORDER.index(stream)]]
        first_row = sum(map(_num_tokens, before))
        rows = slice(first_row, first_row + _num_tokens(self.trajectories[stream]))
        behaviour = self.behaviour if stream is Stream.ON_POLICY else None
        pairs = self._pairs(stream) if stream in OBJECTIVE_STREAMS else None
        return TokenRows(
            hidden_NH=hidden_NH[rows],
            token_ids_N=self.sequences.token_ids_N[rows],
            sequence_ids_N=self.sequences.sequence_ids_N[rows] - sum(map(len, before)),
            positions_N=self.sequences.positions_N[rows],
            num_global_tokens=self.totals[stream].num_tokens,
            num_global_sequences=self.totals[stream].num_sequences,
            teacher=self.teacher.get(stream),
            pairs=pairs,
            behaviour_logprobs_N=None if behaviour is None else behaviour.logprobs_N,
            behaviour_temperature=1.0 if behaviour is None else behaviour.temperature,
            behaviour_kept_NK=None if behaviour is None else behaviour.kept_NK,
        )

    def _pairs(self, stream: Stream) -> PairRows:
        found, names = self.pairs, [t.trajectory_id for t in self.trajectories[stream]]
        device = self.sequences.sequence_ids_N.device
        return PairRows(
            numbers_S=torch.tensor([found.get((stream, name), 0) for name in names], device=device),
            is_worse_S=torch.tensor([is_worse(stream, name) for name in names], device=device),
            num_pairs=1 + max(found.values(), default=0),
        )


def collate(
    chunks: Sequence[TrajectoryChunk],
    targets: Sequence[Sequence[TeacherTargets] | None],
    totals: Mapping[Stream, StreamTotals],
    device: torch.device,
    *,
    num_parts: int = 1,
    decoder_start: int | None = None,
) -> LearnerBatch:
    """Join this rank's chunks; targets[i] belongs to chunks[i], None where no teacher read.

    num_parts: in how many parts the model reads them.  decoder_start: see SequenceBatch.collate.
    Raises: RecordError if a trajectory and its targets disagree, or on-policy trajectories do not
        say which weights wrote them, or were sampled at different temperatures.
    """
    trajectories: dict[Stream, tuple[Trajectory, ...]] = {}
    teacher: dict[Stream, TeacherRows] = {}
    for stream in _ORDER:
        mine = [i for i, chunk in enumerate(chunks) if chunk.stream is stream]
        if not mine:
            continue
        trajectories[stream] = tuple(t for i in mine for t in chunks[i].trajectories)
        of_stream = [target for i in mine for target in (targets[i] if targets else None) or ()]
        if of_stream:
            teacher[stream] = _teacher_rows(trajectories[stream], of_stream, device)
    every = [t for stream_trajectories in trajectories.values() for t in stream_trajectories]
    on_policy = trajectories.get(Stream.ON_POLICY)
    return LearnerBatch(
        sequences=SequenceBatch.collate(
            every, device, num_parts=num_parts, decoder_start=decoder_start
        ),
        trajectories=trajectories,
        teacher=teacher,
        totals=totals,
        behaviour=None if on_policy is None else _behaviour_rows(on_policy, device),
        pairs=number_pairs(totals),
    )


def _behaviour_rows(trajectories: Sequence[Trajectory], device: torch.device) -> BehaviourRows:
    for trajectory in trajectories:
        if not trajectory.weight_versions:
            raise RecordError(
                f"trajectory {trajectory.trajectory_id!r} of the on-policy stream: expected the "
                f"student's, with the weight versions that wrote it, got none by the "
                f"{trajectory.author}"
            )
    temperatures = sorted({trajectory.temperature for trajectory in trajectories})
    if len(temperatures) > 1:
        raise RecordError(
            "the on-policy trajectories of a step: expected one sampling temperature, got "
            f"{temperatures}; importance ratios compare policies at one"
        )
    # Spans cover a response without a gap (records.Trajectory checks it): one version a token.
    spans = [span for trajectory in trajectories for span in trajectory.weight_versions]
    versions_N = np.repeat([s.version for s in spans], [s.end - s.start for s in spans])
    logprobs_N = np.concatenate([t.behaviour_logprobs for t in trajectories])
    return BehaviourRows(
        logprobs_N=torch.from_numpy(logprobs_N).to(device, torch.float32, non_blocking=True),
        temperature=temperatures[0],
        versions_N=torch.from_numpy(versions_N).to(device, non_blocking=True),
        kept_NK=_kept_rows(trajectories, device),
    )


def _kept_rows(
    trajectories: Sequence[Trajectory], device: torch.device
) -> Int32[Tensor, "N K"] | None:
    """Rows of different lengths filled up with -1; None where some were not recorded."""
    kept = [trajectory.kept_ids for trajectory in trajectories]
    rows = [ids_TK for ids_TK in kept if ids_TK is not None]
    if len(rows) < len(kept):
        return None
    most = max(ids_TK.shape[1] for ids_TK in rows)
    padded = [
        np.pad(ids_TK, ((0, 0), (0, most - ids_TK.shape[1])), constant_values=-1) for ids_TK in rows
    ]
    return torch.from_numpy(np.concatenate(padded)).to(device, non_blocking=True)


def _teacher_rows(
    trajectories: Sequence[Trajectory], targets: Sequence[TeacherTargets], device: torch.device
) -> TeacherRows:
    for trajectory, target in zip(trajectories, targets, strict=True):
        same = trajectory.trajectory_id == target.trajectory_id
        if not same or target.num_tokens != trajectory.num_response_tokens:
            raise RecordError(
                f"trajectory {trajectory.trajectory_id!r}: expected targets of its "
                f"{trajectory.num_response_tokens} response tokens, it came with targets of "
                f"{target.trajectory_id!r} for {target.num_tokens}"
            )

    rows = {f"{each.name}_N{each.axis}": _join(each, targets, device) for each in SIGNALS}
    return TeacherRows(**rows)


def _join(signal: Signal, targets: Sequence[TeacherTargets], device: torch.device) -> Tensor | None:
    """The signal at the rows of all sequences; None where a scorer did not send it."""
    arrays = [getattr(target, signal.name) for target in targets]
    if any(array is None for array in arrays):
        return None
    joined = _concatenate(arrays, pinned=device.type == "cuda").to(device, non_blocking=True)
    return joined.float() if joined.is_floating_point() else joined.long()


def _concatenate(arrays: Sequence[np.ndarray], *, pinned: bool) -> Tensor:
    """One after another. pinned: in memory that a GPU copies from by itself, and torch keeps."""
    if not pinned:
        return torch.from_numpy(np.concatenate(arrays))
    rows = sum(len(array) for array in arrays)
    dtype = torch.from_numpy(np.empty(0, np.result_type(*arrays))).dtype
    joined = torch.empty((rows, *arrays[0].shape[1:]), dtype=dtype, pin_memory=True)
    np.concatenate(arrays, out=joined.numpy())
    return joined


def _num_tokens(trajectories: Sequence[Trajectory]) -> int:
    return sum(trajectory.num_response_tokens for trajectory in trajectories)

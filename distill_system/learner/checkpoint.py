"""The learner's state on disk, through torch.distributed.checkpoint: written while it goes on.

Every rank writes into one folder that all of them see; who calls this names the folder and makes
the whole atomic by renaming it. `model/` holds the trainable weights as safetensors, `training/`
what safetensors has no form for: optimizers, critics, each rank's random states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from distill_system.errors import RunStateError
from distill_system.learner.checkpoint_files import FileRecord, describe_file
from distill_system.learner.checkpoint_reader import TrainingPlanner, TrainingReader
from distill_system.learner.random_state import random_state, restore_random_state
from distill_system.objectives.rows import Objective

MODEL, TRAINING = "model", "training"
WAIT_SECONDS = 5.0
SHARD_FILE_BYTES = 1 << 30
"""A rank's part of the model goes into files of about so much: each exists twice in memory while it
is written."""


class CheckpointWriter:
    """Copies a rank's state to CPU memory at once and writes it in a thread; one save at a time.

    timeout: of the ranks' meetings around a write, which have a process group of their own, since
    those of the steps go on beside them.
    """

    def __init__(self, *, rank: int, timeout: timedelta) -> None:
        self.rank = rank
        self.timeout = timeout
        self._group: dist.ProcessGroup | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._written: Future[dict[str, FileRecord]] | None = None

    def start(
        self,
        folder: Path,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        objective: Objective,
    ) -> None:
        """Every rank calls it between the same two steps; returns once the state is copied.

        Raises: RunStateError if the save before hangs.
        """
        if self._written is not None and not self._written.done():
            raise RunStateError(f"{folder}: the checkpoint before is still being written")
        if self._group is None and dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=self.timeout)
        # get_optimizer_state_dict makes an optimizer's state where there is none, by a step of
        # rate zero: before the weights are copied, so that both are of one moment.
        training = {
            "optimizer": get_optimizer_state_dict(model, tuple(optimizers)),
            "objective": objective.state_dict(),
            "random": {f"rank{self.rank}": random_state()},
        }
        staged = _copy_to_cpu({MODEL: trainable_state(model), TRAINING: training})
        self._written = self._thread.submit(
            _write, folder, staged, rank=self.rank, group=self._group
        )

    def finish(self, *, wait: bool) -> dict[str, FileRecord] | None:
        """The files that this rank wrote, relative to the folder; None while it is still at it.

        wait: for WAIT_SECONDS at most: a disk may hang, and the rank still answers.
        Raises: RunStateError if they could not be written.
        """
        assert self._written is not None, "start comes before finish"
        if wait:
            futures.wait([self._written], timeout=WAIT_SECONDS)
        return self._written.result() if self._written.done() else None

    def close(self) -> None:
        """Wait for what is under way, then end the thread; the group ends with all the others."""
        self._thread.shutdown()
        self._group = None


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    objective: Objective,
    *,
    rank: int,
) -> None:
    """Bring everything back to where a save found it, on as many ranks as there are now.

    A rank that the checkpoint does not know gets random states that follow from rank 0's.

    Raises: RunStateError if the folder is incomplete or of another model or optimizer.
    """
    alone = not dist.is_initialized()
    # No group but the default one: NCCL moves the few objects of a load just as well.
    with _told(
        f"the checkpoint {folder} cannot be loaded into this learner",
        "Remove that folder to resume from the one before, or start a run of another name",
    ):
        weights = trainable_state(model)
        model_reader = HuggingFaceStorageReader(str(folder / MODEL))
        _require_same(weights.keys(), model_reader.read_metadata().state_dict_metadata.keys())
        load(weights, storage_reader=model_reader, no_dist=alone)
        reader = TrainingReader(folder / TRAINING)
        stored = reader.read_metadata().state_dict_metadata
        mine = f"random.rank{rank}" if f"random.rank{rank}.cpu" in stored else "random.rank0"
        state: dict[str, Any] = {
            "optimizer": get_optimizer_state_dict(model, tuple(optimizers)),
            "objective": _room_for(stored, "objective."),
            "random": {mine.removeprefix("random."): _room_for(stored, f"{mine}.")},
        }
        load(state, storage_reader=reader, planner=TrainingPlanner(), no_dist=alone)
    set_model_state_dict(model, weights, options=StateDictOptions(strict=False))
    set_optimizer_state_dict(model, tuple(optimizers), optim_state_dict=state["optimizer"])
    objective.load_state_dict(state["objective"])
    [(name, random)] = state["random"].items()
    restore_random_state(random, new_rank=None if name == f"rank{rank}" else rank)


def trainable_state(model: nn.Module) -> dict[str, Any]:
    """The tensors that learning changes, each once, and persistent buffers; of LoRA its factors.

    A tied matrix goes by its first name. Values share their memory with the model.

    Returns: name -> Tensor, or DTensor where the model is sharded.
    """
    aliases = dict(model.named_parameters(remove_duplicate=False))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = get_model_state_dict(model)
    missing = trained - state.keys()
    assert not missing, f"the state of the model lacks its parameters {sorted(missing)}"
    return {name: v for name, v in state.items() if name in trained or name not in aliases}


def _copy_to_cpu(state: dict[str, Any]) -> dict[str, Any]:
    options = StagingOptions(
        use_pinned_memory=False,
        use_shared_memory=False,
        use_async_staging=False,
        use_non_blocking_copy=False,
    )
    stager = DefaultStager(options)
    try:
        staged = stager.stage(state)
    finally:
        stager.close()
    assert isinstance(staged, dict), "staging is not asynchronous"
    return staged


def _write(
    folder: Path, staged: dict[str, Any], *, rank: int, group: dist.ProcessGroup | None
) -> dict[str, FileRecord]:
    """Both parts one after the other: two at once would mix up their meetings in one group."""
    weights = staged.pop(MODEL)
    writers: dict[str, tuple[Any, Callable[[], FileSystemWriter]]] = {
        MODEL: (weights, lambda: _model_writer(folder / MODEL, weights)),
        TRAINING: (staged.pop(TRAINING), lambda: FileSystemWriter(folder / TRAINING)),
    }
    with _told(
        f"the checkpoint {folder} cannot be written",
        "The one before stands: see that the disk has room and that every rank sees that folder, "
        "then --resume",
    ):
        for state, build in writers.values():
            save(state, storage_writer=build(), process_group=group, no_dist=group is None)
        mine = [*folder.glob(f"{MODEL}/shard-{rank + 1:05d}-*"), *folder.glob(f"*/__{rank}_*")]
        if rank == 0:
            mine.append(folder / TRAINING / ".metadata")
        return {str(path.relative_to(folder)): describe_file(path) for path in sorted(mine)}


def _model_writer(folder: Path, weights: Mapping[str, Tensor]) -> HuggingFaceStorageWriter:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    file_of: dict[str, int] = {}
    file, filled = 1, 0
    for name, tensor in weights.items():
        num_bytes = tensor.numel() * tensor.element_size() // ranks
        if filled and filled + num_bytes > SHARD_FILE_BYTES:
            file, filled = file + 1, 0
        file_of[name] = file
        filled += num_bytes
    return HuggingFaceStorageWriter(
        str(folder), fqn_to_index_mapping=file_of, save_distributed=True
    )


def _room_for(stored: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """Empty tensors for everything stored under a prefix, as large as what was saved."""
    return {
        key.removeprefix(prefix): torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in stored.items()
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }


def _require_same(expected: Any, stored: Any) -> None:
    missing, unknown = sorted(expected - stored), sorted(stored - expected)
    if missing or unknown:
        raise ValueError(
            f"it is of another model: it lacks the weights {missing[:4]} of {len(missing)} and "
            f"holds {unknown[:4]} of {len(unknown)} that this model has not"
        )


@contextmanager
def _told(what: str, then: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError, CheckpointException) as error:
        raise RunStateError(f"{what}: {_said(error)}. {then}") from error


def _said(error: BaseException) -> str:
    """One line; DCP's own text is a traceback of every rank that failed."""
    if isinstance(error, CheckpointException):
        failures = ((rank, failure[0]) for rank, failure in error.failures.items())
        return "; ".join(f"rank {rank}: {type(e).__name__}: {e}" for rank, e in failures)
    return str(error)

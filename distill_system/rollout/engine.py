"""A generation engine, whichever library computes: token ids in, sampled token ids out.

An engine runs in this process and moves only when it is stepped, so that the schedule of a batch is
the same each time. Its library is imported when an engine is built, not when this module is.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from distill_system.config.rollout import EngineConfig, EngineName
from distill_system.errors import ModelError
from distill_system.records import EngineLoad, FloatArray, Int32Array
from distill_system.rollout.sampling import Sampling

TransferBackend = Literal["gloo", "nccl"]

LONGEST_SLICE = 2
"""A slice of decoding ends once its time is up and a sequence has finished. Where none finishes it
runs for up to this many times its length: an early answer would say nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpecification:
    """What an engine is built from.

    config_key: where `config` stands in the configuration, for error messages.
    max_model_length: longest sequence in tokens, prompt and response together.
    weight_transfer_backend: how new weights arrive; None for a model that never changes.
    vocabulary_size: only token ids below it are sampled; None: every row of the model.
    stop_token_ids: a response ends with the first of them, beside those of the model's folder.
    keep_stale_cache: sequences under way keep the cache of older weights when new ones come.
    engine: the library that computes.
    """

    model_path: str
    config: EngineConfig
    config_key: str
    max_model_length: int
    uses_gpu: bool
    tensor_parallel_size: int
    weight_transfer_backend: TransferBackend | None
    trust_remote_code: bool
    vocabulary_size: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    keep_stale_cache: bool = False
    engine: EngineName = "vllm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled response.

    token_ids: int32 [T], the token that ended it included.  logprobs: float32 [T], nats, of the
    distribution that was sampled from; of greedy responses at temperature 1.
    finish_reason: "stop" or "length".  version_spans: (version, start, end), covering [0, T).
    kept_ids: int32 [T, K], the tokens that could have been sampled, the one that was among them, -1
    where there are fewer; None where top_k bounds none.
    """

    token_ids: Int32Array
    logprobs: FloatArray
    finish_reason: str
    version_spans: tuple[tuple[int, int, int], ...]
    kept_ids: Int32Array | None = None


class LoadReport(Protocol):
    """Whoever shows what the engines of a run have to do."""

    def start(self, worker: str, read_load: Callable[[], EngineLoad]) -> None:
        """Read the load of this worker's engine now and then, in a thread of its own."""


class GenerationEngine(ABC):
    """One model in this process, its requests under way, and what is finished of them.

    import_seconds, start_seconds: that importing the library and building the engine took.
    vocabulary_size: token ids below it are known.
    """

    import_seconds: float
    start_seconds: float
    vocabulary_size: int

    def __init__(self) -> None:
        self._under_way: dict[str, Any] = {}
        self._finished: dict[str, Completion] = {}
        self._num_finished_tokens = 0

    def complete(
        self, prompts: Sequence[Int32Array], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Completion]:
        """Sample one response to each prompt.

        prompts: int32 [P] each.  seeds: one per prompt; a response depends on its own seed alone.
        Every request is queued before the first step, so the schedule repeats. What was added
        before goes on beside it.
        """
        names = [str(index) for index in range(len(prompts))]
        try:
            for name, prompt, seed in zip(names, prompts, seeds, strict=True):
                self.add(name, prompt, sampling, seed)
            while not self._under_way.keys().isdisjoint(names):
                self._step()
        except BaseException:
            # The engine outlives this call: what is left of it must not run within the next one.
            self.drop(names)
            raise
        self._rest()
        return [self._finished.pop(name) for name in names]

    def decode(self, seconds: float) -> dict[str, Completion]:
        """Step for `seconds`; while nothing has finished, for up to LONGEST_SLICE times as long.

        At least once, however busy the machine is. Returns what is finished, by name.
        """
        began = time.perf_counter()
        while self._under_way:
            self._step()
            spent = time.perf_counter() - began
            if spent >= (seconds if self._finished else LONGEST_SLICE * seconds):
                break
        self._rest()
        finished, self._finished = self._finished, {}
        return finished

    @abstractmethod
    def add(self, name: str, prompt: Int32Array, sampling: Sampling, seed: int) -> None:
        """Queue one request under a name that no other has and that is no number; see decode."""

    @abstractmethod
    def drop(self, names: Sequence[str]) -> None:
        """Forget requests, whether they are under way or finished."""

    @abstractmethod
    def call_transfer(self, method: str, **arguments: object) -> list[Any]:
        """Call one step of the weight-transfer lifecycle in every process of the model."""

    @abstractmethod
    def commit_version(self, version: int) -> None:
        """Label what is generated from now on, and forget what older weights left in the cache.

        Sequences under way are read again by the new weights, so that the log-probabilities of the
        tokens to come are theirs; with keep_stale_cache they go on from the old ones' cache.
        """

    @property
    @abstractmethod
    def version(self) -> int:
        """The weight version that was committed last; 0 is what the model folder held."""

    @abstractmethod
    def _step(self) -> None:
        """Move what is under way on, and move what has ended to the finished."""

    @abstractmethod
    def load(self) -> EngineLoad:
        """What there is to do now; any thread may ask, while another one steps the engine."""

    def _finish(self, name: str, completion: Completion) -> None:
        """A request is no longer under way."""
        del self._under_way[name]
        self._finished[name] = completion
        self._num_finished_tokens += int(completion.token_ids.size)

    def _rest(self) -> None:  # noqa: B027  (most engines have nothing to do)
        """Called when no step follows for now."""


def build_engine(specification: EngineSpecification) -> GenerationEngine:
    """The engine of the library that is asked for.

    Raises: ModelError if the model cannot be loaded; ResourceError if memory does not suffice.
    """
    check_model_folder(specification.model_path)
    if specification.engine == "transformers":
        from distill_system.rollout.transformers_engine import TransformersEngine

        return TransformersEngine(specification)
    from distill_system.rollout.vllm_engine import VllmEngine

    return VllmEngine(specification)


def check_model_folder(model_path: str) -> None:
    """Refuse a path that means a folder of this machine and is none that holds a model."""
    folder = Path(model_path)
    looks_local = folder.exists() or folder.is_absolute() or model_path.startswith(".")
    if looks_local and not (folder / "config.json").is_file():
        raise ModelError(
            f"cannot load the model {model_path!r}: expected a folder with config.json, "
            f"{'which it does not hold' if folder.is_dir() else 'found no such folder'}; "
            "give the folder that transformers' save_pretrained wrote, or a hub name"
        )

"""The vLLM engine behind a narrow interface: token ids in, sampled token ids out, weights swapped.

`vllm.v1.engine.llm_engine.LLMEngine` runs in this process and moves only when it is stepped, so
that the schedule of a batch is the same each time. vLLM is imported when an engine is built, not
when this module is.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from distill_system.config.rollout import EngineConfig
from distill_system.errors import DistillError, ModelError, ResourceError
from distill_system.records import FloatArray, Int32Array
from distill_system.rollout.idle_sleep import IdleSleep
from distill_system.rollout.sampling import Sampling

TransferBackend = Literal["gloo", "nccl"]

# Imported by vLLM in each process that holds a share of the model: knows the receiving ends.
_WORKER_EXTENSION = "distill_system.weights.backends.ReceivesWeights"
_RECEIVING_ENDS: dict[TransferBackend, str] = {"gloo": "gloo", "nccl": "sealed_nccl"}
LONGEST_SLICE = 2
"""A slice of decoding ends once its time is up and a sequence has finished. Where none finishes it
runs for up to this many times its length: an early answer would say nothing."""


_PADDING_MASK = "distill_system.rollout.padding_mask:PaddingMask"
# Without a size vLLM would take nearly all of the machine's memory for each engine on a CPU, and
# run the model once to find out what remains. Filling the cache with zeros takes 2 s per GiB.
_CPU_KV_CACHE_MEBIBYTES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpecification:
    """What an engine is built from.

    config_key: where `config` stands in the configuration, for error messages.
    max_model_length: longest sequence in tokens, prompt and response together.
    weight_transfer_backend: how new weights arrive; None for a model that never changes.
    vocabulary_size: only token ids below it are sampled; None: every row of the model.
    stop_token_ids: a response ends with the first of them, beside those of the model's folder.
    keep_stale_cache: sequences under way keep the cache of older weights when new ones come.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled response.

    token_ids: int32 [T], the token that ended it included.  logprobs: float32 [T], nats, of the
    distribution that was sampled from.  finish_reason: vLLM's word.
    version_spans: (version, start, end), covering [0, T).
    """

    token_ids: Int32Array
    logprobs: FloatArray
    finish_reason: str
    version_spans: tuple[tuple[int, int, int], ...]


class GenerationEngine:
    """One model in vLLM, in this process.

    Raises: ModelError if the model cannot be loaded; ResourceError if memory does not suffice.
    """

    def __init__(self, specification: EngineSpecification) -> None:
        _check_model_folder(specification.model_path)
        with _garbage_collection_paused():
            begin = time.perf_counter()
            _import_vllm()
            gc.freeze()  # vLLM collects by hand while it builds: spare it what importing left
            imported = time.perf_counter()
            self._engine = _build_engine(specification)
        self.import_seconds = imported - begin
        self.start_seconds = time.perf_counter() - imported
        num_rows: int = self._engine.model_config.get_vocab_size()
        self.vocabulary_size = specification.vocabulary_size or num_rows
        self._stop_token_ids = list(specification.stop_token_ids)
        self._keep_stale_cache = specification.keep_stale_cache
        self._under_way: dict[str, str] = {}  # name -> vLLM's own name for it
        self._finished: dict[str, Completion] = {}
        self.commit_version(0)
        self._sleep = IdleSleep(self._engine, is_on=specification.config.sleep_when_idle)
        self._sleep.rest()

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
        self._sleep.rest()
        return [self._finished.pop(name) for name in names]

    def add(self, name: str, prompt: Int32Array, sampling: Sampling, seed: int) -> None:
        """Queue one request under a name that no other has and that is no number; see decode."""
        prompt_input = {"prompt_token_ids": prompt.tolist()}
        params = _sampling_params(sampling, seed, self._stop_token_ids)
        self._sleep.wake()
        self._under_way[name] = self._engine.add_request(name, prompt_input, params)

    def decode(self, seconds: float) -> dict[str, Completion]:
        """Step for `seconds`; while nothing has finished, for up to LONGEST_SLICE times as long.

        Returns what is finished, by name.
        """
        began = time.perf_counter()
        while self._under_way:
            spent = time.perf_counter() - began
            if spent >= (seconds if self._finished else LONGEST_SLICE * seconds):
                break
            self._step()
        self._sleep.rest()
        finished, self._finished = self._finished, {}
        return finished

    def drop(self, names: Sequence[str]) -> None:
        """Forget requests, whether they are under way or finished."""
        known = [self._under_way.pop(name) for name in names if name in self._under_way]
        self._engine.abort_request(known, internal=True)
        for name in names:
            self._finished.pop(name, None)

    def _step(self) -> None:
        for output in self._engine.step():
            del self._under_way[output.request_id]
            self._finished[output.request_id] = _completion(output.outputs[0])

    def call_transfer(self, method: str, **arguments: object) -> list[Any]:
        """Call one step of the weight-transfer lifecycle in every process of the model."""
        return self._engine.collective_rpc(method, kwargs=arguments)

    def commit_version(self, version: int) -> None:
        """Label what is generated from now on, and forget what older weights left in the cache.

        Sequences under way are read again by the new weights, so that the log-probabilities of the
        tokens to come are theirs; with keep_stale_cache they go on from the old ones' cache.
        """
        self._engine.set_weight_version(str(version))
        reads_again = bool(self._under_way) and not self._keep_stale_cache
        self._engine.reset_prefix_cache(reset_running_requests=reads_again)

    @property
    def version(self) -> int:
        """The weight version that was committed last; 0 is what the model folder held."""
        return int(self._engine.get_weight_version())


@contextlib.contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Importing and building allocate millions of objects that all stay: collecting finds none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _check_model_folder(model_path: str) -> None:
    folder = Path(model_path)
    looks_local = folder.exists() or folder.is_absolute() or model_path.startswith(".")
    if looks_local and not (folder / "config.json").is_file():
        raise ModelError(
            f"cannot load the model {model_path!r}: expected a folder with config.json, "
            f"{'which it does not hold' if folder.is_dir() else 'found no such folder'}; "
            "give the folder that transformers' save_pretrained wrote, or a hub name"
        )


def _import_vllm() -> None:
    import vllm.engine.arg_utils
    import vllm.v1.engine.llm_engine  # noqa: F401  (imported here so that its time is seen)


def _build_engine(specification: EngineSpecification) -> Any:  # vllm's LLMEngine
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    try:
        return LLMEngine.from_engine_args(_engine_args(specification), UsageContext.LLM_CLASS)
    except Exception as error:
        raise translate_start_error(specification, error) from error


def _engine_args(specification: EngineSpecification) -> Any:  # vllm's EngineArgs
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import EngineArgs

    config, backend = specification.config, specification.weight_transfer_backend
    mebibytes = config.kv_cache_mebibytes
    if mebibytes is None and not specification.uses_gpu:
        mebibytes = _CPU_KV_CACHE_MEBIBYTES
    return EngineArgs(
        model=specification.model_path,
        trust_remote_code=specification.trust_remote_code,
        # Where a folder holds Mistral's own format too, the files that transformers and we read.
        load_format="hf",
        config_format="hf",
        dtype=config.dtype,
        seed=0,  # each request carries its own
        max_model_len=specification.max_model_length,
        max_num_seqs=config.max_num_sequences,
        kv_cache_memory_bytes=None if mebibytes is None else mebibytes << 20,
        gpu_memory_utilization=config.gpu_memory_utilization,
        enforce_eager=config.enforce_eager or not specification.uses_gpu,
        enable_sleep_mode=config.sleep_when_idle,
        enable_prefix_caching=config.enable_prefix_caching,
        # On a CPU a prompt that is read in two parts ends vLLM 0.32: it winds a request's seeded
        # generator back, and torch's CPU generator has no offset.
        enable_chunked_prefill=None if specification.uses_gpu else False,
        logprobs_mode="processed_logprobs",  # of the distribution that was sampled from
        tensor_parallel_size=specification.tensor_parallel_size,
        distributed_executor_backend="uni" if specification.tensor_parallel_size == 1 else "mp",
        weight_transfer_config=WeightTransferConfig(backend=_RECEIVING_ENDS[backend])
        if backend
        else None,
        worker_extension_cls=_WORKER_EXTENSION if backend else "",
        # Only where it is needed: with a processor vLLM copies each sequence's tokens every step.
        logits_processors=[_PADDING_MASK] if _is_padded(specification) else None,
        additional_config={"vocabulary_size": specification.vocabulary_size},
        disable_log_stats=True,
        use_tqdm_on_load=False,
    )


def _is_padded(specification: EngineSpecification) -> bool:
    """Whether the model has more rows than there are tokens."""
    from vllm.transformers_utils.config import get_config

    if specification.vocabulary_size is None:
        return False
    config = get_config(specification.model_path, specification.trust_remote_code)
    return bool(config.get_text_config().vocab_size > specification.vocabulary_size)


def translate_start_error(specification: EngineSpecification, error: Exception) -> DistillError:
    """What a user can act on, for whatever vLLM raised while it started."""
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, ValidationError):
        said = "; ".join(item["msg"] for item in error.errors())
    lengths = (
        f"sequences of up to {specification.max_model_length} tokens (data.max_prompt_tokens + "
        "rollout.sampling.max_response_tokens)"
    )
    key = f"{specification.config_key}.kv_cache_mebibytes"
    size = specification.config.kv_cache_mebibytes
    if "To serve at least one request" in said or "No available memory for the cache" in said:
        return ResourceError(
            f"the key-value cache of {specification.model_path!r} is too small for one of the "
            f"{lengths}: raise {key}, now {size} (where it is null, gpu_memory_utilization), or "
            f"shorten the sequences. vLLM said: {said}"
        )
    if isinstance(error, MemoryError) or "memory" in said.lower():
        return ResourceError(
            f"the engine of {specification.model_path!r} does not fit into memory: lower {key}, "
            f"now {size}, or give the worker a larger machine. vLLM said: {said}"
        )
    return ModelError(
        f"vLLM cannot load the model {specification.model_path!r} with {specification.config_key}"
        f".dtype={specification.config.dtype} and {lengths}. vLLM said: {said}"
    )


def _sampling_params(sampling: Sampling, seed: int, stop_token_ids: list[int]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_response_tokens,
        stop_token_ids=stop_token_ids,
        seed=seed,
        logprobs=0,  # of the sampled token alone
        flat_logprobs=True,  # in arrays, instead of a dictionary for each token
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _completion(output: Any) -> Completion:  # output: vllm's CompletionOutput
    """Copy what vLLM says into plain numpy, so that no reader has to import vLLM."""
    flat = output.logprobs  # the sampled token comes first of each position's
    logprobs = np.asarray(flat.logprobs, dtype=np.float32)
    return Completion(
        token_ids=np.asarray(output.token_ids, dtype=np.int32),
        logprobs=logprobs[np.asarray(flat.start_indices, dtype=np.int64)],
        finish_reason=output.finish_reason,
        version_spans=tuple(
            (int(span.version), span.start, span.end) for span in output.weight_versions
        ),
    )

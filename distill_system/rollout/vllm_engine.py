"""The vLLM engine behind the narrow interface of engine.py.

`vllm.v1.engine.llm_engine.LLMEngine` runs in this process. vLLM is imported when an engine is
built, not when this module is.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from distill_system.config.rollout import MOST_KEPT
from distill_system.errors import DistillError, ModelError, ResourceError
from distill_system.records import EngineLoad, Int32Array
from distill_system.rollout.engine import (
    Completion,
    EngineSpecification,
    GenerationEngine,
    TransferBackend,
)
from distill_system.rollout.idle_sleep import IdleSleep
from distill_system.rollout.sampling import Sampling

# Imported by vLLM in each process that holds a share of the model: knows the receiving ends.
_WORKER_EXTENSION = "distill_system.weights.backends.ReceivesWeights"
_RECEIVING_ENDS: dict[TransferBackend, str] = {"gloo": "gloo", "nccl": "sealed_nccl"}
_PADDING_MASK = "distill_system.rollout.padding_mask:PaddingMask"
# Without a size vLLM would take nearly all of the machine's memory for each engine on a CPU, and
# run the model once to find out what remains. Filling the cache with zeros takes 2 s per GiB.
_CPU_KV_CACHE_MEBIBYTES = 256


class VllmEngine(GenerationEngine):
    """One model in vLLM, in this process.

    Raises: ModelError if the model cannot be loaded; ResourceError if memory does not suffice.
    """

    def __init__(self, specification: EngineSpecification) -> None:
        super().__init__()  # what is under way is kept with vLLM's own name for it
        with _garbage_collection_paused():
            begin = time.perf_counter()
            _import_vllm()
            gc.freeze()  # vLLM collects by hand while it builds: spare it what importing left
            imported = time.perf_counter()
            self._engine = _build_engine(specification)
            _remove_meeting_file()
        self.import_seconds = imported - begin
        self.start_seconds = time.perf_counter() - imported
        num_rows: int = self._engine.model_config.get_vocab_size()
        self.vocabulary_size = specification.vocabulary_size or num_rows
        self._stop_token_ids = list(specification.stop_token_ids)
        self._keep_stale_cache = specification.keep_stale_cache
        self._telling: set[str] = set()  # requests that are told what could have been sampled
        self.commit_version(0)
        self._sleep = IdleSleep(self._engine, is_on=specification.config.sleep_when_idle)
        self._sleep.rest()

    def add(self, name: str, prompt: Int32Array, sampling: Sampling, seed: int) -> None:
        """See GenerationEngine."""
        prompt_input = {"prompt_token_ids": prompt.tolist()}
        top_k = min(sampling.top_k or 0, self.vocabulary_size)
        params = _sampling_params(sampling, seed, self._stop_token_ids, top_k)
        self._sleep.wake()
        self._under_way[name] = self._engine.add_request(name, prompt_input, params)
        if top_k:
            self._telling.add(name)

    def drop(self, names: Sequence[str]) -> None:
        """See GenerationEngine."""
        known = [self._under_way.pop(name) for name in names if name in self._under_way]
        self._engine.abort_request(known, internal=True)
        for name in names:
            self._finished.pop(name, None)
        self._telling -= set(names)

    def _step(self) -> None:
        for output in self._engine.step():
            name = output.request_id
            self._finish(name, _completion(output.outputs[0], tells=name in self._telling))
            self._telling.discard(name)

    def _rest(self) -> None:
        self._sleep.rest()

    def call_transfer(self, method: str, **arguments: object) -> list[Any]:
        """See GenerationEngine."""
        return self._engine.collective_rpc(method, kwargs=arguments)

    def commit_version(self, version: int) -> None:
        """See GenerationEngine."""
        self._engine.set_weight_version(str(version))
        reads_again = bool(self._under_way) and not self._keep_stale_cache
        self._engine.reset_prefix_cache(reset_running_requests=reads_again)

    @property
    def version(self) -> int:
        """See GenerationEngine."""
        return int(self._engine.get_weight_version())

    def load(self) -> EngineLoad:
        """See GenerationEngine; the figures that vLLM's own metrics are made of."""
        scheduler = self._engine.engine_core.engine_core.scheduler
        running, waiting = scheduler.get_request_counts()
        # A copy: the thread that steps the engine changes the list.
        under_way = sum(request.num_output_tokens for request in list(scheduler.running))
        return EngineLoad(
            running=running,
            waiting=waiting,
            cache_use=float(scheduler.get_kv_cache_usage()),
            written_tokens=self._num_finished_tokens + under_way,
            version=self.version,
        )


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


def _remove_meeting_file() -> None:
    """Remove the file in the temporary folder by which the engine's ranks have found one another.

    Nobody reads it any more, and vLLM leaves it there. Ranks in processes of their own keep it.
    """
    from torch import distributed

    dist: Any = distributed  # torch names the stores in no way that mypy reads
    if dist.is_initialized():
        store = dist.distributed_c10d._get_default_store()  # torch names it nowhere else
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        if isinstance(store, dist.FileStore):
            Path(store.path).unlink(missing_ok=True)


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
        max_logprobs=MOST_KEPT,
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


def _sampling_params(sampling: Sampling, seed: int, stop_token_ids: list[int], top_k: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=top_k,  # 0: all
        min_p=sampling.min_p,
        max_tokens=sampling.max_response_tokens,
        stop_token_ids=stop_token_ids,
        seed=seed,
        logprobs=top_k,  # of the sampled token alone, or of what could have been sampled too
        flat_logprobs=True,  # in arrays, instead of a dictionary for each token
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _completion(output: Any, *, tells: bool) -> Completion:  # output: vllm's CompletionOutput
    """Copy what vLLM says into plain numpy, so that no reader has to import vLLM.

    tells: whether it was asked for the most likely tokens of each position, too.
    """
    flat = output.logprobs  # the sampled token comes first of each position's
    logprobs = np.asarray(flat.logprobs, dtype=np.float32)
    return Completion(
        token_ids=np.asarray(output.token_ids, dtype=np.int32),
        logprobs=logprobs[np.asarray(flat.start_indices, dtype=np.int64)],
        finish_reason=output.finish_reason,
        version_spans=tuple(
            (int(span.version), span.start, span.end) for span in output.weight_versions
        ),
        kept_ids=_kept_ids(flat, len(output.token_ids)) if tells else None,
    )


def _kept_ids(flat: Any, num_tokens: int) -> Int32Array:
    """The sampled token of each position, and others that have any probability, int32 [T, K]."""
    ids_TK = np.array(flat.token_ids, dtype=np.int32).reshape(num_tokens, -1)
    logprobs_TK = np.asarray(flat.logprobs, dtype=np.float32).reshape(num_tokens, -1)
    is_again_TK = ids_TK == ids_TK[:, :1]
    is_again_TK[:, 0] = False
    ids_TK[is_again_TK | np.isneginf(logprobs_TK)] = -1
    return ids_TK

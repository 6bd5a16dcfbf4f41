"""Environment variables of a rollout worker's process, for whoever starts it; imports nothing."""

from __future__ import annotations

# vLLM in the worker's own process, stepped by it: no second and third process to start, to feed
# and to lose. Nothing is reported to vLLM's makers.
_EVERYWHERE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # What vLLM's own dependencies deprecate in each other says nothing to our user.
    "PYTHONWARNINGS": "ignore::FutureWarning",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}

# Without a GPU: no compiler runs at the first request (17 s saved), OpenMP threads sleep while
# they wait (spinning ones starve a busy neighbour tenfold), and no engine is pinned to core 0.
# oneDNN keeps a kernel for each number of tokens that it has met, about 0.1 MiB each: its own limit
# of 1,024 is met hours later, and looks like a leak until then.
_ON_CPU = {
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
}


def engine_environment(*, uses_gpu: bool, threads: int = 1) -> dict[str, str]:
    """Variables that must stand in a rollout worker's environment before vLLM is imported there.

    uses_gpu: the worker has a GPU.  threads: OpenMP threads of a worker without one.
    """
    if uses_gpu:
        return dict(_EVERYWHERE)
    return {**_EVERYWHERE, **_ON_CPU, "OMP_NUM_THREADS": str(threads)}

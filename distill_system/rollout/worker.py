"""One rollout worker: prompts in, trajectories out, and the receiving end of weight versions.

A plain class: cluster/ makes it remote, tests use it as it is. It imports vLLM, or transformers,
only when it is first called, and hands out numpy records alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from distill_system.config.rollout import EngineConfig, EngineName
from distill_system.errors import DataError, DistillError, ModelError, TransferError
from distill_system.records import (
    Author,
    Finish,
    Prompt,
    Trajectory,
    VersionSpan,
    WeightVersion,
    count_occurrences,
)
from distill_system.rollout.engine import (
    Completion,
    EngineSpecification,
    GenerationEngine,
    LoadReport,
    TransferBackend,
    build_engine,
)
from distill_system.rollout.sampling import Sampling
from distill_system.seeds import derive_seed


@dataclass(frozen=True, kw_only=True)
class DecodeSlice:
    """What a worker has to say after a slice of decoding.

    version: the weights it held as the slice ended.
    written_tokens: of all its sequences, finished or not, since it started.
    """

    trajectories: tuple[Trajectory, ...]
    version: int
    busy_seconds: float
    written_tokens: int


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One prompt to answer, and how.

    seed, label: with the prompt's sample_id they seed its sample.
    """

    prompt: Prompt
    label: str
    sampling: Sampling
    seed: int

    def name(self, author: Author | str) -> str:
        """Of the trajectory that answers it."""
        return f"{self.label}/{author}/{self.prompt.sample_id}"

    @property
    def sample_seed(self) -> int:
        """Of this prompt's own sample, whatever else is written beside it."""
        return derive_seed(self.seed, "rollout", self.label, self.prompt.sample_id)


class RolloutWorker:
    """Writes responses with one model, the student or the frozen teacher, in one engine.

    name: for error messages.  author: STUDENT or TEACHER, written into each trajectory.
    max_model_length: longest sequence in tokens, prompt and response together.
    tensor_parallel_size: GPUs that share the model; 1 without a GPU.
    weight_transfer_backend: None for a model that never changes.
    vocabulary_size: only token ids below it are sampled; None: every row of the model.
    stop_token_ids: a response ends with the first of them.
    keep_stale_cache: sequences under way keep the cache of older weights when new ones come.
    library: that computes, rollout.engine.
    load_report: shows what the engine has to do; None: nobody asks.

    The process must have been started with engine_environment().  The first call builds the engine.
    """

    def __init__(
        self,
        *,
        name: str,
        model_path: str,
        author: Author,
        engine: EngineConfig,
        max_model_length: int,
        uses_gpu: bool,
        tensor_parallel_size: int = 1,
        weight_transfer_backend: TransferBackend | None = None,
        trust_remote_code: bool = False,
        vocabulary_size: int | None = None,
        stop_token_ids: Sequence[int] = (),
        keep_stale_cache: bool = False,
        library: EngineName = "vllm",
        load_report: LoadReport | None = None,
    ) -> None:
        self._name = name
        self._load_report = load_report
        self._author = author
        self._max_model_length = max_model_length
        self._holds_whole_weights = True
        self._specification = EngineSpecification(
            model_path=model_path,
            config=engine,
            config_key=f"rollout.{author}_engine",
            max_model_length=max_model_length,
            uses_gpu=uses_gpu,
            tensor_parallel_size=tensor_parallel_size,
            weight_transfer_backend=weight_transfer_backend,
            trust_remote_code=trust_remote_code,
            vocabulary_size=vocabulary_size,
            stop_token_ids=tuple(stop_token_ids),
            keep_stale_cache=keep_stale_cache,
            engine=library,
        )
        self._requests: dict[str, GenerationRequest] = {}

    @cached_property
    def _engine(self) -> GenerationEngine:
        # Not in the constructor: a remote worker whose constructor raises is reported as dead, and
        # the type and cause of the error are lost; one whose method raises is not.
        return build_engine(self._specification)

    def ready(self) -> dict[str, float]:
        """Build the engine if need be; seconds that importing its library and building it took.

        Raises: ModelError if the model cannot be loaded; ResourceError if memory does not suffice.
        """
        if self._load_report is not None:
            self._load_report.start(self._name, self._engine.load)
            self._load_report = None  # `ready` may be called again
        return {
            "import_seconds": self._engine.import_seconds,
            "start_seconds": self._engine.start_seconds,
        }

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, label: str
    ) -> list[Trajectory]:
        """One trajectory per prompt, in the prompts' order, named label/author/sample_id.

        A prompt's sample depends on seed, label and sample_id, not on the worker or on what else
        is in the call.

        Raises: DataError if a prompt and its response do not fit the model; ModelError if a prompt
        holds a token that the model does not know; TransferError after a failed weight update.
        """
        self._check_weights()
        requests = [
            GenerationRequest(prompt=prompt, label=label, sampling=sampling, seed=seed)
            for prompt in count_occurrences(prompts)
        ]
        for request in requests:
            self._check_prompt(request)
        completions = self._engine.complete(
            [request.prompt.ids_for(self._author) for request in requests],
            sampling,
            [request.sample_seed for request in requests],
        )
        return [
            make_trajectory(request, completion, self._author)
            for request, completion in zip(requests, completions, strict=True)
        ]

    def advance(self, requests: Sequence[GenerationRequest], seconds: float) -> DecodeSlice:
        """Take requests in, decode for a slice of time, hand out what is finished.

        Sequences go on over slices, and other calls, such as new weights, come between them. A
        prompt's sample depends on its request and the weights that wrote it. After a broken weight
        update the slice passes idle: the weights are sent again, or whoever sends them fails.

        Raises: DataError, ModelError as generate does.
        """
        started = time.perf_counter()
        for request in requests:
            self._check_prompt(request)
        for request in requests:
            name, prompt_ids = request.name(self._author), request.prompt.ids_for(self._author)
            self._engine.add(name, prompt_ids, request.sampling, request.sample_seed)
            self._requests[name] = request
        finished = {}
        if self._holds_whole_weights:
            finished = self._engine.decode(seconds)
        else:
            time.sleep(seconds)
        trajectories = tuple(
            make_trajectory(self._requests.pop(name), completion, self._author)
            for name, completion in finished.items()
        )
        is_busy = self._holds_whole_weights
        return DecodeSlice(
            trajectories=trajectories,
            version=self._engine.version,
            busy_seconds=time.perf_counter() - started if is_busy else 0.0,
            written_tokens=self._engine.load().written_tokens,
        )

    def abandon(self) -> None:
        """Forget every request that `advance` took in and has not answered."""
        self._engine.drop(list(self._requests))
        self._requests.clear()

    def init_weight_transfer_engine(self, init_info: dict[str, object]) -> None:
        """Join the group that weights travel in, leaving an earlier one.

        Blocks until the learner has joined.  Raises: TransferError.
        """
        self._call_transfer("shutdown_weight_transfer_engine")
        self._call_transfer("init_weight_transfer_engine", init_info=init_info)

    def receive_weights(self, version: int, update_info: dict[str, object]) -> WeightVersion:
        """Take the weights in that the learner is sending now, whole, and write with them.

        update_info: names, dtypes and shapes. What older weights cached is dropped.

        Raises: TransferError if they do not arrive as they were sent; this worker then goes on with
        the version that it held. If loading them fails half-way, it generates nothing until a later
        version arrives.
        """
        started = time.perf_counter()
        is_loaded = False
        try:
            self._call_transfer("start_weight_update")
            self._call_transfer("update_weights", update_info=update_info)
            self._call_transfer("finish_weight_update")
            is_loaded = True
            num_bytes, digest = self._call_transfer("received_seal")[0]
            self._engine.commit_version(version)
        except BaseException:
            # What is loaded and has no version would be taken for the version before.
            self._holds_whole_weights &= not is_loaded and self._is_whole()
            raise
        self._holds_whole_weights = True
        return WeightVersion(
            version=version,
            num_bytes=num_bytes,
            digest=digest,
            seconds=time.perf_counter() - started,
        )

    def _is_whole(self) -> bool:
        """Whether the engine says that its weights are those of one version."""
        try:
            return all(self._call_transfer("holds_whole_weights"))
        except TransferError:
            return False  # an engine that does not even say so

    def weight_version(self) -> int:
        """The version committed last; 0 is the model folder's own weights."""
        return self._engine.version

    def _call_transfer(self, method: str, **arguments: object) -> list[Any]:
        try:
            return self._engine.call_transfer(method, **arguments)
        except Exception as error:
            said = str(error) if isinstance(error, DistillError) else repr(error)
            raise TransferError(
                f"{method} failed in {self._name}, which carries version {self._engine.version}: "
                f"{said}"
            ) from error

    def _check_weights(self) -> None:
        if not self._holds_whole_weights:
            raise TransferError(
                f"{self._name} holds no whole set of weights: the weight update after version "
                f"{self._engine.version} is broken; publish the weights again, or restart the "
                "worker"
            )

    def _check_prompt(self, request: GenerationRequest) -> None:
        prompt, prompt_ids = request.prompt, request.prompt.ids_for(self._author)
        num_tokens, most = prompt_ids.size, request.sampling.max_response_tokens
        if num_tokens + most > self._max_model_length:
            raise DataError(
                f"prompt {prompt.prompt_id!r} does not fit {self._name}: {num_tokens} prompt "
                f"tokens + rollout.sampling.max_response_tokens={most} must be at most "
                f"{self._max_model_length}; lower data.max_prompt_tokens or "
                "rollout.sampling.max_response_tokens, or leave the prompt out"
            )
        lowest, highest = int(prompt_ids.min()), int(prompt_ids.max())
        if lowest < 0 or highest >= self._engine.vocabulary_size:
            raise ModelError(
                f"prompt {prompt.prompt_id!r} holds token ids {lowest} to {highest}, the "
                f"{self._author} of {self._name} knows 0 to {self._engine.vocabulary_size - 1}: "
                "the tokenizer and the model do not belong together"
            )


def make_trajectory(
    request: GenerationRequest, completion: Completion, author: Author
) -> Trajectory:
    """The record of one completion.  Raises: RecordError if the engine's arrays disagree."""
    prompt, is_student = request.prompt, author is Author.STUDENT
    versions = completion.version_spans if is_student else ()
    return Trajectory(
        trajectory_id=request.name(author),
        prompt_id=prompt.prompt_id,
        author=author,
        token_ids=np.concatenate([prompt.token_ids, completion.token_ids]),
        num_prompt_tokens=int(prompt.token_ids.size),
        behaviour_logprobs=completion.logprobs,
        temperature=request.sampling.temperature,
        finish=Finish(completion.finish_reason),
        weight_versions=tuple(
            VersionSpan(version=version, start=start, end=end) for version, start, end in versions
        ),
        kept_ids=completion.kept_ids if is_student else None,
        teacher_prompt_ids=prompt.teacher_ids,
    )

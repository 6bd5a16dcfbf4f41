"""The transformers engine behind the narrow interface of engine.py: continuous batching in torch.

Sequences join and leave between steps. Those that run share one cache (running_cache.py), and each
draws by random numbers of its own (drawing.py), so that who else is in the batch changes no more of
a sample than the rounding of its logits.

    new prompts --read whole--> first token --.
                                              v
    waiting --------------------> running: a token each, step by step --> finished

Of an encoder-decoder the encoder reads the prompt, and the decoder begins with its start token.

Axes: B sequences, T tokens read at once, L their longest, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.functional import embedding
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from distill_system.errors import ModelError, ResourceError
from distill_system.language_model import find_decoder_start, model_class, require_all_tensors
from distill_system.records import EngineLoad, Int32Array
from distill_system.rollout.drawing import Truncation, draw_tokens, draw_uniforms
from distill_system.rollout.engine import Completion, EngineSpecification, GenerationEngine
from distill_system.rollout.running_cache import RunningCache, RunningEncodedCache
from distill_system.rollout.sampling import Sampling
from distill_system.weights.receiver import WeightReceiver

_ATTENTION = "rollout"
"""The attn_implementation under which transformers finds this engine's attention and mask."""

_TOKENS_READ_AT_ONCE = 8192
"""Of prompts, padding included; a longer prompt is read alone."""

_ALL = 2**31
"""As top_k: more than there are."""

_STEPS_BETWEEN_LOOKS = {"cpu": 1, "cuda": 8}
"""Tokens of each sequence between two looks at which have ended. A look waits for the device, and a
sequence that ended before it has written the rest for nothing."""


@dataclass(slots=True, kw_only=True)
class _Sequence:
    """One request, and what has been written of it.

    uniforms: float64 [max_response_tokens].  decoder_start: None without an encoder.
    spans: (version, start, end) of the response.  kept: of each token, those it was drawn from.
    """

    name: str
    prompt: Int32Array
    sampling: Sampling
    uniforms: np.ndarray
    decoder_start: int | None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[tuple[int, int, int]] = field(default_factory=list)
    kept: list[np.ndarray] = field(default_factory=list)
    finish_reason: str = ""

    @property
    def num_left(self) -> int:
        """Tokens until the length limit."""
        return self.sampling.max_response_tokens - len(self.tokens)

    def read_ids(self) -> np.ndarray:
        """What the decoder reads: prompt or start token, and the response so far, int64 [L]."""
        first = self.prompt if self.decoder_start is None else [self.decoder_start]
        return np.concatenate([first, self.tokens]).astype(np.int64)

    @property
    def num_cached(self) -> int:
        """Columns of the cache, once it runs: its last token is written and not yet read."""
        first = self.prompt.size if self.decoder_start is None else 1
        return int(first) + len(self.tokens) - 1

    def write(
        self, token: int, logprob: float, kept: np.ndarray, version: int, stops: frozenset[int]
    ) -> None:
        """Take one token in, unless an earlier one ended the response."""
        if self.finish_reason:
            return
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.sampling.top_k is not None:
            self.kept.append(kept[: self.sampling.top_k])
        count = len(self.tokens)
        first = count - 1
        if self.spans and self.spans[-1][0] == version:
            first = self.spans.pop()[1]
        self.spans.append((version, first, count))
        if token in stops:
            self.finish_reason = "stop"
        elif self.num_left == 0:
            self.finish_reason = "length"

    def complete(self) -> Completion:
        """What is handed out."""
        return Completion(
            token_ids=np.array(self.tokens, np.int32),
            logprobs=np.array(self.logprobs, np.float32),
            finish_reason=self.finish_reason,
            version_spans=tuple(self.spans),
            kept_ids=None if self.sampling.top_k is None else np.stack(self.kept).astype(np.int32),
        )


class TransformersEngine(GenerationEngine):
    """One model in transformers, in this process, on the CPU or on one GPU.

    Raises: ModelError if the model cannot be loaded; ResourceError if memory does not suffice.
    """

    def __init__(self, specification: EngineSpecification) -> None:
        super().__init__()
        self.import_seconds = 0.0  # build_engine has imported this module
        began = time.perf_counter()
        self._device = torch.device("cuda" if specification.uses_gpu else "cpu")
        self._model = _load_model(specification, self._device)
        rows: int = self._model.get_output_embeddings().weight.shape[0]
        self.vocabulary_size = specification.vocabulary_size or rows
        self._stops = _stop_token_ids(self._model, specification)
        self._decoder_start = find_decoder_start(self._model)
        self._places_BT: Tensor | None = None  # of the tokens that are being read
        self._follow_places()
        self._keep_stale_cache = specification.keep_stale_cache
        self._receiver = WeightReceiver(self._model)
        self._version = 0
        self._waiting: list[_Sequence] = []
        self._running: list[_Sequence] = []
        self._cache: Any = None  # of the running sequences, in their order
        self._most_at_once = self._count_sequences(specification)
        self.start_seconds = time.perf_counter() - began

    def add(self, name: str, prompt: Int32Array, sampling: Sampling, seed: int) -> None:
        """See GenerationEngine."""
        sequence = _Sequence(
            name=name,
            prompt=prompt,
            sampling=sampling,
            uniforms=draw_uniforms(seed, sampling.max_response_tokens),
            decoder_start=self._decoder_start,
        )
        self._waiting.append(sequence)
        self._under_way[name] = sequence

    def drop(self, names: Sequence[str]) -> None:
        """See GenerationEngine."""
        for name in names:
            self._under_way.pop(name, None)
            self._finished.pop(name, None)
        self._waiting = [s for s in self._waiting if s.name in self._under_way]
        self._keep_running(lambda sequence: sequence.name in self._under_way)

    def call_transfer(self, method: str, **arguments: object) -> list[Any]:
        """See GenerationEngine; there is one process."""
        return [getattr(self._receiver, method)(**arguments)]

    def commit_version(self, version: int) -> None:
        """See GenerationEngine."""
        self._version = version
        if not self._keep_stale_cache:
            self._forget_cache()

    @property
    def version(self) -> int:
        """See GenerationEngine."""
        return self._version

    def load(self) -> EngineLoad:
        """See GenerationEngine; the cache grows with what runs."""
        running, waiting = list(self._running), list(self._waiting)
        under_way = sum(len(sequence.tokens) for sequence in [*running, *waiting])
        return EngineLoad(
            running=len(running),
            waiting=len(waiting),
            cache_use=None,
            written_tokens=self._num_finished_tokens + under_way,
            version=self._version,
        )

    @torch.no_grad()
    def _step(self) -> None:
        """Let sequences in while there is room, then write some tokens of all that run."""
        try:
            self._admit()
            if self._running:
                self._write_on()
        except BaseException:
            # Some layers may have seen tokens that others have not.
            self._forget_cache()
            raise

    def _forget_cache(self) -> None:
        """Let the running sequences be read again, before all that wait."""
        self._waiting = self._running + self._waiting
        self._running, self._cache = [], None

    def _admit(self) -> None:
        """Read those that may run: their first token, and their part of the cache."""
        room = self._most_at_once - len(self._running)
        admitted, self._waiting = self._waiting[:room], self._waiting[room:]
        groups = list(_group(admitted))
        while groups:
            group = groups[0]
            try:
                cache = self._read_whole(group)
            except BaseException:
                self._waiting = [s for g in groups for s in g] + self._waiting
                raise
            if self._cache is None:
                self._cache = cache
            else:
                self._cache.join(cache)
            self._running += groups.pop(0)
        self._retire()

    def _read_whole(self, group: Sequence[_Sequence]) -> Any:
        """Read sequences from their first token on, and write one token of each."""
        rows = [sequence.read_ids() for sequence in group]
        longest = max(map(len, rows))
        ids_BL = np.zeros((len(rows), longest), np.int64)
        for ids_L, row in zip(ids_BL, rows, strict=True):
            ids_L[longest - len(row) :] = row
        starts_B = self._to_device([longest - len(row) for row in rows])
        cache: Any = RunningCache(starts_B)
        encoded_BPH = None
        if self._decoder_start is not None:
            encoded_BPH, encoded_starts_B = self._encode([s.prompt for s in group])
            cache = RunningEncodedCache(starts_B, encoded_starts_B)
        logits_BV = self._read(self._to_device(ids_BL), cache, encoded_BPH)
        drawn = _Draws(group, self._device, num_steps=1)
        self._take(group, *drawn.draw(logits_BV, 0))
        return cache

    def _write_on(self) -> None:
        """Some tokens of every running sequence, without waiting for the device between them."""
        most = _STEPS_BETWEEN_LOOKS[self._device.type]
        num_steps = min(most, *(sequence.num_left for sequence in self._running))
        draws = _Draws(self._running, self._device, num_steps=num_steps)
        tokens_B = self._to_device([sequence.tokens[-1] for sequence in self._running])
        written = []
        for step in range(num_steps):
            logits_BV = self._read(tokens_B[:, None], self._cache)
            drawn = draws.draw(logits_BV, step)
            tokens_B = drawn[0]
            written.append(drawn)
        stacked = (torch.stack(each, dim=1) for each in zip(*written, strict=True))
        self._take(self._running, *stacked)
        self._retire()

    def _encode(self, prompts: Sequence[Int32Array]) -> tuple[Tensor, Tensor]:
        """The encoder's states of prompts, all ending in the last column [B, P, H], and where each
        begins, int64 [B].
        """
        sizes = np.array([prompt.size for prompt in prompts])
        columns = np.arange(sizes.max())
        ids_BP = np.zeros((len(prompts), sizes.max()), np.int64)
        for ids_P, prompt in zip(ids_BP, prompts, strict=True):
            ids_P[: prompt.size] = prompt  # padded behind: some encoders count their places
        is_prompt_BP = torch.from_numpy(columns < sizes[:, None]).to(self._device)
        states_BPH = self._model.get_encoder()(
            input_ids=self._to_device(ids_BP), attention_mask=is_prompt_BP
        ).last_hidden_state
        starts = sizes.max() - sizes
        source_BP = self._to_device(np.maximum(columns - starts[:, None], 0))
        rows_B1 = torch.arange(len(prompts), device=self._device)[:, None]
        return states_BPH[rows_B1, source_BP], self._to_device(starts)

    def _read(self, ids_BT: Tensor, cache: Any, encoded_BPH: Tensor | None = None) -> Tensor:
        """Logits after the last of T further tokens of each sequence, [B, V].

        encoded_BPH: the encoder's states, with a cache that does not have them yet.
        """
        sees_BC, self._places_BT = cache.see(ids_BT.shape[1])
        if self._decoder_start is None:
            output = self._model(
                input_ids=ids_BT,
                attention_mask=sees_BC,
                position_ids=self._places_BT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            return output.logits[:, -1, : self.vocabulary_size]
        sees_encoded_BP = cache.see_encoded(0 if encoded_BPH is None else encoded_BPH.shape[1])
        if encoded_BPH is None:  # the cache has what is computed of them
            encoded_BPH = sees_encoded_BP.new_empty((*sees_encoded_BP.shape, 0))
        output = self._model(
            encoder_outputs=(encoded_BPH,),
            attention_mask=sees_encoded_BP,
            decoder_input_ids=ids_BT,
            decoder_attention_mask=sees_BC,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits[:, -1, : self.vocabulary_size]

    def _follow_places(self) -> None:
        """Where a decoder embeds places by columns (BART), let it embed each sequence's own."""
        if self._decoder_start is None:
            return
        places = getattr(self._model.get_decoder(), "embed_positions", None)
        if places is None:
            return

        def embed(module: Any, arguments: Any, columns: Tensor) -> Tensor:
            assert self._places_BT is not None, "set before the model is called"
            return embedding(self._places_BT + module.offset, module.weight)

        places.register_forward_hook(embed)

    @torch.no_grad()
    def _count_sequences(self, specification: EngineSpecification) -> int:
        """How many sequences of full length run at once: as configured, and as the cache has room.

        Of an encoder-decoder a prompt's token takes as much room as a response's.
        Raises: ResourceError if there is no room for one.
        """
        config = specification.config
        if config.kv_cache_mebibytes is None:
            return config.max_num_sequences
        probe = _Sequence(
            name="probe",
            prompt=np.zeros(1, np.int32),
            sampling=Sampling(temperature=0.0, max_response_tokens=2),
            uniforms=np.zeros(2),
            decoder_start=self._decoder_start,
        )
        filled = self._read_whole([probe]).filled
        bytes_of_one = specification.max_model_length * sum(states.nbytes for states in filled)
        room = (config.kv_cache_mebibytes << 20) // bytes_of_one
        if room < 1:
            raise ResourceError(
                f"the key-value cache of {specification.model_path!r} is too small for one "
                f"sequence of {specification.max_model_length} tokens (data.max_prompt_tokens + "
                "rollout.sampling.max_response_tokens), which takes "
                f"{bytes_of_one / 2**20:.1f} MiB: raise {specification.config_key}"
                f".kv_cache_mebibytes, now {config.kv_cache_mebibytes}, or shorten the sequences"
            )
        return min(config.max_num_sequences, room)

    def _take(
        self, group: Sequence[_Sequence], tokens: Tensor, logprobs: Tensor, kept: Tensor
    ) -> None:
        """Bring what was drawn, [B] or [B, S], and of what, with K behind, to the sequences."""
        # One transfer of all; a float64 holds each exactly.
        columns = [tokens[..., None].double(), logprobs[..., None].double(), kept.double()]
        together = torch.cat(columns, dim=-1)
        drawn_BSX = together.view(len(group), -1, together.shape[-1]).cpu().numpy()
        for sequence, drawn_SX in zip(group, drawn_BSX, strict=True):
            for drawn_X in drawn_SX:
                token, logprob = int(drawn_X[0]), float(drawn_X[1])
                sequence.write(token, logprob, drawn_X[2:], self._version, self._stops)

    def _retire(self) -> None:
        for sequence in self._running:
            if sequence.finish_reason:
                self._finish(sequence.name, sequence.complete())
        self._keep_running(lambda sequence: not sequence.finish_reason)

    def _keep_running(self, is_kept: Any) -> None:
        """Give up the cache of all others, and the columns that only they had."""
        kept = [at for at, sequence in enumerate(self._running) if is_kept(sequence)]
        if len(kept) == len(self._running):
            return
        self._running = [self._running[at] for at in kept]
        if not kept:
            self._cache = None
            return
        first_column = self._cache.length - max(s.num_cached for s in self._running)
        self._cache.select(self._to_device(kept), first_column)

    def _to_device(self, numbers: Any) -> Tensor:
        return torch.as_tensor(np.asarray(numbers, np.int64)).to(self._device, non_blocking=True)


class _Draws:
    """The random numbers, temperatures and truncations of a batch for some steps, on its device."""

    def __init__(
        self, sequences: Sequence[_Sequence], device: torch.device, *, num_steps: int
    ) -> None:
        firsts = [len(sequence.tokens) for sequence in sequences]
        rows = zip(sequences, firsts, strict=True)
        uniforms_BS = np.stack([s.uniforms[first : first + num_steps] for s, first in rows])
        self._uniforms_SB = torch.from_numpy(uniforms_BS.T.copy()).to(device, non_blocking=True)
        temperatures = [sequence.sampling.temperature for sequence in sequences]
        self._temperatures_B = torch.tensor(temperatures, dtype=torch.float32).to(device)
        self._truncation = _truncation([sequence.sampling for sequence in sequences], device)

    def draw(self, logits_BV: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens int64 [B], log-probabilities float32 [B] and what was kept, int64 [B, K]."""
        uniforms_B = self._uniforms_SB[step]
        return draw_tokens(logits_BV, uniforms_B, self._temperatures_B, self._truncation)


def _truncation(each: Sequence[Sampling], device: torch.device) -> Truncation | None:
    """What each of these samples from; None where all sample from everything."""
    top_ks = [sampling.top_k for sampling in each]
    if all(sampling.top_p == 1.0 and sampling.min_p == 0.0 for sampling in each) and not any(
        top_ks
    ):
        return None
    return Truncation(
        top_ps_B=torch.tensor([sampling.top_p for sampling in each]).to(device),
        top_ks_B=torch.tensor([top_k or _ALL for top_k in top_ks]).to(device),
        min_ps_B=torch.tensor([sampling.min_p for sampling in each]).to(device),
        num_told=max(top_k or 0 for top_k in top_ks),
    )


def _group(sequences: Sequence[_Sequence]) -> Iterator[list[_Sequence]]:
    """Sequences in groups that are read at once, in an order that their lengths alone decide."""
    group: list[_Sequence] = []
    for sequence in sorted(sequences, key=lambda s: s.prompt.size + len(s.tokens)):
        # Ascending lengths: the next one is the longest, to which all are padded.
        length = sequence.prompt.size + len(sequence.tokens)
        if group and length * (len(group) + 1) > _TOKENS_READ_AT_ONCE:
            yield group
            group = []
        group.append(sequence)
    if group:
        yield group


def _load_model(specification: EngineSpecification, device: torch.device) -> Any:
    path, key = specification.model_path, specification.config_key
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ResourceError(
            f"the engine of {path!r} was given a GPU, and torch {torch.__version__} sees none: "
            "install torch for CUDA, or set the pool's gpus to 0"
        )
    try:
        shape = AutoConfig.from_pretrained(path, trust_remote_code=specification.trust_remote_code)
        model, info = model_class(shape).from_pretrained(
            path,
            dtype=getattr(torch, specification.config.dtype),
            trust_remote_code=specification.trust_remote_code,
            attn_implementation=_ATTENTION,
            output_loading_info=True,
        )
        require_all_tensors(model, info, repr(path))
        return model.to(device).eval().requires_grad_(False)
    except ModelError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError(
            f"the weights of {path!r} do not fit into memory: set {key}.dtype=bfloat16, or give "
            f"the worker a larger device. torch said: {error}"
        ) from error
    except Exception as error:
        raise ModelError(
            f"transformers {transformers.__version__} cannot load the model {path!r} with {key}"
            f".dtype={specification.config.dtype}. It said: {type(error).__name__}: {error}"
        ) from error


def _stop_token_ids(model: Any, specification: EngineSpecification) -> frozenset[int]:
    listed = model.generation_config.eos_token_id
    own = [listed] if isinstance(listed, int) else (listed or [])
    return frozenset((*own, *specification.stop_token_ids))


def _mask(*args: Any, **kwargs: Any) -> Tensor:
    """transformers' own mask, always made: whether it may be left out is asked of the device.

    A column before a sequence's first one sees itself, or its attention would be over nothing; what
    is no causal mask leaves every token a prompt to see.
    """
    is_causal = not kwargs.get("allow_is_bidirectional_skip", False)
    always = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    sees_B1TC = sdpa_mask(*args, **{**kwargs, **always})
    num_queries, num_columns = sees_B1TC.shape[-2:]
    if num_queries == 1 or not is_causal:
        return sees_B1TC
    own = torch.ones(num_queries, num_columns, dtype=torch.bool, device=sees_B1TC.device)
    first = num_columns - num_queries
    return sees_B1TC | own.tril(first).triu(first)


AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
AttentionMaskInterface.register(_ATTENTION, _mask)

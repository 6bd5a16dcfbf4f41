"""The transformers engine against the same model's own forward over whole sequences, unpadded."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_families import save_family
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from distill_system.config.rollout import EngineConfig
from distill_system.errors import ModelError, ResourceError
from distill_system.rollout.engine import Completion, EngineSpecification, build_engine
from distill_system.rollout.sampling import Sampling
from distill_system.rollout.transformers_engine import TransformersEngine

NUM_TOKENS, MAX_RESPONSE = 64, 24
WARM = Sampling(temperature=0.8, max_response_tokens=MAX_RESPONSE)
COLD = Sampling(temperature=0.0, max_response_tokens=MAX_RESPONSE)
ENCODER_DECODERS = ("t5", "t5_gated", "bart")
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2", "opt", "opt_350m")
Build = Callable[..., TransformersEngine]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model of a family, of 6 rows more than it has tokens."""
    base = tmp_path_factory.mktemp("families")

    @cache
    def make(family: str) -> Path:
        return save_family(base / family, family, num_rows=70, end_ids=[2, 7], seed=3)

    return make


@pytest.fixture(scope="module")
def build(folder: Callable[[str], Path]) -> Build:
    def make(family: str = "llama", **changes: Any) -> TransformersEngine:
        settings: dict[str, Any] = {
            "model_path": str(folder(family)),
            "config": EngineConfig(max_num_sequences=5),
            "config_key": "rollout.student_engine",
            "max_model_length": 64,
            "uses_gpu": False,
            "tensor_parallel_size": 1,
            "weight_transfer_backend": None,
            "trust_remote_code": False,
            "vocabulary_size": NUM_TOKENS,
            "stop_token_ids": (5,),
            "engine": "transformers",
        }
        engine = build_engine(EngineSpecification(**{**settings, **changes}))
        assert isinstance(engine, TransformersEngine)
        return engine

    return make


def _prompts(count: int = 12, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(4, NUM_TOKENS, n).astype(np.int32) for n in rng.integers(1, 20, count)]


def _logits(model: Any, prompt: np.ndarray, response: np.ndarray) -> torch.Tensor:
    """Before each response token, of the tokens alone; the sequence is read by itself."""
    if model.config.is_encoder_decoder:
        ids, labels = (torch.from_numpy(each.astype(np.int64))[None] for each in (prompt, response))
        with torch.no_grad():
            return model(input_ids=ids, labels=labels).logits[0, :, :NUM_TOKENS].float()
    ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1, :NUM_TOKENS].float()


def _error(model: Any, prompt: np.ndarray, completion: Completion, temperature: float) -> float:
    logits = _logits(model, prompt, completion.token_ids) / temperature
    ids = torch.from_numpy(completion.token_ids.astype(np.int64))[:, None]
    truth = logits.log_softmax(-1).gather(-1, ids)[:, 0]
    return float((truth - torch.from_numpy(completion.logprobs)).abs().max())


def _plain(folder: Path) -> Any:
    is_encoder_decoder = AutoConfig.from_pretrained(folder).is_encoder_decoder
    kind = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
    return kind.from_pretrained(folder).eval()


@pytest.mark.parametrize("family", [*DECODERS, *ENCODER_DECODERS])
def test_a_family_is_written_as_its_own_model_reads(build: Build, folder: Any, family: str) -> None:
    """Twelve prompts over five places: sequences join and leave while others go on."""
    engine = build(family)
    truth = _plain(folder(family))
    prompts = _prompts()
    for sampling, temperature in ((WARM, 0.8), (COLD, 1.0)):
        completions = engine.complete(prompts, sampling, range(12))
        for prompt, completion in zip(prompts, completions, strict=True):
            assert _error(truth, prompt, completion, temperature) < 1e-4
            count = completion.token_ids.size
            ends = [token in (2, 5, 7) for token in completion.token_ids.tolist()]
            assert not any(ends[:-1])
            assert (completion.finish_reason == "stop") == ends[-1]
            assert ends[-1] or count == MAX_RESPONSE
            assert completion.version_spans == ((0, 0, count),)
            if sampling is COLD:
                best = _logits(truth, prompt, completion.token_ids).argmax(-1)
                assert best.tolist() == completion.token_ids.tolist()


def test_a_sample_depends_on_its_seed_and_not_on_its_neighbours(build: Build) -> None:
    engine, prompts = build(), _prompts()
    together = engine.complete(prompts, WARM, range(12))
    for at in (0, 5, 11):
        [alone] = engine.complete(prompts[at : at + 1], WARM, [at])
        assert alone.token_ids.tolist() == together[at].token_ids.tolist()
        np.testing.assert_allclose(alone.logprobs, together[at].logprobs, atol=1e-5)
    again = build().complete(prompts, WARM, range(12))
    assert all(
        np.array_equal(a.logprobs, b.logprobs) for a, b in zip(together, again, strict=True)
    ), "the same calls of a new engine give the same bits"
    other = engine.complete(prompts, WARM, range(100, 112))
    assert (
        sum(
            a.token_ids.tolist() == b.token_ids.tolist()
            for a, b in zip(together, other, strict=True)
        )
        < 3
    )


def test_requests_of_different_sampling_go_side_by_side(build: Build, folder: Any) -> None:
    engine, prompts = build(), _prompts(3)
    narrow = Sampling(temperature=1.0, top_p=0.5, top_k=9, max_response_tokens=6)
    for name, prompt, sampling in zip("abc", prompts, (COLD, narrow, WARM), strict=True):
        engine.add(name, prompt, sampling, 3)
    done: dict[str, Completion] = {}
    while len(done) < 3:
        done |= engine.decode(0.01)
    alone = [
        build().complete([prompt], sampling, [3])[0]
        for prompt, sampling in zip(prompts, (COLD, narrow, WARM), strict=True)
    ]
    for name, other in zip("abc", alone, strict=True):
        assert done[name].token_ids.tolist() == other.token_ids.tolist()
        np.testing.assert_allclose(done[name].logprobs, other.logprobs, atol=1e-5)
    assert done["b"].token_ids.size <= 6
    assert done["a"].kept_ids is None
    kept = done["b"].kept_ids
    assert kept is not None
    assert kept.shape == (done["b"].token_ids.size, 9)
    logits = _logits(_plain(folder("llama")), prompts[1], done["b"].token_ids)
    written = (done["b"].token_ids, done["b"].logprobs)
    for row, ids, token, said in zip(logits, kept, *written, strict=True):
        left = ids[ids >= 0].tolist()
        assert row.topk(len(left)).indices.tolist() == left, "the likeliest, in their order"
        share = torch.exp(row[int(token)]) / torch.exp(row[left]).sum()
        assert said == pytest.approx(float(share.log()), abs=1e-4)


def test_a_slice_hands_out_what_is_finished_and_the_rest_goes_on(build: Build) -> None:
    engine, prompts = build(), _prompts(8)
    engine.add("short", prompts[0], Sampling(temperature=1.0, max_response_tokens=1), 0)
    for at, prompt in enumerate(prompts):
        engine.add(f"long {at}", prompt, WARM, at)
    first = engine.decode(0.0)
    assert first.keys() <= {"short"}, "no step without time"
    finished = dict(first)
    while engine._under_way:
        finished |= engine.decode(0.001)
    assert finished.keys() == {"short", *(f"long {at}" for at in range(8))}
    expected = build().complete(prompts, WARM, range(8))
    for at, completion in enumerate(expected):
        assert finished[f"long {at}"].token_ids.tolist() == completion.token_ids.tolist()


def test_what_is_dropped_is_forgotten_wherever_it_is(build: Build) -> None:
    engine, prompts = build(), _prompts(9)
    for at, prompt in enumerate(prompts):
        engine.add(f"n{at}", prompt, WARM, at)
    engine._step()
    engine.drop(["n0", "n3", "n8", "of nobody"])
    left = dict.fromkeys(f"n{at}" for at in range(9) if at not in (0, 3, 8))
    finished: dict[str, Completion] = {}
    while engine._under_way:
        finished |= engine.decode(0.01)
    assert finished.keys() == left.keys()
    expected = build().complete(prompts, WARM, range(9))
    for at, completion in enumerate(expected):
        if f"n{at}" in finished:
            assert finished[f"n{at}"].token_ids.tolist() == completion.token_ids.tolist()


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_weights_that_come_between_two_tokens(build: Build, family: str, keeps: bool) -> None:
    """Read again, the tokens to come are the new weights' own; a stale cache is of no one model."""
    engine, prompts = build(family, keep_stale_cache=keeps), _prompts(5)
    for at, prompt in enumerate(prompts):
        engine.add(f"n{at}", prompt, WARM, at)
    for _ in range(2):
        engine._step()
    torch.manual_seed(0)
    old, new = (_plain(Path(engine._model.config.name_or_path)) for _ in range(2))
    for parameter in engine._model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    new.load_state_dict(engine._model.state_dict())
    engine.commit_version(6)
    finished: dict[str, Completion] = {}
    while engine._under_way:
        finished |= engine.decode(1.0)
    assert engine.version == 6
    crossed = [c for c in finished.values() if len(c.version_spans) == 2]
    assert len(crossed) >= 3
    errors = []
    for at, prompt in enumerate(prompts):
        completion = finished[f"n{at}"]
        if len(completion.version_spans) < 2:
            continue
        (first, start, middle), (second, again, end) = completion.version_spans
        assert (first, start, again, second) == (0, 0, middle, 6)
        assert end == completion.token_ids.size
        for model, part in ((old, slice(0, middle)), (new, slice(middle, end))):
            logits = _logits(model, prompt, completion.token_ids)[part] / 0.8
            ids = torch.from_numpy(completion.token_ids[part].astype(np.int64))[:, None]
            truth = logits.log_softmax(-1).gather(-1, ids)[:, 0].numpy()
            errors.append(np.abs(truth - completion.logprobs[part]).max())
    assert max(errors[::2]) < 1e-4, "written before the weights came"
    assert (max(errors[1::2]) > 1e-2) == keeps


def test_a_step_that_fails_loses_nothing(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, prompts = build(), _prompts(7)
    for at, prompt in enumerate(prompts):
        engine.add(f"n{at}", prompt, WARM, at)
    for _ in range(2):
        engine._step()
    with monkeypatch.context() as broken:
        broken.setattr(engine, "_model", lambda **_: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                engine.decode(1.0)
        with pytest.raises(ZeroDivisionError):
            engine.complete(prompts, WARM, range(7))
    finished: dict[str, Completion] = {}
    while engine._under_way:
        finished |= engine.decode(1.0)
    expected = build().complete(prompts, WARM, range(7))
    assert [finished[f"n{at}"].token_ids.tolist() for at in range(7)] == [
        completion.token_ids.tolist() for completion in expected
    ]


def test_long_prompts_are_read_in_several_goes(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, prompts = build(), _prompts()
    whole = engine.complete(prompts, WARM, range(12))
    monkeypatch.setattr("distill_system.rollout.transformers_engine._TOKENS_READ_AT_ONCE", 20)
    parts = engine.complete(prompts, WARM, range(12))
    assert [c.token_ids.tolist() for c in whole] == [c.token_ids.tolist() for c in parts]


def test_the_cache_bounds_how_many_go_at_once_and_must_hold_one(build: Build) -> None:
    # 2 layers x (keys, values) x 1 head x 32 numbers x 4 bytes: 512 bytes a token
    small = EngineConfig(max_num_sequences=100, kv_cache_mebibytes=1)
    assert build(config=small)._most_at_once == 32
    assert build(config=small, max_model_length=2048)._most_at_once == 1
    with pytest.raises(ResourceError, match=r"2049 tokens.*1\.0 MiB: raise rollout\.student_eng"):
        build(config=small, max_model_length=2049)


def test_a_model_that_cannot_be_loaded_is_named_with_the_reason(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "of nobody"}')
    with pytest.raises(ModelError, match=r"transformers .* cannot load the model .*of nobody"):
        build(model_path=str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ResourceError, match=r"was given a GPU, and torch .* sees none"):
        build(uses_gpu=True)


def test_an_engine_says_what_it_has_to_do(build: Build) -> None:
    """Of 8 requests 5 run at once; each step writes a token of each that runs."""
    engine = build()
    for number, prompt in enumerate(_prompts(8)):
        engine.add(f"request-{number}", prompt, WARM, number)
    before = engine.load()
    assert (before.running, before.waiting, before.written_tokens) == (0, 8, 0)
    done: dict[str, Completion] = {}
    while before.running + before.waiting > 0:
        finished = engine.decode(1e-6)  # a step, or until one has finished
        done |= finished
        now = engine.load()
        assert now.running <= 5
        assert now.running + now.waiting == 8 - len(done)
        assert now.written_tokens > before.written_tokens
        before = now
    assert before.written_tokens == sum(each.token_ids.size for each in done.values())
    assert before.cache_use is None

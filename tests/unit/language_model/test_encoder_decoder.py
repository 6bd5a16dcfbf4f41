"""Our reading of encoder-decoders against transformers' own forward pass, sequence by sequence."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_families import save_family
from transformers import AutoModelForSeq2SeqLM

from distill_system.errors import ModelError
from distill_system.language_model import (
    SequenceBatch,
    build_empty_model,
    check_weight_files,
    families,
    find_decoder_start,
    load_embedding,
    load_language_model,
    read_configuration,
    read_hidden,
    read_part,
    read_weights,
    unembedding,
)
from distill_system.learner.sharding import allocate
from distill_system.records import Author, Finish, Trajectory

CPU = torch.device("cpu")
FAMILIES = ("t5", "t5_gated", "bart")
NUM_TOKENS = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    base = tmp_path_factory.mktemp("encoder_decoders")

    @cache
    def make(family: str) -> Path:
        return save_family(base / family, family, num_rows=70, seed=5)

    return make


def _load(folder: Path):
    return load_language_model(str(folder), dtype=torch.float32, device=CPU)


def _trajectories(count: int = 9) -> list[Trajectory]:
    """Prompts of 1 to 30 tokens, responses of 1 to 12."""
    rng = np.random.default_rng(1)
    made = []
    for at in range(count):
        prompt, response = (rng.integers(3, NUM_TOKENS, rng.integers(1, most)) for most in (31, 13))
        made.append(
            Trajectory(
                trajectory_id=f"t{at}",
                prompt_id=f"p{at}",
                author=Author.DATASET,
                token_ids=np.concatenate([prompt, response]).astype(np.int32),
                num_prompt_tokens=len(prompt),
                behaviour_logprobs=np.empty(0, np.float32),
                temperature=1.0,
                finish=Finish.STOP,
            )
        )
    return made


def _own_logprobs(model, trajectory: Trajectory) -> torch.Tensor:
    """transformers': labels are shifted and scored by the model itself."""
    prompt = torch.tensor(trajectory.token_ids[: trajectory.num_prompt_tokens].tolist())
    labels = torch.tensor(trajectory.response_ids.tolist())
    with torch.no_grad():
        logits = model(input_ids=prompt[None], labels=labels[None]).logits[0, :, :NUM_TOKENS]
    return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def _our_logprobs(model, batch: SequenceBatch) -> torch.Tensor:
    with torch.no_grad():
        logits_NV = read_hidden(model, batch) @ unembedding(model, NUM_TOKENS).T
    return logits_NV.log_softmax(-1).gather(-1, batch.token_ids_N[:, None])[:, 0]


def test_every_encoder_decoder_of_the_table_has_a_tiny_model() -> None:
    known = {name for name, family in families.FAMILIES.items() if family.is_encoder_decoder}
    assert {name.split("_")[0] for name in FAMILIES} == known


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("limits", [{}, {"max_tokens": 60}, {"num_parts": 4}])
def test_log_probabilities_are_those_of_the_models_own_forward(folder, family, limits) -> None:
    model = _load(folder(family))
    start = find_decoder_start(model)
    trajectories = _trajectories()
    batch = SequenceBatch.collate(trajectories, CPU, decoder_start=start, **limits)
    truth = AutoModelForSeq2SeqLM.from_pretrained(folder(family)).eval()
    expected = torch.cat([_own_logprobs(truth, trajectory) for trajectory in trajectories])
    torch.testing.assert_close(_our_logprobs(model, batch), expected, atol=1e-5, rtol=0)
    assert batch.token_ids_N.tolist() == [t for each in trajectories for t in each.response_ids]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_in_parts_are_those_of_the_models_own_loss(folder, family) -> None:
    model, truth = _load(folder(family)), AutoModelForSeq2SeqLM.from_pretrained(folder(family))
    trajectories = _trajectories(5)
    start = find_decoder_start(model)
    batch = SequenceBatch.collate(trajectories, CPU, decoder_start=start, num_parts=2)
    for part in batch.parts:
        logits = read_part(model, part) @ unembedding(model).T
        torch.nn.functional.cross_entropy(
            logits, batch.token_ids_N[part.rows_n], reduction="sum"
        ).backward()
    for trajectory in trajectories:
        prompt = torch.tensor(trajectory.token_ids[: trajectory.num_prompt_tokens].tolist())
        labels = torch.tensor(trajectory.response_ids.tolist())
        loss = truth.eval()(input_ids=prompt[None], labels=labels[None]).loss
        (loss * labels.numel()).backward()
    expected = dict(truth.named_parameters())
    largest = max(float(parameter.grad.abs().max()) for parameter in expected.values())
    for name, parameter in model.named_parameters():
        difference = float((parameter.grad - expected[name].grad).abs().max())
        assert difference < 1e-6 * largest, name


def test_an_empty_part_hangs_on_every_parameter_of_the_decoder(folder) -> None:
    model = _load(folder("t5"))
    batch = SequenceBatch.collate([], CPU, num_parts=2, decoder_start=0)
    hidden = read_hidden(model, batch)
    assert hidden.shape == (0, 32)
    hidden.sum().backward()
    assert all(p.grad is not None for p in model.get_decoder().parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_files_are_checked_and_read_part_by_part_as_those_of_a_decoder(folder, family) -> None:
    path = folder(family)
    check_weight_files(path, read_configuration(str(path)))
    empty = build_empty_model(str(path))
    allocate(empty, CPU)
    read_weights(empty, str(path), everyone=False)
    model = _load(path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, empty.get_parameter(name)), name
    inputs = model.get_input_embeddings().weight
    assert torch.equal(load_embedding(str(path), which="input"), inputs)
    assert torch.equal(load_embedding(str(path), which="output"), unembedding(model))


def test_a_decoder_without_a_start_is_refused(folder, tmp_path) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(folder("t5"))
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    with pytest.raises(ModelError, match=r"decoder_start_token_id in its config\.json"):
        find_decoder_start(model)


def test_an_output_bias_is_refused(folder, tmp_path) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(folder("bart"))
    model.final_logits_bias[0, 7] = 2.0
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"final hidden state x unembedding.*a bias of the unembedding"
    ):
        _load(tmp_path)

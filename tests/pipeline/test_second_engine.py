"""The transformers engine writes for a T5 that teaches a T5; test_users.py has it for decoders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from pipeline.command_line import write_configuration
from safetensors.torch import load_file
from tiny_families import save_family, save_tokenizer
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer


def _metrics(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["metrics"] for row in rows if row["stage"] == "distill"]


def test_an_encoder_decoder_learns_from_another_and_is_exported(launch, tmp_path: Path) -> None:
    """Fine-tuning, both streams, slices of decoding with new weights between them, evaluation."""
    folders = {
        role: save_family(tmp_path / role, "t5_gated", seed=seed)
        for role, seed in (("teacher", 1), ("student", 2))
    }
    for folder in folders.values():
        save_tokenizer(folder, 64, ends_texts=True)
    configuration = write_configuration(tmp_path, folders["teacher"], folders["student"])
    rows = "{type: jsonl, path: prompts.jsonl}"
    fine_tuning = "{steps: 2, batch_size: 4, optimizer: {learning_rate: 1e-3}}"
    done = launch(
        *("train", configuration, "rollout.engine=transformers"),
        *(f"data.student_sft={rows}", f"student.sft={fine_tuning}"),
        "distill.staleness.max_staleness=1",
        "data.teacher_context={text: 'w9 w8 ', max_tokens: 2}",
    ).finish()
    assert done.code == 0, done.stderr[-3000:]
    run = tmp_path / "run"
    metrics = _metrics(run)
    held_out = [row["held_out/max_logprob_gap"] for row in metrics if "held_out/logprob_gap" in row]
    assert held_out
    assert max(held_out) < 1e-4
    assert all(np.isfinite(row["learner/loss"]) for row in metrics if "learner/loss" in row)
    tuned, distilled = (
        load_file(run / name / "model.safetensors") for name in ("student_sft", "student")
    )
    first = load_file(folders["student"] / "model.safetensors")
    for before, after in ((first, tuned), (tuned, distilled)):
        assert before.keys() == after.keys()
        assert not torch.equal(before["shared.weight"], after["shared.weight"])
    _assert_greedy_answers_are_the_exported_models_own(run)


def _assert_greedy_answers_are_the_exported_models_own(run: Path) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(run / "student").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "student")
    evaluation = json.loads((run / "evaluations" / "after.json").read_text())
    shown = evaluation["splits"]["test"]["shown"]
    assert shown
    for example in shown:
        ids = tokenizer(example["prompt"], return_tensors="pt").input_ids
        assert ids[0, -1] == tokenizer.eos_token_id
        with torch.no_grad():
            # Its own cache counts the encoder's layers, of which this model has fewer.
            written = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)
        text = tokenizer.decode(written[0, 1:], skip_special_tokens=True)
        assert text.split() == example["greedy"].split()

"""Distils one model into another from Python, and lets the student answer.

python configs/distill_from_python.py TEACHER STUDENT ROWS.jsonl

TEACHER, STUDENT: folders or hub names of two models of one tokenizer.  ROWS.jsonl: one
{"prompt": ..., "response": ...} a line, at least ten. The configuration is what `distill-system
init` writes; anything in it can be changed before the run, as the number of steps is here.
"""

import sys
from pathlib import Path

import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill_system import distill
from distill_system.stages.new_configuration import new_configuration


def main(teacher: str, student: str, rows: str) -> None:
    """Write a configuration, run it, and print scores, losses and an answer."""
    settings = yaml.safe_load(new_configuration(teacher, student, Path(rows), name="from_python"))
    settings["distill"]["steps"] = 20
    settings["distill"]["measure_every"] = 5
    result = distill(settings, "distill.optimizer.learning_rate=1e-4", resume=True)

    for metric, score in result.scores("test").items():
        print(f"{metric}: {score:.1f}")
    measured = [row for row in result.metrics["distill"] if "held_out/cross_entropy" in row]
    for row in measured:
        print(f"step {row['step']}: held-out cross-entropy {row['held_out/cross_entropy']:.3f}")

    tokenizer = AutoTokenizer.from_pretrained(result.student)
    model = AutoModelForCausalLM.from_pretrained(result.student)
    prompt = "Say something."
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    answer = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    print(f"{prompt} -> {tokenizer.decode(answer, skip_special_tokens=True)}")


if __name__ == "__main__":
    main(*sys.argv[1:])

from __future__ import annotations

from distill_system.run.settings_notes import settings_notes


def test_a_warmup_that_is_cut_is_told_with_both_numbers(configure):
    optimizer = "distill.optimizer={learning_rate: 0.1, warmup_steps: 20}"
    assert settings_notes(configure(optimizer, "distill.steps=10")) == [
        "distill.optimizer.warmup_steps=20 is more than half of distill.steps=10: warm-up takes 5 "
        "steps, so that the learning rate comes near its peak"
    ]
    sft = "student.sft={steps: 3, optimizer: {learning_rate: 0.1, warmup_steps: 2}}"
    rows = "data.student_sft={type: jsonl, path: rows.jsonl}"
    [line] = settings_notes(configure(sft, rows))
    assert line.startswith("student.sft.optimizer.warmup_steps=2 is more than half of student.sft")


def test_what_is_taken_as_written_is_not_told(configure):
    optimizer = "distill.optimizer={learning_rate: 0.1, warmup_steps: 20}"
    assert settings_notes(configure(optimizer, "distill.steps=40")) == []
    assert settings_notes(configure("distill.steps=10")) == [], "nobody asked for 20"

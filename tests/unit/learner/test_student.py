"""Where a learner's student comes from, and that a folder is read as it was said."""

from __future__ import annotations

import pytest
import torch
from fakes.local_workers import LocalWorkers
from trajectories import make_trajectories

from distill_system.learner import LearnerGroup, ModelSource
from distill_system.learner.student import build_student
from distill_system.records import Author

CPU = torch.device("cpu")


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("empty", [False, True])
def test_a_folders_own_code_runs_only_where_it_is_trusted(monkeypatch, empty, trust):
    asked = []
    for name in ("build_empty_model", "load_language_model"):
        monkeypatch.setattr(
            f"distill_system.learner.student.{name}",
            lambda path, name=name, **how: asked.append((name, path, how["trust_remote_code"])),
        )
    source = ModelSource(path="/models/student", trust_remote_code=trust)
    build_student(source, seed=0, device=CPU, empty=empty)
    reader = "build_empty_model" if empty else "load_language_model"
    assert asked == [(reader, "/models/student", trust)]


def test_fine_tuning_needs_no_teacher_and_no_word_of_the_vocabularys_size(
    make_learner, tiny_model_folder
):
    """80 rows of 64 columns: neither is taken for the other."""
    source = ModelSource(path=str(tiny_model_folder(seed=2, vocab_size=80)))
    group = LearnerGroup(LocalWorkers([make_learner(objective=None, source=source)]))
    rows = make_trajectories(8, Author.DATASET)
    losses = [
        group.finish_supervised(group.start_supervised(step, rows)).metrics["learner/loss"]
        for step in range(6)
    ]
    assert losses[-1] < losses[0]

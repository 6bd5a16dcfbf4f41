"""A comparison by the real command line: shared start, equal runs, a failure, and going on."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from pipeline.command_line import Run, assert_one_message, write_configuration, write_rows

Launch = Callable[..., Run]

HOPELESS = "distill: {optimizer: {learning_rate: 1e30}, objective: {type: ammd}}"
OTHER = "distill: {optimizer: {learning_rate: 1e29}, objective: {type: ammd}}"


@pytest.fixture
def configuration(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> Path:
    path = write_configuration(tmp_path, tiny_model_folder(seed=1), tiny_model_folder(seed=2))
    write_rows(tmp_path / "sft.jsonl", 20, first=300)
    (tmp_path / "hopeless.yaml").write_text(HOPELESS)
    settings = json.loads(path.read_text())
    settings["data"]["student_sft"] = {"type": "jsonl", "path": "sft.jsonl"}
    settings["evaluation"] = {"metrics": ["exact_match", "rouge_l"]}
    settings["rollout"]["engine"] = "transformers"  # it starts sooner
    path.write_text(json.dumps(settings))
    return path


def test_a_comparison_runs_equal_budgets_and_tells_what_failed(
    launch: Launch, configuration: Path
) -> None:
    folder = configuration.parent / "run"
    names = f"sft,kl_mixture,{configuration.parent / 'hopeless.yaml'}"
    arguments = ("compare", configuration, "--objectives", names, "--seeds", "1")
    run = launch(*arguments, "--at-once", "2").finish(seconds=400)
    assert run.code == 0, run.stderr
    assert run.orphans() == []

    table = (folder / "compare.md").read_text()
    assert "NonFiniteError" in table
    with (folder / "compare.csv").open() as file:
        assert {row["objective"] for row in csv.DictReader(file)} >= {"sft", "kl_mixture"}
    verdict = json.loads((folder / "compare.json").read_text())
    assert set(verdict["steps"].values()) == {3}
    assert "hopeless/seed_0" in verdict["problems"]
    _assert_it_ended_at_the_last_good_checkpoint(folder / "hopeless/seed_0")

    rows = {name: _distill_rows(folder / name / "seed_0") for name in ("sft", "kl_mixture")}
    assert all("learner/off_policy_loss" in row for row in rows["sft"])
    assert all(row["sampled_tokens/student"] == 0 for row in rows["sft"])
    assert all(row["sampled_tokens/teacher"] > 0 for row in rows["kl_mixture"])
    assert all(row["sampled_tokens/student"] > 0 for row in rows["kl_mixture"])
    before = [_evaluation(folder / name / "seed_0", "before") for name in rows]
    assert before[0] == before[1], "one start"

    (configuration.parent / "hopeless.yaml").write_text(OTHER)  # refused before it needs a cluster
    again = launch(*arguments).finish(seconds=200)
    assert again.code == 0, again.stderr
    assert "3 runs, 2 of them done" in again.stdout
    table = (folder / "compare.md").read_text()
    assert "NonFiniteError" not in table, "what failed is tried again"
    assert "RunStateError" in table


def _assert_it_ended_at_the_last_good_checkpoint(run: Path) -> None:
    """The run whose loss is no number: its own log tells it, and it exported nothing."""
    told = ("NonFiniteError: learner-0:", "at step 1", "learning rate")
    assert_one_message(run.with_suffix(".log").read_text(), *told)
    assert [path.name for path in (run / "checkpoints/distill").iterdir()] == ["step_000001"]
    assert not (run / "student").exists()


def _distill_rows(run: Path) -> list[dict[str, float]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["stage"] == "distill" and row["step"]]
    assert len(rows) == 3
    return [row["metrics"] for row in rows]


def _evaluation(run: Path, label: str) -> object:
    return json.loads((run / f"evaluations/{label}.json").read_text())["splits"]

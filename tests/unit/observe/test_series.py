"""Names of metrics become names and labels that Prometheus takes."""

import re
from collections import defaultdict

import pytest
from metric_names import documented_metrics

from distill_system.observe.series import to_series


@pytest.mark.parametrize(
    ("metric", "name", "labels"),
    [
        ("learner/loss", "distill_learner_loss", {}),
        ("busy_share/teacher_rollout", "distill_pool_busy_share", {"pool": "teacher_rollout"}),
        ("tokens_per_second/step", "distill_step_tokens_per_second", {}),
        ("tokens_per_second/learner", "distill_pool_tokens_per_second", {"pool": "learner"}),
        ("seconds/step", "distill_step_seconds", {}),
        ("seconds/publish", "distill_phase_seconds", {"phase": "publish"}),
        ("staleness/share_12", "distill_staleness_share", {"age": "12"}),
        ("staleness/share_older", "distill_staleness_share", {"age": "older"}),
        ("staleness/tokens", "distill_staleness_tokens", {}),
        (
            "start_check/student_max_logprob_gap",
            "distill_start_check_max_logprob_gap",
            {"role": "student"},
        ),
        (
            "evaluation/in-distribution v2/exact_match_greedy",
            "distill_evaluation_score",
            {"split": "in-distribution v2", "score": "exact_match", "decoding": "greedy"},
        ),
        ("held out/exact-match", "distill_held_out_exact_match", {}),
    ],
)
def test_what_varies_in_a_name_is_a_label(metric: str, name: str, labels: dict[str, str]) -> None:
    series = to_series(metric)
    assert (series.name, dict(series.labels)) == (name, labels)


def test_no_pool_stands_in_a_name_and_one_name_has_one_set_of_labels() -> None:
    """Ray refuses a second gauge of a name; and a query over a pool's name would miss the next."""
    named = [name.replace("<age>", "3") for name in documented_metrics()]
    filled = [
        re.sub(r"<\w+>", "learner", name) for name in named if not name.startswith("evaluation/")
    ]
    labels = defaultdict(set)
    for metric in [*filled, "evaluation/test/rouge_l_greedy"]:
        series = to_series(metric)
        assert re.fullmatch(r"[a-z_]+", series.name)
        labels[series.name].add(series.label_names)
        if metric.split("/")[0] not in ("learner", "held_out"):
            assert "learner" not in series.name
    assert {name: sets for name, sets in labels.items() if len(sets) > 1} == {}

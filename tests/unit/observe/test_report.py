import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from distill_system.observe.environment import write_environment
from distill_system.observe.metrics import MetricLog, read_metrics
from distill_system.observe.report import compute_phase_shares, write_report
from distill_system.observe.run_directory import RunDirectory, write_json
from distill_system.observe.summary import write_evaluation
from distill_system.observe.timings import Timings
from distill_system.records import PoolActivity

ATTACK = "<script>alert('x')</script>"
METRICS = (
    "exact_match_greedy",
    "exact_match_sampled",
    "mean_length_greedy",
    "ended_share_greedy",
)


class Split:
    def __init__(self, values: list[float], text: str) -> None:
        self._values, self._text = values, text

    def to_json(self) -> dict[str, object]:
        mean = sum(self._values) / len(self._values)
        shown = {"prompt": f"say {ATTACK}", "references": ["yes"], "greedy": self._text}
        return {
            "num_examples": len(self._values),
            "scores": {metric: {"mean": mean, "stderr": 2.0} for metric in METRICS},
            "prompt_ids": [str(index) for index in range(len(self._values))],
            "per_example": dict.fromkeys(METRICS, self._values),
            "bootstrap": {},
            "shown": [{**shown, "sampled": f"maybe {ATTACK}"}],
        }


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    write_json(run.config_path, {"name": "tiny", "note": ATTACK})
    write_environment(run, seeds={"run": 1})
    write_json(run.timings_path, {"seconds": {"distill": 63.0}, "tokens_per_second": {}})
    values = {
        "teacher": [100.0] * 100,
        "before": [100.0] * 54 + [0.0] * 46,
        "step_000010": [100.0] * 57 + [0.0] * 43,
        "after": [100.0] * 61 + [0.0] * 39,
    }
    for step, (label, scores) in enumerate(values.items()):
        write_evaluation(
            run,
            label,
            step=10 * (step - 1),
            weight_version=step,
            splits={"in_distribution": Split(scores, "yes" if label == "after" else "no")},
            distances={"on_policy": 0.02 - 0.004 * (step == 3), "off_policy": 0.01},
        )
    with MetricLog(run, run_name="tiny") as log:
        for step in range(1, 31):
            log.log("sft_teacher", step, {"learner/loss": 3.0 / step})
            log.log("sft_student", step, {"learner/loss": 4.0 / step})
            metrics = {
                "learner/loss": float("nan") if step == 7 else 1.0 / step,
                "learner/on_policy_distance": 0.02,
                "learner/off_policy_distance": 0.02,
                "learner/reward_to_go": 0.1,
                "learner/gradient_norm": 1.0,
                "learner/learning_rate": 1e-3,
                "learner/cross_entropy": 1.0,
                "learner/mean_student_response_tokens": 7.0,
                "learner/student_ended_share": 1.0,
                "learner/logprob_gap": 1e-6,
                "seconds/learner": 3.0,
                "seconds/student_rollout": 1.0,
                "seconds/step": 4.0,
                "tokens_per_second/learner": 100.0,
            }
            log.log("distill", step, metrics)
        log.log("distill", 30, {"held_out/on_policy_distance": 0.02})
    assert compute_phase_shares(read_metrics(run)) == {"learner": 0.75, "student_rollout": 0.25}
    write_report(run)
    return run.report_path.read_text()


def test_the_headline_says_by_how_much_and_how_sure(page: str) -> None:
    # 7 of 100 examples flip: deviation of the differences 25.64, over sqrt(100).
    assert "Exact match, greedy, in distribution: 54.0 → 61.0 (+7.0 ± 2.6, 100 examples)" in page
    assert "on-policy distance 0.0200 → 0.0160, falls by 20%" in page


@pytest.mark.parametrize(
    "title",
    [
        "On-policy distance",
        "Off-policy distance",
        "Scores during training",
        "Loss",
        "Reward-to-go",
        "Gradient norm",
        "Learning rate",
        "Sampler against learner",
        "Mean length of responses",
        "Responses that end by themselves",
        "Throughput by pool",
        "Share of step time by phase",
        "Supervised loss, teacher",
        "Supervised loss, student",
        "Time by stage",
        "Generations",
        "Configuration",
        "Environment",
    ],
)
def test_the_report_has_every_part(page: str, title: str) -> None:
    assert title in page


def test_a_clear_gain_is_coloured_and_a_length_is_not(page: str) -> None:
    cells = dict(
        re.findall(
            r"<td>(Exact match, greedy|Mean length, tokens, greedy)</td>.*?chip (\w+)",
            page,
            re.DOTALL,
        )
    )
    assert cells == {"Exact match, greedy": "up", "Mean length, tokens, greedy": "plain"}


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)
        loads = ("src", "href", "xlink:href", "srcset", "data", "action")
        self.references += [value or "" for name, value in attributes if name in loads]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_is_well_formed_and_loads_nothing(page: str) -> None:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert "svg" in reader.tags
    assert not reader.tags & {"script", "link", "img", "iframe", "object"}
    assert all(reference.startswith("#") for reference in reader.references)
    assert not re.search(r"https?://|@import", page)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_what_data_and_models_wrote_is_escaped(page: str) -> None:
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") >= 3


def test_charts_follow_the_colours_of_the_page(page: str) -> None:
    charts = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "var(--ink)" in charts
    assert not re.search(r"#[0-9a-f]{6}\b", charts)
    variables = set(re.findall(r"var\((--[\w-]+)\)", page))
    assert variables <= set(re.findall(r"(--[\w-]+):", page))


def test_a_run_with_nothing_in_it_still_reports_what_is_missing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    write_report(run)
    page = run.report_path.read_text()
    for name in ("config.json", "metrics.jsonl", "evaluations/before.json", "timings.json"):
        assert name in page
    assert "No evaluation before and after distillation yet" in page


def test_a_teacher_alone_is_reported(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    splits = {"in_distribution": Split([100.0, 0.0], "no")}
    write_evaluation(run, "teacher", step=0, weight_version=None, splits=splits, distances=None)
    write_report(run)
    assert "50.0" in run.report_path.read_text()


def test_a_run_without_pools_shows_nothing_of_them(page: str) -> None:
    assert "<h2>Pools</h2>" not in page
    assert "Busy share by pool" not in page


@pytest.fixture(scope="module")
def streaming_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = RunDirectory(tmp_path_factory.mktemp("streaming"))
    write_json(run.config_path, {"distill": {"staleness": {"max_staleness": 1}}})
    timings = Timings(run)
    busy = PoolActivity(num_workers=2, seconds=10.0, busy_seconds=19.0, blocked_seconds=1.0)
    idle = PoolActivity(num_workers=1, seconds=10.0, busy_seconds=4.0, starved_seconds=6.0)
    timings.add_activity({"student_rollout": busy, "learner": idle})
    timings.save()
    with MetricLog(run, run_name="streaming") as log:
        for step in range(1, 4):
            metrics = {
                "busy_share/student_rollout": 0.95,
                "busy_share/learner": 0.4,
                "learner/mean_staleness": 0.75,
                "learner/max_staleness": 1.0,
                "staleness/share_0": 0.25,
                "staleness/share_1": 0.75,
                "staleness/share_older": 0.0,
                "staleness/tokens": 100.0,
                "staleness/dropped": 2.0,
            }
            log.log("distill", step, metrics)
    write_report(run)
    return run.report_path.read_text()


def test_the_report_stacks_each_pools_time_and_says_which_bounds_the_run(
    streaming_page: str,
) -> None:
    pools = streaming_page.partition("<h2>Pools</h2>")[2]
    assert "student_rollout bounds the run (95% busy, learner waits 60% of the time" in pools
    stacks = re.findall(r'<div class="stack thin">(.*?)</div>', pools)
    widths = [re.findall(r"width: ([\d.]+)%.*?title=\"(\w+)", stack) for stack in stacks]
    assert widths == [
        [("95.0", "busy"), ("5.0", "blocked"), ("0.0", "starved")],
        [("40.0", "busy"), ("0.0", "blocked"), ("60.0", "starved")],
    ]
    for title in ("Busy share by pool", "Staleness"):
        assert f"<b>{title}</b>" in pools


def test_the_report_has_a_histogram_of_ages(streaming_page: str) -> None:
    ages = streaming_page.partition("Age of the student's text")[2].partition("</div>\n  </div>")[0]
    assert re.findall(r"<span>([\d.]+%)</span>", ages) == ["25.0%", "75.0%"]
    assert "older" not in ages  # none was
    assert "mean 0.75, at most 1" in ages
    assert "their prompts given out again: 6" in ages


def test_the_report_of_a_streaming_run_is_well_formed(streaming_page: str) -> None:
    reader = Reader()
    reader.feed(streaming_page)
    assert reader.open == []

import csv
import json
import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from comparison_runs import make_plan, write_run, write_trial

from distill_system.comparison import ComparisonFiles, write_comparison, write_plan

ATTACK = "<script>alert('x')</script>"
GAINS = {"sft": 0.0, "gkd": 5.0, "ammd_plain": 40.0, "ammd_bad": -20.0}
COSTS = {"seconds/step": 2.0, "learner/peak_memory_bytes": 3 * 2.0**20}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ComparisonFiles:
    """Three seeds of fifty examples; gkd is better than sft on one seed alone."""
    folder = tmp_path_factory.mktemp("trial")
    plan = make_plan(
        [*GAINS, "lost"],
        [0, 1, 2],
        failures={"lost/seed_0": f"first line {ATTACK}\nsecond | line"},
        config={"evaluation": {"metrics": ["exact_match"]}, "note": ATTACK},
    )
    write_plan(folder, plan)
    rng = np.random.default_rng(0)
    for objective, gain in GAINS.items():
        for seed in range(3):
            shift = 3 * gain * (seed == 0) if objective == "gkd" else gain
            row = {
                f"exact_match_{how}": rng.normal(50 + shift, 4, size=50).tolist()
                for how in ("greedy", "sampled")
            }
            values = {"easy": row, "out_of_reach": row}
            evaluations = {"evaluation/easy/exact_match_greedy": 50.0 + shift}
            write_run(folder, objective, seed, values, metrics=COSTS | evaluations)
    return write_comparison(folder)


def test_the_four_files_stand_beside_the_plan(files: ComparisonFiles) -> None:
    folder = files.json_path.parent
    names = {path.name for path in folder.iterdir() if path.is_file()}
    assert names == {"plan.json", "compare.json", "compare.md", "compare.csv", "compare.html"}


def test_the_json_form_holds_every_figure(files: ComparisonFiles) -> None:
    form = json.loads(files.json_path.read_text())
    column = form["scores"]["exact_match_greedy"]["average"]
    ours = column["objectives"]["ammd_plain"]
    assert set(ours["per_seed"]) == {"0", "1", "2"}
    assert ours["mean"] == pytest.approx(np.mean(list(ours["per_seed"].values())))
    assert ours["against_sft"]["is_significant"] is True
    assert ours["against_sft"]["basis"] == "seeds and examples"
    assert ours["against_sft"]["num_examples"] == 100
    assert ours["against_best_baseline"]["difference"] == pytest.approx(
        ours["mean"] - column["objectives"]["gkd"]["mean"]
    )
    assert column["objectives"]["gkd"]["against_sft"]["is_significant"] is False
    assert column["best_baseline"] == "gkd"
    assert column["objectives"]["sft"]["against_sft"] is None
    assert form["costs"]["sft"]["step_seconds"] == {"mean": 4.0, "stderr": 0.0, "num_seeds": 3}
    assert form["curves"]["held_out/on_policy_distance"]["sft"][1] == {
        "step": 10,
        "mean": pytest.approx(0.02),
        "stderr": pytest.approx(0.0),
        "num_seeds": 3,
    }
    assert set(form["problems"]) == {"lost/seed_0", "lost/seed_1", "lost/seed_2"}


def read_markdown_row(files: ComparisonFiles, title: str, name: str) -> list[str]:
    section = files.markdown_path.read_text().split(f"## {title}")[1].split("## ")[0]
    row = next(line for line in section.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def test_markdown_marks_gains_losses_and_the_best(files: ComparisonFiles) -> None:
    title = "Exact match, greedy"
    best, bad = (read_markdown_row(files, title, f"ammd_{kind}") for kind in ("plain", "bad"))
    assert all(re.fullmatch(r"\*\*\d+\.\d ± \d\.\d\*\* \\\*†", cell) for cell in best)
    assert all(re.fullmatch(r"\d+\.\d ± \d\.\d ↓", cell) for cell in bad)
    assert all(re.fullmatch(r"\d+\.\d ± \d\.\d", c) for c in read_markdown_row(files, title, "gkd"))
    assert read_markdown_row(files, title, "best baseline") == ["gkd"] * 3


def test_markdown_names_the_failures_on_one_line_each(files: ComparisonFiles) -> None:
    text = files.markdown_path.read_text()
    assert f"- `lost/seed_0`: first line {escape(ATTACK, quote=False)} second | line\n" in text
    assert "- `lost/seed_1`: left out: not finished" in text
    assert read_markdown_row(files, "Exact match, greedy", "lost") == ["– (n=0)"] * 3  # noqa: RUF001


def test_every_row_of_a_markdown_table_has_as_many_cells(files: ComparisonFiles) -> None:
    tables = re.findall(r"(?:^\|.*\n)+", files.markdown_path.read_text(), re.MULTILINE)
    assert len(tables) == 5  # two decodings, two distances, the costs
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_costs_are_shown_in_their_units(files: ComparisonFiles) -> None:
    row = read_markdown_row(files, "Costs", "ammd_plain")
    assert row == ["20 ± 0", "**4.0 ± 0.0**", "**70.0 ± 0.0**", "**3 ± 0**"]


def test_the_csv_has_a_row_per_objective_and_full_precision(files: ComparisonFiles) -> None:
    with files.csv_path.open() as file:
        rows = {row["objective"]: row for row in csv.DictReader(file)}
    assert list(rows) == [*GAINS, "lost"]
    cell = json.loads(files.json_path.read_text())["scores"]["exact_match_sampled"]["easy"]
    ours = cell["objectives"]["ammd_plain"]
    name = "easy/exact_match_sampled"
    assert float(rows["ammd_plain"][f"{name}/mean"]) == ours["mean"]
    assert float(rows["ammd_plain"][f"{name}/p_sft"]) == ours["against_sft"]["p_value"]
    assert rows["sft"][f"{name}/p_sft"] == rows["lost"][f"{name}/mean"] == ""
    assert rows["lost"][f"{name}/num_seeds"] == "0"
    assert float(rows["gkd"]["step_seconds/mean"]) == 4.0


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_loads_nothing_and_escapes(files: ComparisonFiles) -> None:
    page = files.html_path.read_text()
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert not {"script", "link", "img"} & set(reader.tags)
    assert not re.search(r"https?://|@import", page)
    assert page.count("&lt;script&gt;") >= 2
    variables = set(re.findall(r"var\((--[\w-]+)\)", page))
    assert variables <= set(re.findall(r"(--[\w-]+):", page))


def test_the_page_says_what_the_comparison_found(files: ComparisonFiles) -> None:
    page = files.html_path.read_text()
    assert "equal budget: 20 student updates per run" in page
    assert re.search(r'class="headline">\s*Exact match, greedy, average: ammd_plain \d+\.\d', page)
    assert page.count("<svg") == 2  # the curves of a distance and of a score
    assert page.count('<i class="mean up"') == page.count('<i class="mean down"') == 6
    assert page.count('<i class="mean unclear"') == 6
    for name in ("lost/seed_1", "Differences from sft", "Costs of one run", "gkd, the best"):
        assert name in page


def test_bars_fill_the_card_with_the_longest_and_stay_inside(files: ComparisonFiles) -> None:
    page = files.html_path.read_text()
    whiskers = re.findall(r'<i style="left: ([\d.]+)%; width: ([\d.]+)%', page)
    ends = [float(left) + float(width) for left, width in whiskers]
    assert max(ends) == pytest.approx(100, abs=0.02)


def test_nothing_finished_is_reported_too(tmp_path: Path) -> None:
    plan = make_plan(["sft", "ammd"], [0, 1], failures={"sft/seed_0": "no disk"})
    write_trial(tmp_path, plan, {})
    page = write_comparison(tmp_path).html_path.read_text()
    assert "no disk" in page
    assert "No moment-matching objective has finished yet" in page
    assert len(json.loads((tmp_path / "compare.json").read_text())["problems"]) == 4


def test_one_run_alone_is_shown_without_errors_or_marks(tmp_path: Path) -> None:
    plan = make_plan(["ammd"], [0], config={})
    write_trial(tmp_path, plan, {"ammd": {0: {"easy": {"rouge_l_greedy": [40.0, 50.0]}}}})
    files = write_comparison(tmp_path)
    assert read_markdown_row(files, "ROUGE-L, greedy", "ammd") == ["**45.0**"]
    assert "ROUGE-L, greedy, easy: ammd 45.0" in files.html_path.read_text()


def test_a_drawn_curve_keeps_to_the_steps_that_most_seeds_have(tmp_path: Path) -> None:
    plan = make_plan(["ammd"], [0, 1])
    write_plan(tmp_path, plan)
    scores = {"easy": {"exact_match_greedy": [40.0, 50.0]}}
    write_run(tmp_path, "ammd", 0, scores, step=20)
    write_run(tmp_path, "ammd", 1, scores, step=16)
    # Steps 0, 10, 20 and 0, 8, 16: only one is shared, which is no curve.
    files = write_comparison(tmp_path)
    assert len(files.verdict.curves["held_out/on_policy_distance"]["ammd"]) == 5
    assert "<svg" not in files.html_path.read_text()


SMALL = """\
# trial

3 objectives, 2 seeds; equal budget: 20 student updates per run.

Mean ± standard error over seeds; the best of each column is bold. * better than sft, ↓ worse than \
sft, † better than the best baseline (named in the last row), each with p < 0.05, paired over \
seeds and examples. No correction is made for the number of comparisons: of twenty \
differences that chance alone makes, one is marked.

## Exact match, greedy (higher is better)

| objective | average | easy | out of reach |
|---|---:|---:|---:|
| sft | 14.3 ± 0.3 | 14.3 ± 0.3 | 14.3 ± 0.3 |
| gkd | 34.5 ± 0.2 \\* | 34.5 ± 0.2 \\* | 34.5 ± 0.2 \\* |
| ammd | **55.0 ± 0.5** \\*† | **55.0 ± 0.5** \\*† | **55.0 ± 0.5** \\*† |
| student before distillation | 34.6 | 34.6 | 34.6 |
| best baseline | gkd | gkd | gkd |

## Mean length, tokens, greedy (neither is better)

| objective | average | easy | out of reach |
|---|---:|---:|---:|
| sft | 14.3 ± 0.3 | 14.3 ± 0.3 | 14.3 ± 0.3 |
| gkd | 34.5 ± 0.2 | 34.5 ± 0.2 | 34.5 ± 0.2 |
| ammd | 55.0 ± 0.5 | 55.0 ± 0.5 | 55.0 ± 0.5 |
| student before distillation | 34.6 | 34.6 | 34.6 |

## On-policy distance (lower is better)

| objective | held out |
|---|---:|
| sft | **0.0100 ± 0.0000** |
| gkd | **0.0100 ± 0.0000** |
| ammd | **0.0100 ± 0.0000** |
| student before distillation | 0.0100 |
| best baseline | sft |

## Off-policy distance (lower is better)

| objective | held out |
|---|---:|
| sft | **0.0050 ± 0.0000** |
| gkd | **0.0050 ± 0.0000** |
| ammd | **0.0050 ± 0.0000** |
| student before distillation | 0.0050 |
| best baseline | sft |

## Costs of one run (the lowest is bold)

| objective | steps | seconds of steps | seconds with evaluations | \
tokens sampled by both models | tokens learned from | peak memory of a learner, MiB |
|---|---:|---:|---:|---:|---:|---:|
| sft | 20 ± 0 | **4.0 ± 0.0** | **70.0 ± 0.0** | **12,000 ± 0** | **2,000 ± 0** | **3 ± 0** |
| gkd | 20 ± 0 | **4.0 ± 0.0** | **70.0 ± 0.0** | **12,000 ± 0** | **2,000 ± 0** | **3 ± 0** |
| ammd | 20 ± 0 | **4.0 ± 0.0** | **70.0 ± 0.0** | **12,000 ± 0** | **2,000 ± 0** | **3 ± 0** |
"""
"""compare.md of three objectives, whose values are chosen so that each mark appears."""


@pytest.fixture
def small(tmp_path: Path) -> ComparisonFiles:
    means = {"sft": (14.0, 14.6), "gkd": (34.3, 34.7), "ammd": (54.5, 55.5)}
    metrics = COSTS | {
        "sampled_tokens/student": 2500.0,
        "sampled_tokens/teacher": 3500.0,
        "learner/response_tokens": 1000.0,
        "evaluation/easy/exact_match_greedy": 30.0,
        "evaluation/out_of_reach/exact_match_greedy": 30.0,
    }
    write_plan(tmp_path, make_plan(list(means), [0, 1]))
    for objective, by_seed in means.items():
        for seed, mean in enumerate(by_seed):
            row = [mean + each for each in (-1.0, 0.0, 0.5, 0.5)]
            split = {"exact_match_greedy": row, "mean_length_greedy": row}
            values = {"easy": split, "out_of_reach": split}
            write_run(tmp_path, objective, seed, values, metrics=metrics)
    return write_comparison(tmp_path)


def test_the_whole_markdown_of_a_small_comparison(small: ComparisonFiles) -> None:
    assert small.markdown_path.read_text() == SMALL


def test_a_cells_note_says_the_difference_its_interval_and_what_it_rests_on(
    small: ComparisonFiles,
) -> None:
    notes = re.findall(r'title="(against [^"]*)"', small.html_path.read_text())
    number = r"[+−]\d+\.\d"  # noqa: RUF001  # a minus sign
    compared = (
        rf"{number} \[{number}, {number}\], p = \S+ \(chance of seeds and examples; 2 seeds\)"
    )
    both = rf"against sft: {compared}; against gkd, the best baseline: {compared}"
    assert [bool(re.fullmatch(both, note)) for note in notes[6:9]] == [True] * 3
    assert re.fullmatch(rf"against gkd, the best baseline: {compared}", notes[0])
    assert re.fullmatch(rf"against sft: {compared}", notes[3])


def test_drawn_curves_have_titles_bands_and_one_line_an_objective(small: ComparisonFiles) -> None:
    page = small.html_path.read_text()
    assert page.index("Distances to the teacher") < page.index("Scores during training")
    assert len(re.findall(">mean over seeds, band of one standard error", page)) == 3
    assert "On-policy distance" in page
    assert "Exact match, greedy · easy" in page
    assert "Exact match, greedy · out of reach" in page


def test_intervals_fill_their_card_from_the_lowest_bound_to_the_highest(
    small: ComparisonFiles,
) -> None:
    shown = r'<i class="(?:up|down|unclear)" style="left: ([\d.]+)%; width: ([\d.]+)%'
    found = re.findall(shown, small.html_path.read_text())
    bounds = [(float(left), float(left) + float(width)) for left, width in found]
    # Two objectives in each of three cards, from zero to ammd's upper bound.
    assert len(bounds) == 6
    kinds = re.findall(r'<i class="mean (\w+)"', small.html_path.read_text())
    assert kinds == ["up"] * 6, "both are better than sft"
    assert max(high for _, high in bounds) == pytest.approx(100.0, abs=0.02)
    assert all(40 < low < high < 55 for low, high in bounds[::2])


def test_a_bar_in_a_name_does_not_end_its_cell(tmp_path: Path) -> None:
    values = {"easy": {"rouge_l_greedy": [40.0, 50.0]}}
    write_trial(tmp_path, make_plan(["a|b"], [0], config={}), {"a|b": {0: values}})
    assert "| a\\|b | **45.0** |" in write_comparison(tmp_path).markdown_path.read_text()


def test_the_json_form_says_whose_it_is_and_at_what_level(small: ComparisonFiles) -> None:
    form = json.loads(small.json_path.read_text())
    assert (form["name"], form["objectives"], form["seeds"]) == (
        "trial",
        ["sft", "gkd", "ammd"],
        [0, 1],
    )
    assert (form["budget"], form["budget_value"], form["level"]) == ("updates", 20, 0.05)
    assert form["steps"] == {"sft": 20, "gkd": 20, "ammd": 20}
    assert form["scores"]["exact_match_greedy"]["easy"]["direction"] == 1
    assert form["scores"]["mean_length_greedy"]["easy"]["direction"] == 0
    assert form["scores"]["on_policy_distance"]["held_out"]["direction"] == -1

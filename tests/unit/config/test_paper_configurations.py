"""The paper's experiments as configurations: what can be known of them without models and data."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from distill_system.config import RunConfig, load_config
from distill_system.config.data import DatasetsSource, JsonlSource, RowSource, TemplateFields
from distill_system.config.objective import AmmdConfig
from distill_system.config.templates import template_fields
from distill_system.data.examples import Example, read_example

REPOSITORY = Path(__file__).parents[3]
FOLDER = REPOSITORY / "configs" / "paper"
SHARED = {"ammd.yaml", "dolly.yaml"}
"""Layers of several experiments, no run by themselves."""

INSTRUCTION_SETS = {"dolly", "self_inst", "vicuna", "s_ni", "un_ni"}
EXPERIMENTS = {
    "openllama_7b_to_3b.yaml": (INSTRUCTION_SETS, "rouge_l"),
    "gpt2_xl_to_base.yaml": (INSTRUCTION_SETS, "rouge_l"),
    "gpt2_xl_to_medium.yaml": (INSTRUCTION_SETS, "rouge_l"),
    "gpt2_xl_to_large.yaml": (INSTRUCTION_SETS, "rouge_l"),
    "samsum.yaml": ({"samsum"}, "rouge_l"),
    "iwslt17_en_de.yaml": ({"iwslt17"}, "bleu"),
    "strategyqa.yaml": ({"strategyqa"}, "accuracy"),
    "samsum_t5.yaml": ({"samsum"}, "rouge_l"),
    "iwslt17_en_de_t5.yaml": ({"iwslt17"}, "bleu"),
    "strategyqa_t5.yaml": ({"strategyqa"}, "accuracy"),
}
"""Tables 1 and 2 and Appendix C.1 of the paper, as public pages list them: test sets and metric."""

POSITIONS = {"open_llama": 2048, "gpt2": 1024, "Qwen2.5": 32768, "t5": 10**9}
"""Longest sequence that each family of models reads; T5's places are relative."""

# One row as each data set's page shows it; "hub" answers are as they lie there.
ROWS: dict[str, dict[str, Any]] = {
    "dolly": {"instruction": "Name a fruit.", "input": "", "output": "Pear"},
    "samsum": {"id": "1", "dialogue": "A: Hi {you}\r\nB: Bye", "summary": "They talk."},
    "iwslt17": {"translation": {"en": "Thank you.", "de": "Danke."}},
    "strategyqa": {"question": "Do fish swim?", "answer": True, "facts": "Fish live in water."},
}


def _command(path: Path) -> list[str]:
    """The arguments of the one command in a file's header."""
    [line] = re.findall(
        r"^# Run: distill-system train (.*)$", path.read_text("utf-8"), re.MULTILINE
    )
    return shlex.split(line)


def _load(name: str) -> RunConfig:
    arguments = _command(FOLDER / name)
    layers = [REPOSITORY / a for a in arguments if a.endswith(".yaml")]
    return load_config(layers, [a for a in arguments if not a.endswith(".yaml")])


def _sources(config: RunConfig) -> dict[str, RowSource]:
    data = config.data
    named = {
        key: getattr(data, key) for key in ("teacher_sft", "student_sft", "prompts", "held_out")
    }
    named |= {f"evaluation.{split}": source for split, source in data.evaluation.items()}
    for key, source in named.items():
        assert isinstance(source, RowSource), f"{key} is not given, or made by a generator"
    return named


def _read(source: RowSource, row: dict[str, Any]) -> Example:
    return read_example(row, source.fields, where="row", key="fields", with_answers=True)


def test_the_folder_holds_the_paper_s_experiments_and_their_shared_layers() -> None:
    assert {path.name for path in FOLDER.iterdir()} == SHARED | EXPERIMENTS.keys()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_command_of_the_header_is_a_whole_run_of_that_file(name: str) -> None:
    arguments = _command(FOLDER / name)
    layers = [a for a in arguments if a.endswith(".yaml")]
    assert layers[0] == "configs/paper/ammd.yaml"
    assert layers[-1] == f"configs/paper/{name}"
    config = _load(name)
    assert config.name.startswith("paper-")
    assert config.teacher.path is not None
    assert config.student.path is not None
    assert config.teacher.sft is not None
    assert config.student.sft is not None


def test_each_experiment_has_a_folder_of_its_own() -> None:
    names = [_load(name).name for name in EXPERIMENTS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_test_sets_and_metric_are_those_listed_for_the_paper(name: str) -> None:
    splits, metric = EXPERIMENTS[name]
    config = _load(name)
    assert config.data.evaluation.keys() == splits
    assert metric in config.evaluation.metrics
    assert {m.removesuffix("_stemmed") for m in config.evaluation.metrics} == {metric}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_objective_is_the_inferred_form_of_ammd(name: str) -> None:
    objective = _load(name).distill.objective
    assert isinstance(objective, AmmdConfig)
    assert 0 < objective.on_policy_weight < 1
    assert objective.critic.type == "gradient_ascent"
    assert (objective.moment_target, objective.policy_gradient) == ("sampled", "reward_to_go")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_header_says_what_differs_and_where_it_stands_in_the_paper(name: str) -> None:
    header = (FOLDER / name).read_text("utf-8").split("\nname:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert re.search(r"# Stands for: .*(Table|Appendix) ", header)
    for part in ("2406.02959", "# What differs", "# Data: "):
        assert part in header


def test_every_value_of_the_method_carries_its_source() -> None:
    """The paper's body has not been read, so nothing may pass for its own setting."""
    text = (FOLDER / "ammd.yaml").read_text("utf-8")
    legend = set(re.findall(r"^#   (\[\w+\])", text, re.MULTILINE))
    assert legend == {"[listed]", "[inferred]", "[protocol]", "[ours]"}
    objective = text.partition("  objective:\n")[2].partition("  measure_every")[0]
    values = [line for line in objective.splitlines() if re.match(r" +\w+: \S", line)]
    without = [line for line in values if not set(re.findall(r"\[\w+\]", line)) & legend]
    assert len(values) > 15
    assert without == ["    type: ammd"]


def test_the_header_says_what_of_the_paper_is_inferred() -> None:
    header = (FOLDER / "ammd.yaml").read_text("utf-8").split("\nseed:")[0]
    said = " ".join(line.removeprefix("#").strip() for line in header.splitlines())
    assert "Its body has not been read" in said
    known, _, inferred = said.partition("Its body has not been read")
    for unknown in ("critics", "K", "beta", "gamma", "learning rates", "OpenWebText"):
        assert unknown in inferred.partition("are all inferred")[0]
        assert unknown not in known


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_prompts_and_responses_fit_into_both_models(name: str) -> None:
    config = _load(name)
    longest = config.data.max_prompt_tokens + config.rollout.sampling.max_response_tokens
    for model in (config.teacher, config.student):
        [positions] = [n for family, n in POSITIONS.items() if family in str(model.path)]
        assert longest <= positions


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_no_row_that_is_learned_from_can_end_the_run_by_its_length(name: str) -> None:
    config = _load(name)
    sources = _sources(config)
    for key in ("teacher_sft", "student_sft", "prompts"):
        bound = sources[key].max_prompt_tokens
        assert bound is not None or name.startswith(
            "strategyqa"
        )  # whose questions are one sentence
        assert bound is None or bound <= config.data.max_prompt_tokens
    for key in ("teacher_sft", "student_sft"):
        bound = sources[key].max_response_tokens
        # One token less than a rollout: the end of sequence.
        assert bound == config.rollout.sampling.max_response_tokens - 1


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_rows_for_training_and_for_measuring_are_not_the_same_rows(name: str) -> None:
    sources = _sources(_load(name))
    windows = {key: _window(source) for key, source in sources.items()}
    measured = [key for key in windows if key == "held_out" or key.startswith("evaluation.")]
    for learned in ("teacher_sft", "student_sft", "prompts"):
        for key in measured:
            (rows, start, stop), (others, first, last) = windows[learned], windows[key]
            assert rows != others or stop <= first or last <= start, (learned, key)


def _window(source: RowSource) -> tuple[tuple[str, str], float, float]:
    """Which rows a source reads: the set of rows, the first, and the one after the last."""
    end = float("inf") if source.num_examples is None else source.skip + source.num_examples
    if isinstance(source, JsonlSource):
        return (source.path, ""), source.skip, end
    assert isinstance(source, DatasetsSource)
    return (source.name, source.split), source.skip, end


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_row_of_the_data_set_becomes_the_same_prompt_in_every_set(name: str) -> None:
    config = _load(name)
    row = ROWS[next(iter(config.data.evaluation))]
    examples = [_read(source, row) for source in _sources(config).values()]
    assert len({example.prompt for example in examples}) == 1
    assert all(example.answer and example.references for example in examples)
    for source in _sources(config).values():
        if isinstance(source.fields, TemplateFields):
            named = template_fields(source.fields.prompt)
            assert {field.split(".")[0] for field in named} <= row.keys()


def test_an_instruction_is_rendered_in_alpaca_s_form_with_input_and_without() -> None:
    source = _sources(_load("gpt2_xl_to_base.yaml"))["teacher_sft"]
    without = _read(source, ROWS["dolly"])
    assert without.prompt == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a fruit.\n\n### Response:\n"
    )
    with_input = _read(source, {**ROWS["dolly"], "input": "It is {green}."})
    assert with_input.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a fruit.\n\n### Input:\nIt is {green}.\n\n### Response:\n"
    )


def test_several_references_of_a_row_are_all_accepted() -> None:
    source = _sources(_load("openllama_7b_to_3b.yaml"))["evaluation.s_ni"]
    example = _read(source, {**ROWS["dolly"], "output": ["Pear", "Plum"]})
    assert example.references == ("Pear", "Plum")


@pytest.mark.parametrize(
    ("name", "prompt", "answer", "reference"),
    [
        (
            "samsum.yaml",
            "Summarize the conversation.\n\nA: Hi {you}\r\nB: Bye\n\nSummary:\n",
            "They talk.",
            "They talk.",
        ),
        (
            "iwslt17_en_de.yaml",
            "Translate English to German.\n\nEnglish: Thank you.\nGerman:\n",
            "Danke.",
            "Danke.",
        ),
        (
            "strategyqa.yaml",
            "Question: Do fish swim?\nAnswer:\n",
            "Fish live in water. So the answer is yes.",
            "yes",
        ),
    ],
)
def test_a_row_of_each_task_reads_as_its_template_says(
    name: str, prompt: str, answer: str, reference: str
) -> None:
    config = _load(name)
    [split] = config.data.evaluation
    example = _read(_sources(config)[f"evaluation.{split}"], ROWS[split])
    assert (example.prompt, example.answer, example.references) == (prompt, answer, (reference,))


def test_the_table_of_the_readme_lists_every_experiment_with_its_metric() -> None:
    page = (REPOSITORY / "configs" / "README.md").read_text("utf-8")
    titles = {"rouge_l": "ROUGE-L", "bleu": "BLEU", "accuracy": "accuracy"}
    rows = dict(re.findall(r"^\| `paper/([^`]+)` \|.*\| ([^|]+) \|$", page, re.MULTILINE))
    assert rows == {name: titles[metric] for name, (_, metric) in EXPERIMENTS.items()}

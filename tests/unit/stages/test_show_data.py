"""`distill-system data` on small files: what is shown, what is counted, what is refused."""

from __future__ import annotations

import json
import re

import pytest
from rich.console import Console
from typer.testing import CliRunner

from distill_system.cli import app
from distill_system.data import build_tokenizer
from distill_system.data.inspection import token_texts
from distill_system.errors import DataError
from distill_system.stages.data_page import render_data
from distill_system.stages.show_data import show_data


def write(folder, name, *rows):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / name).write_text("".join(f"{line}\n" for line in lines))


def files(name):
    return f"{{type: files, path: {name}}}"


def shown(config, *, plain=True, **options):
    if plain:
        console = Console(width=200, color_system=None)
    else:
        console = Console(width=200, color_system="truecolor", force_terminal=True)
    with console.capture() as capture:
        console.print(render_data(show_data(config, **options), config, plain=plain))
    return capture.get()


def test_every_set_is_shown_token_by_token(configure, tmp_path):
    write(tmp_path, "sft.jsonl", {"question": "w10 w11", "answer": "w12 w13"})
    write(tmp_path, "texts.jsonl", {"text": "w10 " * 30})
    texts = f"data.plain_text={files('texts.jsonl')}"
    config = configure(f"data.student_sft={files('sft.jsonl')}", texts)
    page = shown(config, num_rows=2)
    headings = re.findall(r"^data\.(\S+)$", page, flags=re.MULTILINE)
    assert headings == ["evaluation.test", "held_out", "student_sft", "plain_text", "prompts"]
    assert "sft.jsonl: question -> answer; 1 of 1 rows" in page
    tokenizer = build_tokenizer(config, None)
    ids = tokenizer("w12 w13", add_special_tokens=False)["input_ids"]
    learned, text = re.findall(r"learned: +(.*)", page)
    assert text.count("w10") == 29, "its first token is what the others are learned after"
    assert learned.split("|")[-1].strip() == tokenizer.eos_token
    assert len(learned.split("|")) == len(ids) + 1
    assert "reference: w42" in page
    assert "1. rows.jsonl:1:" in page
    assert "2. rows.jsonl:2:" in page
    assert "3. rows.jsonl:3:" not in page


def test_the_texts_of_the_tokens_are_the_decoded_text(configure):
    tokenizer = build_tokenizer(configure(), None)
    ids = tokenizer("w4 w5 w6", add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids)


def test_colours_say_what_is_learned_in_a_terminal_alone(configure, tmp_path):
    write(tmp_path, "sft.jsonl", {"prompt": "w10", "response": "w12"})
    config = configure(f"data.student_sft={files('sft.jsonl')}")
    coloured = shown(config, plain=False, names=["student_sft"])
    plain = shown(config, names=["student_sft"])
    assert re.search(r"\x1b\[1;32m[^\x1b]*w12", coloured), "bold green"
    assert not re.search(r"\x1b\[1;32m[^\x1b]*w10", coloured)
    assert "\x1b" not in plain


def test_a_row_cannot_write_to_the_terminal(configure, tmp_path):
    write(tmp_path, "test.jsonl", {"prompt": "w4", "response": "a\x1b[2Jb\nc"})
    page = shown(configure(f"data.evaluation.test={files('test.jsonl')}"))
    assert "reference: a\\x1b[2Jb⏎c" in page


def test_lengths_are_counted_against_the_limits(configure, tmp_path):
    rows = [{"prompt": "w10 " * (1 + n % 5), "response": "w12 " * n} for n in range(1, 13)]
    write(tmp_path, "sft.jsonl", *rows)
    config = configure(f"data.student_sft={files('sft.jsonl')}")
    (found,) = show_data(config, names=["student_sft"])
    tokenizer = build_tokenizer(config, None)
    expected = [
        len(tokenizer(row["response"], add_special_tokens=False)["input_ids"]) + 1 for row in rows
    ]
    assert found.response_lengths == expected
    page = shown(config, names=["student_sft"])
    longer = sum(n > 8 for n in expected)
    assert 0 < longer < 12
    assert f"rollout.sampling.max_response_tokens=8: {longer} longer" in page
    assert "data.max_prompt_tokens=8: none longer" in page
    bars = re.findall(r"^ +(\d+) to (\d+) +█* (\d+)$", page.split("response tokens")[1], re.M)
    for low, high, count in bars:
        assert int(count) == sum(int(low) <= length <= int(high) for length in expected)
    assert sum(int(count) for *_, count in bars) == 12


def test_refused_rows_are_listed_with_place_and_reason_and_the_others_shown(configure, tmp_path):
    good = {"prompt": "w4", "response": "w5"}
    write(
        tmp_path,
        "sft.jsonl",
        good,
        "{",
        {"prompt": "w4 " * 99, "response": "w5"},
        {"prompt": 7, "response": "w5"},
        {"prompt": "w9", "response": None},
    )
    config = configure(f"data.student_sft={files('sft.jsonl')}")
    (found,) = show_data(config, names=["student_sft"])
    assert (found.report.num_refused, len(found.rows)) == (4, 1)
    assert "sft.jsonl:2: not valid JSON" in str(found.problem)
    page = shown(config, names=["student_sft"])
    assert re.search(r"ends the run: .*sft\.jsonl:2: not valid JSON", page)
    for reason in (
        r"sft\.jsonl:3\) has \d+ tokens, more than data\.max_prompt_tokens=8",
        r"sft\.jsonl:4: field 'prompt' must be a text, got int 7",
        r"sft\.jsonl:5\): a supervised row needs an answer",
    ):
        assert re.search(rf"refused: .*{reason}", page)


def test_a_split_that_cannot_be_scored_is_told(configure, tmp_path):
    rows = [{"prompt": "w4", "response": "yes"}, {"prompt": "w5", "response": None}]
    write(tmp_path, "test.jsonl", *rows)
    config = configure(f"data.evaluation.test={files('test.jsonl')}")
    (found,) = show_data(config, names=["evaluation"])
    assert re.search(r"1 of 2 have none, the first .*\(test\.jsonl:2\)", found.problem)


def test_a_missing_file_is_one_set_s_problem_and_the_others_are_shown(configure):
    found = show_data(configure(f"data.held_out={files('nowhere.jsonl')}"))
    problems = {each.name: each.problem for each in found}
    assert "nowhere.jsonl" in problems.pop("held_out")
    assert set(problems.values()) == {None}


def test_prompts_of_the_evaluation_are_counted_out(configure, tmp_path):
    write(tmp_path, "prompts.jsonl", {"prompt": "w40 w41"}, {"prompt": "w7"})
    (found,) = show_data(configure(f"data.prompts={files('prompts.jsonl')}"), names=["prompts"])
    assert (found.num_removed, len(found.rows)) == (1, 1)


def test_an_unknown_set_is_refused_with_those_there_are(configure):
    with pytest.raises(DataError, match=r"\['evaluation\.tset'\]; the sets are evaluation\.test, "):
        show_data(configure(), names=["evaluation.tset"])


def test_the_command_prints_without_colours_elsewhere_and_says_by_its_code(configure, tmp_path):
    config = configure()
    path = tmp_path / "resolved.yaml"
    path.write_text(config.model_dump_json())
    run = CliRunner().invoke(app, ["data", str(path), "--rows", "1", "--set", "held_out"])
    assert run.exit_code == 0, run.output
    assert "data.held_out" in run.output
    assert "\x1b" not in run.output
    assert not (tmp_path / "runs").exists()
    bad = CliRunner().invoke(app, ["data", str(path), f"data.held_out={files('nowhere')}"])
    assert bad.exit_code == 1
    assert "ends the run: data.held_out.path='nowhere'" in bad.output

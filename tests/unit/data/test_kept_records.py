"""Sets that go to a file are the sets that stay in memory, record by record."""

import json
from dataclasses import fields

import numpy as np
import pytest

from distill_system.data import PromptFrontier, build_tokenizer, load_run_data, source_shares
from distill_system.data.kept_records import (
    PROMPTS,
    TRAJECTORIES,
    MappedRecords,
    RecordKeeper,
    longest_row,
)
from distill_system.errors import DataError
from distill_system.records import Author, Finish, Prompt, Trajectory

NUM_ROWS = 9000


def same(one, other):
    return all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name))
        for field in fields(one)
    )


def prompt(number):
    return Prompt(
        prompt_id=f"p:{number}",
        token_ids=np.arange(1 + number % 7, dtype=np.int32) + number,
        text=f"«{number}»",
        references=("a", "b")[: number % 3],
        source="few" if number < 10 else "many",
        teacher_ids=np.arange(1 + number % 5, dtype=np.int32) if number % 2 else None,
    )


def row(number):
    return Trajectory(
        trajectory_id=f"t:{number}",
        prompt_id=f"t:{number}",
        author=Author.DATASET,
        token_ids=np.arange(3 + (number * 31) % 97, dtype=np.int32),
        num_prompt_tokens=2,
        behaviour_logprobs=np.empty(0, dtype=np.float32),
        temperature=1.0,
        finish=Finish.STOP,
        teacher_prompt_ids=np.arange(1 + number % 5, dtype=np.int32) if number % 2 else None,
    )


@pytest.mark.parametrize(("form", "make"), [(PROMPTS, prompt), (TRAJECTORIES, row)])
def test_records_of_a_file_are_those_that_were_added(tmp_path, form, make):
    keeper = RecordKeeper(form, most_bytes=100_000, folder=tmp_path / "new")
    for start in range(0, NUM_ROWS, 1300):
        keeper.add(make(number) for number in range(start, min(start + 1300, NUM_ROWS)))
    kept = keeper.finish()
    assert isinstance(kept, MappedRecords)
    assert len(kept) == NUM_ROWS
    for at in (0, 1, 4095, 4096, 8191, 8192, NUM_ROWS - 1):
        assert same(kept[at], make(at))
    assert same(kept[-1], make(NUM_ROWS - 1))
    assert [same(a, make(b)) for a, b in zip(kept[4094:4099], range(4094, 4099), strict=True)] == [
        True
    ] * 5
    with pytest.raises(IndexError):
        kept[NUM_ROWS]
    assert list((tmp_path / "new").iterdir()) == []  # nothing is left behind


def test_a_small_set_stays_in_memory(tmp_path):
    keeper = RecordKeeper(PROMPTS, most_bytes=1 << 20, folder=tmp_path / "new")
    records = [prompt(number) for number in range(10)]
    keeper.add(records)
    assert keeper.finish() == tuple(records)
    assert not (tmp_path / "new").exists()


def test_counts_and_the_longest_row_are_read_without_making_records(tmp_path):
    keeper = RecordKeeper(PROMPTS, most_bytes=0, folder=tmp_path)
    prompts = [prompt(number) for number in range(5000)]
    keeper.add(prompts)
    kept = keeper.finish()
    assert source_shares(kept, {"many": 2.0}) == source_shares(prompts, {"many": 2.0})
    rows = [row(number) for number in range(5000)]
    other = RecordKeeper(TRAJECTORIES, most_bytes=0, folder=tmp_path)
    other.add(rows)
    longest = longest_row(rows)
    assert longest is not None
    assert longest_row(other.finish()).trajectory_id == longest.trajectory_id
    assert longest_row(()) is None


def test_a_folder_that_cannot_be_written_is_named_with_the_keys(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DataError, match=r"file: .*max_memory_mebibytes.*give data\.cache_directory"
    ):
        RecordKeeper(PROMPTS, most_bytes=0, folder=tmp_path / "file").add([prompt(1)])


def test_a_run_reads_the_same_from_a_file_as_from_memory(build_config, tmp_path):
    """Prompts in their order, rows to learn from, what is left out, and the walk over them."""
    lines = [
        {
            "prompt": f"list the letters of {'abc'[n % 3]}",
            "response": " ".join(["a b c"] * (1 + n % 4)),
        }
        for n in range(6000)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = {"type": "jsonl", "path": str(tmp_path / "rows.jsonl"), "max_response_tokens": 9}
    prompts = {name: value for name, value in rows.items() if name != "max_response_tokens"}

    def load(mebibytes):
        config = build_config(
            data={
                "student_sft": rows,
                "prompts": {
                    "type": "mixture",
                    "sources": {"a": {"source": prompts}, "b": {"source": prompts, "weight": 3.0}},
                },
                "max_memory_mebibytes": mebibytes,
                "cache_directory": str(tmp_path / "cache"),
            }
        )
        return load_run_data(config, build_tokenizer(config, None)), config.data.prompt_weights

    (mapped, weights), (kept, _) = load(1), load(1000)
    assert isinstance(mapped.prompts, MappedRecords)
    assert isinstance(kept.prompts, tuple)
    assert len(mapped.prompts) == len(kept.prompts) == 12_000
    assert all(map(same, mapped.prompts, kept.prompts))
    assert len(mapped.student_sft) == len(kept.student_sft) < 6000
    assert all(map(same, mapped.student_sft, kept.student_sft))
    assert mapped.num_out_of_bounds == kept.num_out_of_bounds
    assert mapped.num_removed == kept.num_removed
    assert "kept in a file of" in mapped.reports["student_sft"].describe()
    walks = [
        PromptFrontier(source_shares(data.prompts, weights), 7, "test") for data in (mapped, kept)
    ]
    first, second = (walk.take(500) for walk in walks)
    assert first == second
    resumed = PromptFrontier(source_shares(mapped.prompts, weights), 7, "test")
    resumed.restore(walks[1].state())
    assert resumed.take(100) == walks[0].take(100)

"""Every format is written by its own library and read back by ours; bad files are named."""

import csv
import gzip
import json

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest
from pydantic import TypeAdapter

from distill_system.config.data import DataConfig, Source
from distill_system.data import datasets_rows, load_examples
from distill_system.errors import DataError

ROWS = [{"prompt": f"ask, {i}\t«ü»", "response": f'say "{i}"\nand more'} for i in range(7)]
EXPECTED = [(row["prompt"], row["response"]) for row in ROWS]


@pytest.fixture(autouse=True)
def cache_of_datasets_in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def load(tmp_path):
    def load_source(**values):
        source = TypeAdapter(Source).validate_python({"type": "files"} | values)
        data = DataConfig(
            directory=str(tmp_path), prompts=source, held_out=source, evaluation={"test": source}
        )
        return load_examples(source, data, key="data.prompts")

    return load_source


def asked(examples):
    return [(example.prompt, example.answer) for example in examples]


def write_csv(path, delimiter):
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["prompt", "response"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write_stream(path):
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
        out.write_table(table, max_chunksize=3)


def lines():
    return "".join(json.dumps(row) + "\n" for row in ROWS)


WRITERS = {
    "rows.jsonl": lambda path: path.write_text(lines()),
    "rows.ndjson": lambda path: path.write_text(lines()),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines().encode())),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "rows.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "data.json": lambda path: path.write_text(json.dumps({"version": "1", "data": ROWS})),
    "lines.json": lambda path: path.write_text(lines()),
    "rows.csv": lambda path: write_csv(path, ","),
    "rows.tsv": lambda path: write_csv(path, "\t"),
    "rows.parquet": lambda path: pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(ROWS), path, row_group_size=3
    ),
    "file.arrow": lambda path: pyarrow.feather.write_feather(
        pyarrow.Table.from_pylist(ROWS), path, chunksize=3
    ),
    "rows.feather": lambda path: pyarrow.feather.write_feather(
        pyarrow.Table.from_pylist(ROWS), path, compression="uncompressed"
    ),
    "stream.arrow": write_stream,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_rows_that_were_written(load, tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert asked(load(path=name)) == EXPECTED
    assert asked(load(path=name, skip=2, num_examples=3)) == EXPECTED[2:5]


def test_a_format_that_is_named_goes_before_the_ending(load, tmp_path):
    (tmp_path / "rows.txt").write_text(lines())
    assert asked(load(path="rows.txt", format="jsonl")) == EXPECTED
    with pytest.raises(
        DataError, match=r"rows\.txt: its ending says none .*give data\.prompts\.format"
    ):
        load(path="rows.txt")


def test_rows_are_named_by_file_and_place(load, tmp_path):
    for name in ("rows.csv", "rows.json", "data.json", "rows.parquet"):
        WRITERS[name](tmp_path / name)
    assert load(path="rows.csv")[1].row == "rows.csv:4"  # a row takes two lines
    assert load(path="rows.json")[3].row == "rows.json[3]"
    assert load(path="data.json")[3].row == "data.json.data[3]"
    assert load(path="rows.parquet")[6].row == "rows.parquet[6]"


def test_a_folder_is_read_file_by_file_in_the_order_of_names(load, tmp_path):
    folder = tmp_path / "set" / "deep"
    folder.mkdir(parents=True)
    (folder / "b.jsonl").write_text(lines())
    (folder.parent / "c.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "c", "response": "d"}'))
    (folder / "a.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (folder.parent / "README.md").write_text("not data")
    (folder.parent / ".hidden.jsonl").write_text("not data")
    (folder.parent / "dataset_infos.json").write_text("{}")
    assert asked(load(path="set")) == [("c", "d"), ("a", "b"), *EXPECTED]
    assert asked(load(path="set/**/*.jsonl")) == [("a", "b"), *EXPECTED]
    assert asked(load(path="set/deep/[a]*")) == [("a", "b")]
    listed = load(path=("set/deep/b.jsonl", "set/deep/a.jsonl"))
    assert asked(listed) == [*EXPECTED, ("a", "b")]
    assert load(path="set")[1].row == "deep/a.jsonl:1"


def test_splits_of_a_folder_are_not_mixed_by_accident(load, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train-0.jsonl").write_text(lines())
    (folder / "train-1.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (folder / "test.jsonl").write_text('{"prompt": "t", "response": "u"}\n')
    with pytest.raises(
        DataError, match=r"several splits \(test\.jsonl, .*give data\.prompts\.split"
    ):
        load(path="set")
    with pytest.raises(DataError, match="several splits"):
        load(path="set/*.jsonl")
    assert asked(load(path="set", split="train")) == [*EXPECTED, ("a", "b")]
    assert asked(load(path="set", split="eval")) == [("t", "u")]
    assert len(load(path=("set/test.jsonl", "set/train-1.jsonl"))) == 2
    with pytest.raises(DataError, match=r"split='validation'.* say the splits \['test', 'train'\]"):
        load(path="set", split="validation")
    with pytest.raises(DataError, match=r"split='train'.*\(test\.jsonl\) say"):
        load(path="set/test.jsonl", split="train")


def test_a_json_file_of_splits_needs_to_know_which(load, tmp_path):
    tree = {"train": ROWS, "test": [{"prompt": "t", "response": "u"}]}
    (tmp_path / "rows.json").write_text(json.dumps(tree))
    assert asked(load(path="rows.json", split="test")) == [("t", "u")]
    with pytest.raises(DataError, match=r"holds rows under \['test', 'train'\], and split=None"):
        load(path="rows.json")
    with pytest.raises(DataError, match=r"split='dev'"):
        load(path="rows.json", split="dev")


def test_what_datasets_saved_is_read_with_its_split(load, tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.select([5, 1]).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select([2])}).save_to_disk(tmp_path / "two")
    assert asked(load(path="one")) == [EXPECTED[5], EXPECTED[1]]
    assert asked(load(path="two", split="test")) == [EXPECTED[2]]
    assert asked(load(type="datasets", name="one")) == [EXPECTED[5], EXPECTED[1]]
    assert asked(load(type="datasets", name="two")) == EXPECTED
    with pytest.raises(DataError, match=r"holds the splits \['test', 'train'\]: .* got None"):
        load(path="two")
    with pytest.raises(DataError, match=r"holds the splits .* got 'dev'"):
        load(type="datasets", name="two", split="dev")


def test_a_folder_of_two_formats_is_refused_with_both(load, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.jsonl").write_text(lines())
    write_csv(tmp_path / "set/b.csv", ",")
    message = r"2 formats: 1 jsonl \(a\.jsonl\), 1 csv \(b\.csv\)"
    with pytest.raises(DataError, match=message):
        load(path="set")
    assert asked(load(path="set/*.jsonl")) == EXPECTED


@pytest.mark.parametrize(
    ("path", "actual"), [("set", "a folder without files"), ("*.jsonl", "none")]
)
def test_nothing_to_read_is_refused_with_the_place(load, tmp_path, path, actual):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/picture.png").write_bytes(b"")
    with pytest.raises(DataError, match=actual) as info:
        load(path=path)
    assert f"{tmp_path}/{path}" in str(info.value)


def damage(path, at):
    content = bytearray(path.read_bytes())
    content[at : at + 40] = b"\xff" * 40
    path.write_bytes(content)


def test_a_parquet_file_damaged_in_the_middle_is_named_with_the_row(load, tmp_path):
    path = tmp_path / "rows.parquet"
    many = [{"prompt": f"{i} " * 50, "response": str(i)} for i in range(20_000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(many), path, row_group_size=5000)
    damage(path, int(path.stat().st_size * 0.6))
    with pytest.raises(
        DataError, match=r"rows\.parquet: not a parquet file, or damaged: rows from \d+"
    ):
        load(path="rows.parquet")
    assert len(load(path="rows.parquet", num_examples=3000)) == 3000


def test_a_damaged_gzip_file_is_named_with_the_line(load, tmp_path):
    packed = gzip.compress(b'{"prompt": "a", "response": "b"}\n' * 5, compresslevel=0)
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[:-20])
    with pytest.raises(
        DataError, match=r"cut\.jsonl\.gz: the lines after \d .*gzip file is damaged"
    ):
        load(path="cut.jsonl.gz")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", r"the data set is empty \(a\.json\)"),
        ("a.json", b"7", "expected a JSON list of objects, or a mapping of splits .*, got int"),
        ("a.json", b"[1]", r"a\.json\[0\]: expected an object, got int"),
        ("a.json", b"[" * 100_000, r"a\.json: not valid JSON"),
        ("a.json", b'[{"prompt": "a"', r"a\.json: not valid JSON"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not valid JSON"),
        ("a.jsonl", b"[\n{}]", r"a\.jsonl:1: not valid JSON.*read by type: files, format: json"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", r"Git LFS pointer: fetch"),
        (
            "a.jsonl",
            b'{"prompt": "a", "response": "b\\ud83d"}',
            r"a\.jsonl:1: field 'response': character 1 is half of a surrogate pair \('\\ud83d'\)",
        ),
        ("a.csv", b"", "the data set is empty"),
        ("a.csv", b"prompt,response\n", "the data set is empty"),
        (
            "a.csv",
            b"prompt,response\na,b\nc\n",
            r"a\.csv:3: expected 2 cells as in the header, got 1",
        ),
        ("a.csv", b'prompt,response\n"a', r"a\.csv:2: not valid csv"),
        ("a.csv", b"prompt,prompt\na,b\n", r"a\.csv:1: .* name every column, each once"),
        ("a.csv", b"prompt,response\n\xff,b\n", r"a\.csv:2: expected UTF-8"),
        ("a.arrow", b"ARROW1 is not enough", r"a\.arrow: not an Arrow file, or damaged"),
        ("a.parquet", b"", r"a\.parquet: not a parquet file, or damaged: rows from 0 on"),
    ],
)
def test_a_bad_file_is_one_message_with_file_and_place(load, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(path=name)


def test_an_unreadable_file_is_named(load, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text(lines())

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)  # chmod does not stop root
    with pytest.raises(DataError, match=r"rows\.jsonl: cannot be read: .*Permission denied"):
        load(path="rows.jsonl")


def test_refused_rows_are_left_out_where_the_source_says_so(load, tmp_path):
    good = '{"prompt": "a", "response": "b"}\n'
    (tmp_path / "a.jsonl").write_text(good + "{\n" + '{"prompt": 7, "response": "b"}\n' + good * 2)
    assert len(load(path="a.jsonl", leave_out_refused=True)) == 3
    with pytest.raises(DataError, match=r"a\.jsonl:2: not valid JSON"):
        load(path="a.jsonl")
    with pytest.raises(DataError, match=r"has 5, and 2 were refused, the first: .*a\.jsonl:2"):
        load(path="a.jsonl", leave_out_refused=True, num_examples=4)


def test_a_loading_script_is_refused_with_the_way_out(load, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/mine.py").write_text("raise SystemExit")
    with pytest.raises(DataError, match=r"mine\.py is a loading script.*type: files"):
        load(type="datasets", name="mine")


def test_a_hub_name_without_a_network_is_told_at_once(load, monkeypatch):
    monkeypatch.setattr(datasets_rows, "is_hub_reachable", lambda: False)
    with pytest.raises(
        DataError, match=r"the hub does not answer, and the cache .* does not hold it"
    ):
        load(type="datasets", name="somebody/something")
    assert not datasets.config.HF_HUB_OFFLINE  # as it was before

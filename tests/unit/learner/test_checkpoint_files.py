"""A checkpoint's files are held to what was written: every byte, and no byte more."""

from __future__ import annotations

import os
import zlib

import pytest

from distill_system.learner import FileRecord, describe_file, find_alterations, find_misfits

MEBIBYTE = 1 << 20
CONTENT = os.urandom(5 * MEBIBYTE // 2)


@pytest.fixture
def written(tmp_path):
    """A folder with a file of two and a half MiB, and what was written down of it."""
    (tmp_path / "weights").write_bytes(CONTENT)
    (tmp_path / "small").write_bytes(b"few")
    return tmp_path, {name: describe_file(tmp_path / name) for name in ("weights", "small")}


def test_a_file_is_described_by_all_of_its_bytes(written):
    _, files = written
    assert files["weights"] == FileRecord(len(CONTENT), zlib.crc32(CONTENT))
    assert files["small"] == FileRecord(3, zlib.crc32(b"few"))


def test_files_as_they_were_written_are_in_order(written):
    folder, files = written
    assert find_misfits(folder, files) == []
    assert find_alterations(folder, files) == []


@pytest.mark.parametrize("at", [0, MEBIBYTE - 1, MEBIBYTE, 2 * MEBIBYTE - 1, len(CONTENT) - 1])
def test_a_flipped_byte_is_found_wherever_it_stands(written, at):
    folder, files = written
    spoiled = bytearray(CONTENT)
    spoiled[at] ^= 1
    (folder / "weights").write_bytes(spoiled)
    assert find_misfits(folder, files) == [], "its length is as it was"
    now, then = zlib.crc32(spoiled), files["weights"].crc32
    assert find_alterations(folder, files) == [
        f"weights was altered: its CRC-32 is {now:08x}, was written as {then:08x}"
    ]


@pytest.mark.parametrize("change", [1, -1, MEBIBYTE], ids=["longer", "shorter", "much_longer"])
def test_another_length_is_found_without_reading(written, change):
    folder, files = written
    (folder / "weights").write_bytes((CONTENT + bytes(MEBIBYTE))[: len(CONTENT) + change])
    said = [f"weights has {len(CONTENT) + change} bytes, was written with {len(CONTENT)}"]
    assert find_misfits(folder, files) == said
    assert find_alterations(folder, files) == said


def test_a_folder_in_a_files_place_is_no_file(written):
    folder, files = written
    (folder / "small").unlink()
    (folder / "small").mkdir()
    assert find_misfits(folder, files) == ["small is missing"]

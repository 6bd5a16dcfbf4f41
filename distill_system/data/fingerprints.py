"""Fingerprints of models, tokenizers and prompts: short texts that are equal where those are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from distill_system.errors import ModelError
from distill_system.records import Int32Array

DIGITS = 32
"""Hexadecimal digits of a fingerprint: 128 bits, so that no two are equal by chance."""
NUM_PROBES = 16
PROBE_BYTES = 4096
"""A file of weights is read at NUM_PROBES places spread over it, PROBE_BYTES at each."""


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """Equal for tokenizers whose token ids mean the same: one vocabulary, one end of sequence."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return digest(json.dumps([vocabulary, tokenizer.eos_token_id]).encode())


def fingerprint_model(path: str) -> str:
    """Equal for folders that hold the same model; for a hub name it contains the commit.

    Reads config.json, and of each file of weights its length, its header (names and shapes) and
    samples of its bytes: about 64 KiB a file, however large it is. Training changes all weights, so
    samples tell two trainings apart; a change of a few single numbers may be missed.

    Raises: ModelError if there is no such model on this machine.
    """
    if not Path(path).is_dir():
        return f"{path}@{_commit(path)}"
    folder, seen = Path(path), hashlib.sha256()
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not weights:
        raise ModelError(
            f"{path!r}: expected a folder with config.json and *.safetensors, found "
            f"{sorted(file.name for file in folder.iterdir())[:8]}. Give the folder that "
            "save_pretrained wrote"
        )
    seen.update((folder / "config.json").read_bytes())
    for file in weights:
        seen.update(file.name.encode())
        _update_by_samples(seen, file)
    return seen.hexdigest()[:DIGITS]


def fingerprint_prompt(token_ids: Int32Array) -> str:
    """Equal for prompts of the same tokens.  token_ids: int32 [P]."""
    return digest(token_ids.astype("<i4").tobytes())


def digest(content: bytes) -> str:
    """The first DIGITS hexadecimal digits of SHA-256."""
    return hashlib.sha256(content).hexdigest()[:DIGITS]


def _update_by_samples(seen: Any, file: Path) -> None:
    size = file.stat().st_size
    seen.update(str(size).encode())
    with file.open("rb") as opened:
        # A safetensors file begins with the length of its header, which names every tensor.
        length = int.from_bytes(opened.read(8), "little")
        seen.update(opened.read(min(length, size)))
        for probe in range(NUM_PROBES):
            opened.seek(8 + length + (size - 8 - length) * probe // NUM_PROBES)
            seen.update(opened.read(PROBE_BYTES))


def _commit(name: str) -> str:
    try:
        config = cached_file(name, "config.json")
    except OSError as error:
        raise ModelError(
            f"{name!r}: expected a folder of a model or a name of the Hugging Face hub: {error}"
        ) from error
    commit = extract_commit_hash(config, None)
    if commit is None:
        raise ModelError(f"{name!r}: its commit on the hub is not known; give a folder instead")
    return str(commit)

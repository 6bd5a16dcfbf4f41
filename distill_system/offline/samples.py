"""Which samples to generate, in which batches, and how finished ones are written to the store."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow
import pyarrow.compute as pc

from distill_system.data import SampleOrigin, TrajectoryStore
from distill_system.data.fingerprints import digest, fingerprint_prompt
from distill_system.observe.live import LiveTask
from distill_system.offline.workers import PROMPT_SCHEMA
from distill_system.records import Prompt
from distill_system.seeds import derive_seed

PART_ROWS = 4096
PART_SECONDS = 30.0
PART_SHARE = 0.1
"""A part is written after PART_ROWS finished samples, or after PART_SECONDS, or after PART_SHARE of
the time since the start, whichever comes first. A killed command loses what is not yet written."""
CALLS_PER_WORKER = 8
"""Each worker gets at least this many calls, so that at the end none waits long for the others."""


def plan_samples(
    prompts: Sequence[Prompt],
    origin: SampleOrigin,
    *,
    num_prompts: int | None,
    samples_per_prompt: int,
) -> pyarrow.Table:
    """All samples to generate, a row of PROMPT_SCHEMA each; of prompts with equal tokens only one.

    The order of prompts depends only on the seed and their ids, and the first sample of every
    prompt comes before any second one. So larger numbers ask for the same samples and more.
    """
    order = {p.prompt_id: derive_seed(origin.seed, "offline", p.prompt_id) for p in prompts}
    distinct: dict[str, Prompt] = {}
    for prompt in sorted(prompts, key=lambda p: (order[p.prompt_id], p.prompt_id)):
        distinct.setdefault(fingerprint_prompt(prompt.token_ids), prompt)
    chosen = list(distinct.values())[:num_prompts]
    # A sample's id is made of prompt id and label. Other models and samplings get other labels, so
    # that ids are unique in a store.
    how = digest(f"{origin.policy_key}/{origin.max_response_tokens}/{origin.seed}".encode())[:8]
    rows = [
        {
            "key": origin.key(prompt.token_ids, label),
            "label": label,
            "prompt_id": prompt.prompt_id,
            "token_ids": prompt.token_ids,
            "prompt_text": prompt.text,
        }
        for label in (f"offline_{how}_{k}" for k in range(samples_per_prompt))
        for prompt in chosen
    ]
    return pyarrow.Table.from_pylist(rows, schema=PROMPT_SCHEMA)


def cut_batches(rows: pyarrow.Table, *, num_workers: int, most_rows: int) -> list[pyarrow.Table]:
    """Cut rows, in order, into batches of at most most_rows, with several batches per worker."""
    per_call = -(-rows.num_rows // (num_workers * CALLS_PER_WORKER))
    size = max(1, min(most_rows, per_call))
    return [rows.slice(start, size) for start in range(0, rows.num_rows, size)]


class SampleKeeper:
    """Appends samples to a store, part by part, and shows the progress."""

    def __init__(self, store: TrajectoryStore, tokenizer: Any, task: LiveTask) -> None:
        self._store = store
        self._tokenizer = tokenizer
        self._task = task
        self._waiting: list[pyarrow.Table] = []
        self._started = self._last_part = time.monotonic()

    def keep(self, written: Iterable[pyarrow.Table]) -> None:
        """Append all samples; if an error or a signal ends the work, those that are finished."""
        done, tokens = self._task.step, 0
        self._started = self._last_part = time.monotonic()
        try:
            for rows in written:
                self._waiting.append(rows)
                done += rows.num_rows
                tokens += _num_response_tokens(rows)
                seconds = max(time.monotonic() - self._started, 1e-9)
                self._task.update(done, {"tok/s": tokens / seconds})
                self._write_if_due()
        finally:
            self._write()
        self._task.finish()

    def _write_if_due(self) -> None:
        num_rows = sum(rows.num_rows for rows in self._waiting)
        now = time.monotonic()
        interval = min(PART_SECONDS, PART_SHARE * (now - self._started))
        if num_rows >= PART_ROWS or now - self._last_part >= interval:
            self._write()

    def _write(self) -> None:
        if self._waiting:
            self._store.append(self._with_texts(pyarrow.concat_tables(self._waiting)))
        self._waiting, self._last_part = [], time.monotonic()

    def _with_texts(self, rows: pyarrow.Table) -> pyarrow.Table:
        """The rows with their responses as text, for people who read the store."""
        ids = zip(rows["token_ids"].to_pylist(), rows["num_prompt_tokens"].to_pylist(), strict=True)
        responses = [token_ids[start:] for token_ids, start in ids]
        texts = self._tokenizer.batch_decode(responses, skip_special_tokens=True)
        at = rows.schema.get_field_index("response_text")
        return rows.set_column(at, "response_text", pyarrow.array(texts, pyarrow.string()))


def _num_response_tokens(rows: pyarrow.Table) -> int:
    all_tokens = pc.sum(pc.list_value_length(rows["token_ids"])).as_py()
    return int(all_tokens - pc.sum(rows["num_prompt_tokens"]).as_py())

"""Everything a run reads, tokenised: supervised trajectories, prompts, evaluation splits.

In: the configuration and the tokenizer.  Out: one RunData, in which no training row shares its
prompt with a held-out or evaluation row.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Literal

from huggingface_hub.constants import HF_HOME
from transformers import PreTrainedTokenizerBase

from distill_system.config.data import DataConfig, Source, TrainedTokenizer
from distill_system.config.run import RunConfig
from distill_system.data.examples import Example
from distill_system.data.fingerprints import fingerprint_tokenizer
from distill_system.data.kept_records import (
    PROMPTS,
    TRAJECTORIES,
    MappedRecords,
    Record,
    RecordForm,
    RecordKeeper,
)
from distill_system.data.row_encoder import Row
from distill_system.data.set_reader import CONTEXT_EXAMPLES, PLAIN_TEXT, SetReader
from distill_system.data.sources import SourceReport, load_examples
from distill_system.data.stored_rows import SampleOrigin
from distill_system.data.stored_trajectories import (
    Selection,
    StoredTrajectories,
    read_trajectories,
)
from distill_system.errors import DataError
from distill_system.records import REJECTED, Prompt, Trajectory

SetName = Literal[
    "teacher_sft",
    "student_sft",
    "preferences",
    "plain_text",
    "prompts",
    "held_out",
    "evaluation",
    "stored",
]
ALL_SETS: tuple[SetName, ...] = (
    *("teacher_sft", "student_sft", "preferences", "plain_text"),
    *("prompts", "held_out", "evaluation"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """The run's data; sets that were not asked for, or not configured, are empty.

    teacher_sft, student_sft, preferences, plain_text, prompts: tuples, or MappedRecords of a file
    where they are large. In preferences each preferred answer is followed by its rejected one.
    evaluation: prompts by split name.
    num_removed: rows left out of each training set because their prompts are also in held_out or
    evaluation.
    num_out_of_bounds: rows left out of a set by the token bounds of its source; sets that lost none
    are not in it.
    reports: what was read of each set's source, by the set's name below `data`.
    places: id of each prompt of evaluation -> file and row that it was read from.
    notes: what else a person should know of the rows, a line each.
    stored: samples of the run's teacher in data.trajectory_store, each made when it is asked for.
    num_foreign: samples in the store of other models or sampling settings, which are left out.
    source_held_out: what a policy of the prompts' sources measures on, by the source's name.
    """

    teacher_sft: Sequence[Trajectory] = ()
    student_sft: Sequence[Trajectory] = ()
    preferences: Sequence[Trajectory] = ()
    plain_text: Sequence[Trajectory] = ()
    prompts: Sequence[Prompt] = ()
    held_out: tuple[Prompt, ...] = ()
    evaluation: dict[str, tuple[Prompt, ...]] = field(default_factory=dict)
    num_removed: dict[str, int] = field(default_factory=dict)
    num_out_of_bounds: dict[str, int] = field(default_factory=dict)
    reports: dict[str, SourceReport] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    stored: Sequence[Trajectory] = ()
    num_foreign: int = 0
    source_held_out: dict[str, tuple[Trajectory, ...]] = field(default_factory=dict)


def load_run_data(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    sets: Collection[SetName] = ALL_SETS,
    *,
    stored_by: SampleOrigin | None = None,
    stop_token_ids: Collection[int] = (),
) -> RunData:
    """Load, render and tokenise the sets of a run.

    Ids are "<set>:<index>", e.g. "prompts:17", "evaluation.paraphrase:3", or "prompts.code:17" of
    the mixture's source `code`. The index counts all rows of the source, so that an id does not
    change when other rows are removed. Prompts are sorted by source, in the mixture's order.

    config: the run.
    tokenizer: from `build_tokenizer`, or loaded from the teacher's folder.
    sets: the sets to load; the others stay empty.
    stored_by: the model and sampling settings whose samples of data.trajectory_store are used;
        required for the set "stored".
    stop_token_ids: the tokens that end a response, beside the tokenizer's end of sequence.
    Raises: DataError if a source or row cannot be used, a prompt is too long, a supervised row has
        no answer, or a set is empty after the removal; the trajectory store is missing or empty,
        has another tokenizer, or holds no sample of stored_by.
    """
    data = config.data
    reader = SetReader(config, tokenizer, stop_token_ids, for_teacher=True)
    measured = {f"evaluation.{split}": source for split, source in data.evaluation.items()}
    measured_rows = {name: reader.rows(name, source, True) for name, source in measured.items()}
    measured_rows["held_out"] = reader.rows("held_out", data.held_out, False)
    gaps = {name: reader.rows(name, source, True) for name, source in data.gap_sources.items()}
    measured_rows |= gaps
    # Read whichever sets are asked for: they decide which rows training may not see.
    blocked = {row.text for row in chain.from_iterable(measured_rows.values())}
    training = _TrainingRows(reader, blocked, data)
    reader.show(training.context_examples())
    teacher = data.teacher_sft if "teacher_sft" in sets else None
    student = data.student_sft if "student_sft" in sets else None
    texts = data.plain_text if "plain_text" in sets else None
    pairs = data.preferences if "preferences" in sets else None
    stored = None
    if "stored" in sets:
        blocked_keys = set().union(*map(reader.prompt_keys, measured_rows.values()))
        stored = _read_store(config, tokenizer, stored_by, blocked_keys)
        training.num_removed["trajectory_store"] = stored.num_blocked
        if stored.num_too_long:
            reader.num_out_of_bounds["trajectory_store"] = stored.num_too_long
    loaded = RunData(
        teacher_sft=training.trajectories("teacher_sft", teacher),
        student_sft=training.trajectories("student_sft", student),
        preferences=training.preferences(pairs),
        plain_text=training.trajectories(PLAIN_TEXT, texts),
        prompts=training.prompts() if "prompts" in sets else (),
        held_out=reader.prompts(
            "held_out", measured_rows["held_out"] if "held_out" in sets else []
        ),
        evaluation={
            split: reader.prompts(name, measured_rows[name])
            for split, name in zip(data.evaluation, measured, strict=True)
            if "evaluation" in sets
        },
        num_removed=training.num_removed,
        num_out_of_bounds=reader.num_out_of_bounds,
        reports=reader.reports,
        places={row.row_id: row.example.row for name in measured for row in measured_rows[name]},
        stored=() if stored is None else stored,
        num_foreign=0 if stored is None else stored.num_foreign,
        source_held_out={
            name.split(".")[2]: reader.trajectories(rows)
            for name, rows in gaps.items()
            if "prompts" in sets
        },
    )
    reader.require_words()
    return replace(loaded, notes=tuple(reader.notes()))  # of all that has been read


def store_path(data: DataConfig) -> Path:
    """The folder of data.trajectory_store."""
    assert data.trajectory_store is not None, "the configuration names a store"
    return Path(data.directory) / data.trajectory_store


def _read_store(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    stored_by: SampleOrigin | None,
    blocked: Collection[str],
) -> StoredTrajectories:
    assert stored_by is not None, "the run knows whose samples it wants"
    selection = Selection(
        origin=stored_by,
        blocked=blocked,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_response_tokens=config.rollout.sampling.max_response_tokens,
    )
    return read_trajectories(store_path(config.data), fingerprint_tokenizer(tokenizer), selection)


class _TrainingRows:
    """Rows to learn from, without those whose prompts are in held_out or evaluation.

    blocked: the texts of those prompts.
    """

    def __init__(self, reader: SetReader, blocked: Collection[str], data: DataConfig) -> None:
        self.reader = reader
        self.blocked = blocked
        self.data = data
        self.num_removed: dict[str, int] = {}

    def trajectories(self, name: str, source: Source | None) -> Sequence[Trajectory]:
        if source is None:
            return ()
        keeper = self._keeper(TRAJECTORIES)
        has_answers = name != PLAIN_TEXT
        make = self.reader.trajectories if has_answers else self.reader.pieces
        for rows in self._row_batches(name, source, has_answers, key=f"data.{name}"):
            keeper.add(make(rows))
        return self._finish(keeper, name)

    def context_examples(self) -> list[Row]:
        """The rows of data.teacher_context.examples."""
        context = self.data.teacher_context
        if context is None or context.examples is None:
            return []
        name, key = CONTEXT_EXAMPLES, f"data.{CONTEXT_EXAMPLES}"
        batches = self._row_batches(name, context.examples, True, key=key)
        return [row for rows in batches for row in rows]

    def preferences(self, source: Source | None) -> Sequence[Trajectory]:
        """Each preferred answer with the rejected one behind it, where both are within bounds."""
        if source is None:
            return ()
        keeper, key = self._keeper(TRAJECTORIES), "data.preferences"
        halves = (
            self._row_batches(name, source, True, key=key) for name in ("preferences", REJECTED)
        )
        # No row is left out before it is numbered, so that both halves have the same numbers.
        for preferred, rejected in zip(*halves, strict=True):
            others = {_number(row.row_id): row for row in rejected}
            kept = [row for row in preferred if _number(row.row_id) in others]
            worse = self.reader.trajectories([others[_number(row.row_id)] for row in kept])
            pairs = zip(self.reader.trajectories(kept), worse, strict=True)
            keeper.add([t for one, other in pairs for t in (one, _beside(one, other))])
        return self._finish(keeper, "preferences")

    def prompts(self) -> Sequence[Prompt]:
        """The prompts of the distillation, sorted by source."""
        data = self.data
        keeper = self._keeper(PROMPTS)
        for name, (key, source) in zip(
            data.prompt_weights, data.prompt_sources.items(), strict=True
        ):
            for rows in self._row_batches(name, source, False, key=f"data.{key}"):
                keeper.add(self.reader.prompts(name, rows))
        return self._finish(keeper, name)

    def _row_batches(
        self, name: str, source: Source, with_answers: bool, *, key: str
    ) -> Iterator[list[Row]]:
        num_rows = num_kept = 0
        for rows in self.reader.row_batches(name, source, with_answers, key=key):
            kept = [row for row in rows if row.text not in self.blocked]
            num_rows += len(rows)
            num_kept += len(kept)
            yield kept
        self.num_removed[name] = num_rows - num_kept
        if not num_kept:
            raise DataError(
                f"{key}: each of its {num_rows} prompts also stands in data.held_out or "
                "data.evaluation, where training may not see it; give other rows"
            )

    def _keeper(self, form: RecordForm[Record]) -> RecordKeeper[Record]:
        return RecordKeeper(
            form,
            most_bytes=self.data.max_memory_mebibytes << 20,
            folder=_cache_folder(self.data),
        )

    def _finish(self, keeper: RecordKeeper[Record], name: str) -> Sequence[Record]:
        records = keeper.finish()
        if isinstance(records, MappedRecords):
            self.reader.reports[name].num_mapped_bytes = records.num_bytes
        return records


def _number(row_id: str) -> str:
    return row_id.partition(":")[2]


def _beside(preferred: Trajectory, rejected: Trajectory) -> Trajectory:
    return replace(rejected, prompt_id=preferred.prompt_id)


def _cache_folder(data: DataConfig) -> Path:
    if data.cache_directory is not None:
        return Path(data.cache_directory)
    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets")


def tokenizer_texts(config: RunConfig) -> Iterator[str] | None:
    """The texts to train tokenizer.type=train_bpe on: data.teacher_sft; None for other types.

    Raises: DataError if there are no such rows, or they are chats, for which it has no template.
    """
    if not isinstance(config.tokenizer, TrainedTokenizer):
        return None
    data = config.data
    if data.teacher_sft is None:
        raise DataError(
            "tokenizer.type=train_bpe is trained on data.teacher_sft, which is not given"
        )
    examples = load_examples(data.teacher_sft, data, key="data.teacher_sft")
    return chain.from_iterable(_plain_texts(example, data) for example in examples)


def _plain_texts(example: Example, data: DataConfig) -> Iterator[str]:
    if not isinstance(example.prompt, str):
        raise DataError(
            f"data.teacher_sft: {example.row} is a chat, but a tokenizer of type train_bpe has no "
            "chat template; use tokenizer.type=pretrained, or rows of prompt and response"
        )
    yield data.prompt_template.replace("{prompt}", example.prompt)
    if example.answer is not None:
        yield example.answer

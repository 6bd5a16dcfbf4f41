"""Looks at the sets of a run as its models will read them: tokens, lengths, refused rows.

In: a set reader and configured sources.  Out: one SetInspection a set; nothing is raised for a row
or a set that cannot be used, it is written down.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tokenizers.decoders import DecodeStream

from distill_system.config.data import DataConfig, Source
from distill_system.data.row_encoder import Row
from distill_system.data.set_reader import PLAIN_TEXT, SetReader
from distill_system.data.sources import SourceReport
from distill_system.errors import DataError, DistillError
from distill_system.records import Prompt, Trajectory

ROWS_AT_ONCE = 1000
"""Rows that are tokenised together."""

Made = TypeVar("Made", Prompt, Trajectory)
Check = Callable[[str, Sequence[Prompt], Mapping[str, str]], None]
"""Refuses what a split's prompts lack to be scored: name, prompts, places by prompt id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenisedRow:
    """One row as the models read it; each text is the part of a token.

    place: its file and row.  learned: the response's tokens, of a supervised row.
    references: the accepted answers of an evaluation row.
    """

    place: str
    prompt: tuple[str, ...]
    learned: tuple[str, ...] = ()
    references: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True)
class SetInspection:
    """What a set holds.

    name: below `data`.  rows: the first ones.  report: what was read, the refused rows included.
    prompt_lengths, response_lengths: tokens of each row; of responses that are learned, their end
    included, or of first references.
    notes: what else a person should know of it.
    num_out_of_bounds: rows that the token bounds of the source leave out.  num_removed: rows whose
    prompts are in an evaluation split too.
    problem: why the set would end a run; None if it would not.
    """

    name: str
    report: SourceReport = field(default_factory=SourceReport)
    rows: list[TokenisedRow] = field(default_factory=list)
    prompt_lengths: list[int] = field(default_factory=list)
    response_lengths: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_out_of_bounds: int = 0
    num_removed: int = 0
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """One configured set.  kind: "supervised", "measured", "prompts" or "text"."""

    name: str
    key: str
    source: Source
    kind: str


def inspect_sets(
    data: DataConfig,
    reader: SetReader,
    tokenizer: Any,
    *,
    names: Collection[str] = (),
    num_rows: int = 10,
    check: Check = lambda name, prompts, places: None,
) -> list[SetInspection]:
    """Look at every set that the configuration names, those that are measured on first.

    data: the sets.
    reader: from the run's configuration and tokenizer.
    tokenizer: the run's.
    names: only these, such as "prompts" or "evaluation.test"; none takes all.
    num_rows: rows of each that are shown.
    check: raises DataError for a split that cannot be scored.
    Raises: DataError if no set has one of the names.
    """
    wanted = list(_configured(data))
    known = [each.name for each in wanted]
    unknown = [name for name in names if not any(_is_named(each, [name]) for each in wanted)]
    if unknown:
        raise DataError(f"no set is called {unknown}; the sets are {', '.join(known)}")
    blocked: set[str] = set()
    inspections = []
    for each in wanted:
        found = _SetInspector(reader, tokenizer, each, num_rows, check).inspect(blocked)
        if not names or _is_named(each, names):
            inspections.append(found)
    for found in inspections:
        beginning = f"data.{found.name}: "
        notes = (note for note in reader.notes() if note.startswith(beginning))
        found.notes = [note.removeprefix(beginning) for note in notes]
    return inspections


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> tuple[str, ...]:
    """The text that each token adds; a token in the middle of a character adds "".

    The texts joined are the decoded sequence.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python alone
        return tuple(tokenizer.convert_ids_to_tokens(list(token_ids)))
    stream = DecodeStream(skip_special_tokens=False)
    return tuple(stream.step(backend, int(token)) or "" for token in token_ids)


def _configured(data: DataConfig) -> Iterator[_Wanted]:
    def want(name: str, source: Source, kind: str, key: str | None = None) -> _Wanted:
        return _Wanted(name=name, key=f"data.{key or name}", source=source, kind=kind)

    for split, source in data.evaluation.items():
        yield want(f"evaluation.{split}", source, "measured")
    yield want("held_out", data.held_out, "prompts")
    for name, source in data.gap_sources.items():
        yield want(name, source, "measured")
    for name in ("teacher_sft", "student_sft", "preferences"):
        tuned: Source | None = getattr(data, name)
        if tuned is not None:
            yield want(name, tuned, "supervised")
    if data.plain_text is not None:
        yield want(PLAIN_TEXT, data.plain_text, "text")
    for name, (key, source) in zip(data.prompt_weights, data.prompt_sources.items(), strict=True):
        yield want(name, source, "prompts", key)


def _is_named(wanted: _Wanted, names: Collection[str]) -> bool:
    return any(wanted.name == name or wanted.name.startswith(f"{name}.") for name in names)


class _SetInspector:
    def __init__(
        self, reader: SetReader, tokenizer: Any, wanted: _Wanted, num_rows: int, check: Check
    ) -> None:
        self._reader = reader
        self._tokenizer = tokenizer
        self._wanted = wanted
        self._num_rows = num_rows
        self._check = check
        self._measured: dict[str, tuple[Prompt, str]] = {}
        self._found = SetInspection(name=wanted.name)

    def inspect(self, blocked: set[str]) -> SetInspection:
        """blocked: texts of the prompts that are measured on, to which this set's may be added."""
        wanted, found = self._wanted, self._found
        is_measured = wanted.kind == "measured" or wanted.name == "held_out"
        try:
            rows = self._reader.rows(
                wanted.name,
                wanted.source,
                wanted.kind in ("supervised", "measured"),
                key=wanted.key,
                keep_going=True,
            )
        except DataError as error:
            found.problem = str(error)
            rows = []
        found.report = self._reader.reports.get(wanted.name, found.report)
        found.num_out_of_bounds = self._reader.num_out_of_bounds.get(wanted.name, 0)
        if is_measured:
            blocked.update(row.text for row in rows)
        else:
            kept = [row for row in rows if row.text not in blocked]
            found.num_removed = len(rows) - len(kept)
            rows = kept
        for start in range(0, len(rows), ROWS_AT_ONCE):
            self._read(rows[start : start + ROWS_AT_ONCE])
        if wanted.kind == "measured" and found.problem is None:
            self._check_split()
        leaves_out = getattr(wanted.source, "leave_out_refused", False)
        if found.problem is None and found.report.num_refused and not leaves_out:
            found.problem = found.report.refused[0]
        return found

    def _check_split(self) -> None:
        prompts = [prompt for prompt, _ in self._measured.values()]
        places = {prompt_id: place for prompt_id, (_, place) in self._measured.items()}
        try:
            self._check(self._wanted.name.removeprefix("evaluation."), prompts, places)
        except DistillError as error:
            self._found.problem = str(error)

    def _read(self, rows: Sequence[Row]) -> None:
        learned = {"supervised": self._reader.trajectories, "text": self._reader.documents}
        make = learned.get(self._wanted.kind)
        if make is not None:
            for row, trajectory in self._make(make, rows):
                self._add_trajectory(row, trajectory)
        else:
            for row, prompt in self._make(self._make_prompts, rows):
                self._add_prompt(row, prompt)

    def _make_prompts(self, rows: Sequence[Row]) -> tuple[Prompt, ...]:
        return self._reader.prompts(self._wanted.name, rows)

    def _make(
        self, make: Callable[[Sequence[Row]], tuple[Made, ...]], rows: Sequence[Row]
    ) -> Iterator[tuple[Row, Made]]:
        """The records of the rows of which one can be made; together, or else one by one."""
        try:
            yield from zip(rows, make(rows), strict=True)
            return
        except DataError:
            pass  # one of them: found below
        for row in rows:
            try:
                (made,) = make([row])
            except DataError as error:
                self._found.report.take_back(error)
            else:
                yield row, made

    def _add_trajectory(self, row: Row, trajectory: Trajectory) -> None:
        found = self._found
        found.prompt_lengths.append(trajectory.num_prompt_tokens)
        found.response_lengths.append(trajectory.num_response_tokens)
        if len(found.rows) < self._num_rows:
            # One decoding over both, since the first token of the answer may lean on the prompt.
            texts = token_texts(self._tokenizer, trajectory.token_ids.tolist())
            at = trajectory.num_prompt_tokens
            found.rows.append(
                TokenisedRow(place=row.example.row, prompt=texts[:at], learned=texts[at:])
            )

    def _add_prompt(self, row: Row, prompt: Prompt) -> None:
        found = self._found
        found.prompt_lengths.append(len(prompt.token_ids))
        if self._wanted.kind == "measured":
            self._measured[prompt.prompt_id] = prompt, row.example.row
        if prompt.references:
            answer = self._tokenizer(prompt.references[0], add_special_tokens=False)["input_ids"]
            found.response_lengths.append(len(answer))
        if len(found.rows) < self._num_rows:
            texts = token_texts(self._tokenizer, prompt.token_ids.tolist())
            found.rows.append(
                TokenisedRow(place=row.example.row, prompt=texts, references=prompt.references)
            )

"""Turns the rows of one set into prompts and supervised trajectories.

In: a configured source and the run's tokenizer.  Out: rows with the text that the models read, then
records with token ids.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from transformers import PreTrainedTokenizerBase

from distill_system.config.data import RowSource, Source
from distill_system.config.run import RunConfig
from distill_system.data.examples import Example
from distill_system.data.fingerprints import fingerprint_prompt
from distill_system.data.row_encoder import Row, RowEncoder, readable, set_name
from distill_system.data.shortening import MOST_CHARACTERS, Side, shorten
from distill_system.data.sources import SourceReport, read_examples
from distill_system.errors import DataError
from distill_system.records import REJECTED, Author, Finish, Int32Array, Prompt, Trajectory

PLAIN_TEXT = "plain_text"
CONTEXT_EXAMPLES = "teacher_context.examples"
_LEARNED_SETS = ("teacher_sft", "student_sft")

ROWS_AT_ONCE = 4096
"""Rows that are rendered and tokenised together."""


class SetReader:
    """Reads sets with one tokenizer.

    stop_token_ids: what ends a response, beside the tokenizer's end of sequence.
    for_teacher: records say too what the teacher reads, by data.teacher_context.
    num_out_of_bounds: rows left out of each set so far by the token bounds of its source.
    num_shortened, num_too_long: prompts of each set that were cut, or left out with their rows,
    because they are longer than data.max_prompt_tokens.
    num_unknown: prompts of each set that hold no word that the tokenizer knows.
    reports: what was read of each set's source.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Collection[int] = (),
        *,
        for_teacher: bool = False,
    ) -> None:
        self._data = config.data
        self._context = config.data.teacher_context if for_teacher else None
        self._scores_rows = "dataset" in config.distill.off_policy_mixture
        self._shown: Sequence[Row] = ()
        self._most_tokens = config.max_model_length
        self._encoder = RowEncoder(config, tokenizer, stop_token_ids)
        self.num_out_of_bounds: dict[str, int] = {}
        self.num_shortened = Counter[str]()
        self.num_too_long = Counter[str]()
        self.num_unknown = Counter[str]()
        self._num_encoded = Counter[str]()
        self.reports: dict[str, SourceReport] = {}

    def show(self, examples: Sequence[Row]) -> None:
        """From now on the teacher reads these rows with answers before each prompt."""
        self._shown = examples

    def _reads_context(self, name: str) -> bool:
        """Whether the teacher reads a set behind its context."""
        if self._context is None or name in (PLAIN_TEXT, CONTEXT_EXAMPLES):
            return False
        if name == "teacher_sft":
            return self._context.fine_tuning
        if name == "student_sft":
            return self._scores_rows
        return not (self._context.fields and name.startswith("evaluation."))

    def rows(
        self,
        name: str,
        source: Source,
        with_answers: bool,
        *,
        key: str | None = None,
        keep_going: bool = False,
    ) -> list[Row]:
        """The rendered rows of a set, without those outside the source's token bounds.

        Args: as those of `row_batches`.
        """
        batches = self.row_batches(name, source, with_answers, key=key, keep_going=keep_going)
        return [row for batch in batches for row in batch]

    def row_batches(
        self,
        name: str,
        source: Source,
        with_answers: bool,
        *,
        key: str | None = None,
        keep_going: bool = False,
    ) -> Iterator[list[Row]]:
        """The same rows, at most ROWS_AT_ONCE at a time, so that a large set need not fit memory.

        key: configuration key of the source; None: data.<name>.
        keep_going: leave out rows that cannot be used, and count them in the set's report.
        """
        key = key or f"data.{name}"
        report = self.reports[name] = SourceReport()
        leave_out = keep_going or (isinstance(source, RowSource) and source.leave_out_refused)
        examples = read_examples(
            source,
            self._data,
            key=key,
            with_answers=with_answers,
            report=report,
            keep_going=keep_going,
            context=self._context.text if self._context and self._reads_context(name) else "",
            rejected=name == REJECTED,
        )
        is_empty = True
        numbered = enumerate(examples)
        while some := list(islice(numbered, ROWS_AT_ONCE)):
            rendered = self._rendered(
                name, some, key, report, with_answers=with_answers, leave_out=leave_out
            )
            rows = list(rendered)
            if isinstance(source, RowSource):
                rows = self._within_bounds(name, rows, source)
            if name != PLAIN_TEXT:
                rows = self._within_limit(name, rows)
            is_empty = is_empty and not rows
            yield rows
        if is_empty:
            raise DataError(self._nothing_left(name, source, report, key))

    def _rendered(
        self,
        name: str,
        examples: Iterable[tuple[int, Example]],
        key: str,
        report: SourceReport,
        *,
        with_answers: bool,
        leave_out: bool,
    ) -> Iterator[Row]:
        for index, example in examples:
            try:
                turns = self._turns(f"{name}:{index}", example, key, with_answers=with_answers)
                if leave_out and name in _LEARNED_SETS:
                    for row in turns:
                        self._encoder.check_learnable(row)
            except DataError as error:
                if not leave_out:
                    raise
                report.take_back(error)
            else:
                yield from turns

    def _turns(self, row_id: str, example: Example, key: str, *, with_answers: bool) -> list[Row]:
        """The turns of an example as rows; the last keeps the row's id.

        With answers, a question behind the last answer is none to learn from.
        """
        names = [f"{row_id}.turn_{n}" for n in range(1, len(example.earlier) + 1)] + [row_id]
        is_plain = set_name(row_id) == PLAIN_TEXT
        render = self._encoder.render_plain if is_plain else self._encoder.render
        return [
            Row(name, render(turn, key), turn, key)
            for name, turn in zip(names, example.turns, strict=True)
            if turn.answer is not None or not with_answers or not example.earlier
        ]

    def notes(self) -> Iterator[str]:
        """What a person should know of the rows read so far, beside num_out_of_bounds."""
        limit, how = self._data.max_prompt_tokens, self._data.too_long_prompts
        for name, count in (+self.num_too_long).items():
            yield f"data.{name}: {count} rows left out, their prompts have more than {limit} tokens"
        for name, count in self.num_shortened.items():
            side = "beginning" if how == "cut_left" else "end"
            yield f"data.{name}: {count} prompts of more than {limit} tokens cut at the {side}"
        for name, count in self.num_unknown.items():
            yield f"data.{name}: the tokenizer knows no word of {count} prompts"
        for name, count in Counter(map(set_name, self._encoder.parted)).items():
            yield (
                f"data.{name}: the answers of {count} rows open otherwise than the chat template's "
                "generation prompt; they are learned from where the two part"
            )

    def require_words(self) -> None:
        """Raises: DataError for a set of which the tokenizer knows no prompt."""
        for name, count in self.num_unknown.items():
            if count == self._num_encoded[name]:
                raise DataError(
                    f"data.{name}: the tokenizer knows no word of any of its {count} prompts; the "
                    "rows are of another language or script than the tokenizer"
                )

    def prompts(self, name: str, rows: Sequence[Row]) -> tuple[Prompt, ...]:
        """Rows as prompts, with their references."""
        read = self._as_teacher_reads(rows)
        for_teacher = self._teacher_ids(read, self._encoder.prompts(read), len(rows))
        return tuple(
            Prompt(
                prompt_id=row.row_id,
                token_ids=np.array(token_ids, dtype=np.int32),
                text=readable(row.example.prompt),
                references=row.example.references,
                source=name,
                teacher_ids=teacher_ids,
            )
            for row, token_ids, teacher_ids in zip(
                rows, self._prompt_ids(rows), for_teacher, strict=True
            )
        )

    def prompt_keys(self, rows: Sequence[Row]) -> set[str]:
        """The keys of the rows' prompts in a trajectory store."""
        encoded = self._encoder.prompts(rows)
        return {fingerprint_prompt(np.array(ids, dtype=np.int32)) for ids in encoded}

    def trajectories(self, rows: Sequence[Row]) -> tuple[Trajectory, ...]:
        """Rows as supervised trajectories: prompt, answer, end of sequence."""
        read = self._as_teacher_reads(rows)
        prompts = [prompt_ids for prompt_ids, _ in self._encoder.split(read)]
        for_teacher = self._teacher_ids(read, prompts, len(rows))
        split = self._encoder.split(rows)
        for row, (prompt_ids, _) in zip(rows, split, strict=True):
            self._check_length(row, len(prompt_ids))
        self._note_unknown(rows, [prompt_ids for prompt_ids, _ in split])
        trajectories = tuple(
            Trajectory(
                trajectory_id=row.row_id,
                prompt_id=row.row_id,
                author=Author.DATASET,
                token_ids=np.array([*prompt_ids, *response_ids], dtype=np.int32),
                num_prompt_tokens=len(prompt_ids),
                behaviour_logprobs=np.empty(0, dtype=np.float32),
                temperature=1.0,
                finish=Finish.STOP,
                teacher_prompt_ids=teacher_ids,
            )
            for row, (prompt_ids, response_ids), teacher_ids in zip(
                rows, split, for_teacher, strict=True
            )
        )
        if read and read[0].name == "teacher_sft":
            return tuple(each.as_teacher_reads for each in trajectories)
        return trajectories

    def _as_teacher_reads(self, rows: Sequence[Row]) -> list[Row]:
        """The rows of a set behind the teacher's context; none where it has none."""
        if not rows or self._context is None or not self._reads_context(rows[0].name):
            return []
        separator = self._context.separator
        return [self._encoder.as_teacher_reads(row, self._shown, separator) for row in rows]

    def _teacher_ids(
        self, read: Sequence[Row], prompts: Sequence[list[int]], count: int
    ) -> list[Int32Array | None]:
        """prompts: the tokens of those that the teacher reads in its own way.  count: of all."""
        if self._context is None or not read:
            return [None] * count
        most = self._data.max_prompt_tokens + self._context.max_tokens
        for row, ids in zip(read, prompts, strict=True):
            if len(ids) > most:
                raise DataError(
                    f"prompt {row.row_id!r} ({row.example.row}) has {len(ids)} tokens with the "
                    "teacher's context, more than data.max_prompt_tokens + "
                    f"data.teacher_context.max_tokens={most}; raise the latter, give fewer "
                    "examples, or shorten the text"
                )
        return [np.array(ids, dtype=np.int32) for ids in prompts]

    def documents(self, rows: Sequence[Row]) -> tuple[Trajectory, ...]:
        """Plain texts whole; all tokens of each but the first are learned."""
        return tuple(
            _learned_text(row.row_id, row.row_id, np.array(ids, dtype=np.int32), Finish.STOP)
            for row, ids in zip(rows, self._encoder.documents(rows), strict=True)
        )

    def pieces(self, rows: Sequence[Row]) -> tuple[Trajectory, ...]:
        """Plain texts in pieces that the models can read.

        A piece begins with the last token of the piece before, so that each token of a text but the
        first is learned once.
        """
        most = self._most_tokens
        cut: list[Trajectory] = []
        for text in self.documents(rows):
            for number, start in enumerate(range(0, text.num_response_tokens, most - 1)):
                ids = text.token_ids[start : start + most]
                is_last = start + most >= text.token_ids.size
                name = f"{text.prompt_id}.piece_{number + 1}" if number else text.prompt_id
                finish = Finish.STOP if is_last else Finish.LENGTH
                cut.append(_learned_text(name, text.prompt_id, ids, finish))
        return tuple(cut)

    def _within_bounds(self, name: str, rows: list[Row], source: RowSource) -> list[Row]:
        kept = rows
        if source.max_prompt_tokens is not None:
            longest = source.max_prompt_tokens
            kept = [row for row, n in self._encoder.with_lengths(rows) if n <= longest]
        if source.bounds_responses:
            shortest = source.min_response_tokens or 0
            longest = source.max_response_tokens or sys.maxsize
            if source.max_response_tokens is not None:  # without tokenising what is plain to see
                kept = [row for row in kept if len(row.example.answer or "") <= MOST_CHARACTERS]
            lengths = [len(response) - 1 for _, response in self._encoder.split(kept)]
            kept = [row for row, n in zip(kept, lengths, strict=True) if shortest <= n <= longest]
        if len(kept) < len(rows):
            left_out = self.num_out_of_bounds.get(name, 0)
            self.num_out_of_bounds[name] = left_out + len(rows) - len(kept)
        return kept

    def _within_limit(self, name: str, rows: list[Row]) -> list[Row]:
        """The rows without prompts that are too long, or with them cut, as the key says."""
        how, limit = self._data.too_long_prompts, self._data.max_prompt_tokens
        if how == "refuse":
            return rows  # `prompts` and `trajectories` do, for those sets that are asked for
        kept: list[Row] = []
        for row, num_tokens in self._encoder.with_lengths(rows):
            if num_tokens <= limit:
                kept.append(row)
            elif how != "leave_out":
                kept.append(self._shorten(row, how))
                self.num_shortened[name] += 1
        if len(kept) < len(rows):
            self.num_too_long[name] += len(rows) - len(kept)
        return kept

    def _shorten(self, row: Row, side: Side) -> Row:
        limit = self._data.max_prompt_tokens

        def excess(example: Example) -> int:
            cut = row._replace(example=example, prompt=self._encoder.render(example, row.key))
            [(_, num_tokens)] = self._encoder.with_lengths([cut])
            return num_tokens - limit

        example = shorten(row.example, side, excess=excess, encoder=self._encoder.texts)
        if example is None:
            raise DataError(
                f"{row.where}: the prompt has more than data.max_prompt_tokens={limit} tokens and "
                f"cannot be cut: without the text that data.too_long_prompts={side} may cut it is "
                "still longer; raise the limit, shorten the template, or remove the row"
            )
        return row._replace(example=example, prompt=self._encoder.render(example, row.key))

    def _prompt_ids(self, rows: Sequence[Row]) -> list[list[int]]:
        encoded = self._encoder.prompts(rows)
        for row, ids in zip(rows, encoded, strict=True):
            self._check_length(row, len(ids))
        self._note_unknown(rows, encoded)
        return encoded

    def _note_unknown(self, rows: Sequence[Row], prompts: Sequence[list[int]]) -> None:
        self._num_encoded.update(row.name for row in rows)
        self.num_unknown.update(row.name for row in self._encoder.unknown(rows, prompts))

    def _check_length(self, row: Row, num_tokens: int) -> None:
        limit = self._data.max_prompt_tokens
        if num_tokens > limit:
            raise DataError(
                f"prompt {row.row_id!r} ({row.example.row}) has {num_tokens} tokens, more than "
                f"data.max_prompt_tokens={limit}; raise the key, remove the row, set "
                "data.too_long_prompts to cut such prompts or leave them out, or give its source "
                "max_prompt_tokens, which leaves longer ones out"
            )

    def _nothing_left(self, name: str, source: Source, report: SourceReport, key: str) -> str:
        if self.num_too_long[name]:
            return (
                f"{key}: each of its {self.num_too_long[name]} prompts has more than "
                f"data.max_prompt_tokens={self._data.max_prompt_tokens} tokens, and "
                "data.too_long_prompts=leave_out leaves none; raise the limit or cut them"
            )
        if isinstance(source, RowSource) and report.num_examples:
            return (
                f"{key}: none of its {report.num_examples} rows is within max_prompt_tokens="
                f"{source.max_prompt_tokens}, min_response_tokens={source.min_response_tokens} and "
                f"max_response_tokens={source.max_response_tokens}; widen them or give other rows"
            )
        refused = report.refused[0]
        return f"{key}: all of its {report.num_rows} rows were refused, the first: {refused}"


def _learned_text(name: str, prompt_id: str, token_ids: Int32Array, finish: Finish) -> Trajectory:
    return Trajectory(
        trajectory_id=name,
        prompt_id=prompt_id,
        author=Author.DATASET,
        token_ids=token_ids,
        num_prompt_tokens=1,
        behaviour_logprobs=np.empty(0, dtype=np.float32),
        temperature=1.0,
        finish=finish,
    )

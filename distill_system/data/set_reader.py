"""Turns the rows of one set into prompts and supervised trajectories.

In: a configured source and the run's tokenizer.  Out: rows with the text that the models read, then
records with token ids.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from distill_system.config.data import EmbeddedTokenizer, RowSource, Source
from distill_system.config.run import RunConfig
from distill_system.data.examples import Example, Message
from distill_system.data.fingerprints import fingerprint_prompt
from distill_system.data.sources import SourceReport, read_examples
from distill_system.errors import DataError
from distill_system.records import Author, Finish, Prompt, Trajectory

ROWS_AT_ONCE = 4096
"""Rows that are rendered and tokenised together."""


class Row(NamedTuple):
    """An example with its id and the text that the models read as its prompt."""

    row_id: str
    text: str
    example: Example


class SetReader:
    """Reads sets with one tokenizer.

    num_out_of_bounds: rows left out of each set so far by the token bounds of its source.
    reports: what was read of each set's source.
    """

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._data = config.data
        self._tokenizer = tokenizer
        self._is_closed_vocabulary = isinstance(config.tokenizer, EmbeddedTokenizer)
        # Some tokenizers put a beginning-of-sequence token before a text, and chat templates often
        # write one themselves. Texts are encoded without special tokens, and this one is added
        # where the tokenizer would add it and the text does not already begin with it.
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        self._start_ids: list[int] = [bos] if adds_bos else []
        self.num_out_of_bounds: dict[str, int] = {}
        self.reports: dict[str, SourceReport] = {}

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
        )
        is_empty = True
        numbered = enumerate(examples)
        while some := list(islice(numbered, ROWS_AT_ONCE)):
            rows = list(self._rendered(name, some, key, report, leave_out))
            if isinstance(source, RowSource):
                rows = self._within_bounds(name, rows, source)
            is_empty = is_empty and not rows
            yield rows
        if is_empty:
            raise DataError(_nothing_left(source, report, key))

    def _rendered(
        self,
        name: str,
        examples: Iterable[tuple[int, Example]],
        key: str,
        report: SourceReport,
        leave_out: bool,
    ) -> Iterator[Row]:
        for index, example in examples:
            try:
                text = self._render(example, key)
            except DataError as error:
                if not leave_out:
                    raise
                report.take_back(error)
            else:
                yield Row(f"{name}:{index}", text, example)

    def prompts(self, name: str, rows: Sequence[Row]) -> tuple[Prompt, ...]:
        """Rows as prompts, with their references."""
        return tuple(
            Prompt(
                prompt_id=row.row_id,
                token_ids=np.array(token_ids, dtype=np.int32),
                text=_readable(row.example.prompt),
                references=row.example.references,
                source=name,
            )
            for row, token_ids in zip(rows, self._prompt_ids(rows), strict=True)
        )

    def prompt_keys(self, rows: Sequence[Row]) -> set[str]:
        """The keys of the rows' prompts in a trajectory store."""
        encoded = self._encode_prompts(rows)
        return {fingerprint_prompt(np.array(ids, dtype=np.int32)) for ids in encoded}

    def trajectories(self, rows: Sequence[Row]) -> tuple[Trajectory, ...]:
        """Rows as supervised trajectories: prompt, answer, end of sequence."""
        answers = self._encode([_answer(row) for row in rows], rows)
        no_logprobs = np.empty(0, dtype=np.float32)
        eos = self._tokenizer.eos_token_id
        return tuple(
            Trajectory(
                trajectory_id=row.row_id,
                prompt_id=row.row_id,
                author=Author.DATASET,
                token_ids=np.array([*prompt_ids, *answer_ids, eos], dtype=np.int32),
                num_prompt_tokens=len(prompt_ids),
                behaviour_logprobs=no_logprobs,
                temperature=1.0,
                finish=Finish.STOP,
            )
            for row, prompt_ids, answer_ids in zip(
                rows, self._prompt_ids(rows), answers, strict=True
            )
        )

    def _within_bounds(self, name: str, rows: list[Row], source: RowSource) -> list[Row]:
        kept = rows
        if source.max_prompt_tokens is not None:
            longest = source.max_prompt_tokens
            lengths = [len(ids) for ids in self._encode_prompts(rows)]
            kept = [row for row, n in zip(rows, lengths, strict=True) if n <= longest]
        if source.bounds_responses:
            shortest = source.min_response_tokens or 0
            longest = source.max_response_tokens or sys.maxsize
            lengths = [len(ids) for ids in self._encode([_answer(row) for row in kept], kept)]
            kept = [row for row, n in zip(kept, lengths, strict=True) if shortest <= n <= longest]
        if len(kept) < len(rows):
            left_out = self.num_out_of_bounds.get(name, 0)
            self.num_out_of_bounds[name] = left_out + len(rows) - len(kept)
        return kept

    def _render(self, example: Example, key: str) -> str:
        prompt = example.prompt
        if isinstance(prompt, str) and not self._is_chat(example):
            return self._data.prompt_template.replace("{prompt}", prompt)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
        return self._render_chat(messages, f"{key}: {example.row}")

    def _is_chat(self, example: Example) -> bool:
        return self._data.use_chat_template or not isinstance(example.prompt, str)

    def _render_chat(self, messages: list[Message], where: str) -> str:
        if self._tokenizer.chat_template is None:
            raise DataError(
                f"{where}: a chat needs a chat template and the tokenizer has none; use rows of "
                "prompt and response with data.use_chat_template=false, or a tokenizer that has one"
            )
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, return_dict=False
            )
        except jinja2.TemplateError as error:
            raise DataError(f"{where}: the chat template refused the messages: {error}") from error
        return text

    def _prompt_ids(self, rows: Sequence[Row]) -> list[list[int]]:
        encoded = self._encode_prompts(rows)
        limit = self._data.max_prompt_tokens
        for row, ids in zip(rows, encoded, strict=True):
            if len(ids) > limit:
                raise DataError(
                    f"prompt {row.row_id!r} ({row.example.row}) has {len(ids)} tokens, more than "
                    f"data.max_prompt_tokens={limit}; raise the key, remove the row, or give its "
                    "source max_prompt_tokens, which leaves longer ones out"
                )
        return encoded

    def _encode_prompts(self, rows: Sequence[Row]) -> list[list[int]]:
        encoded = self._encode([row.text for row in rows], rows)
        for i, (row, ids) in enumerate(zip(rows, encoded, strict=True)):
            if self._start_ids and ids[:1] != self._start_ids and not self._is_chat(row.example):
                encoded[i] = self._start_ids + ids
        return encoded

    def _encode(self, texts: list[str], rows: Sequence[Row]) -> list[list[int]]:
        if not texts:
            return []
        encoded: list[list[int]] = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        if self._is_closed_vocabulary:
            self._check_known(encoded, texts, rows)
        return encoded

    def _check_known(
        self, encoded: Iterable[list[int]], texts: list[str], rows: Sequence[Row]
    ) -> None:
        unknown = self._tokenizer.unk_token_id
        for ids, text, row in zip(encoded, texts, rows, strict=True):
            if unknown in ids:
                raise DataError(
                    f"{row.row_id!r} ({row.example.row}): {text[:80]!r} holds words outside of the "
                    "embedded tasks' vocabulary; use tokenizer.type=train_bpe or pretrained"
                )


def _nothing_left(source: Source, report: SourceReport, key: str) -> str:
    if isinstance(source, RowSource) and report.num_examples:
        return (
            f"{key}: none of its {report.num_examples} rows is within max_prompt_tokens="
            f"{source.max_prompt_tokens}, min_response_tokens={source.min_response_tokens} and "
            f"max_response_tokens={source.max_response_tokens}; widen them or give other rows"
        )
    return f"{key}: all of its {report.num_rows} rows were refused, the first: {report.refused[0]}"


def _answer(row: Row) -> str:
    if row.example.answer is None:
        raise DataError(
            f"{row.row_id!r} ({row.example.row}): a supervised row needs an answer and has none; "
            "remove the row or name the field that holds it"
        )
    return row.example.answer


def _readable(prompt: str | tuple[Message, ...]) -> str:
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)

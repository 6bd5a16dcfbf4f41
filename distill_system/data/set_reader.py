"""Turns the rows of one set into prompts and supervised trajectories.

In: a configured source and the run's tokenizer.  Out: rows with the text that the models read, then
records with token ids.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from distill_system.config.data import EmbeddedTokenizer, RowSource, Source
from distill_system.config.run import RunConfig
from distill_system.config.templates import Piece
from distill_system.data.chats import ChatRenderer, split_tokens
from distill_system.data.encoding import Encoded, Text, TextEncoder
from distill_system.data.examples import Example
from distill_system.data.fingerprints import fingerprint_prompt
from distill_system.data.messages import Messages, message_text
from distill_system.data.shortening import MOST_CHARACTERS, Side, shorten
from distill_system.data.sources import load_examples
from distill_system.errors import DataError
from distill_system.records import Author, Finish, Prompt, Trajectory


class Row(NamedTuple):
    """An example with its id and the text that the models read as its prompt."""

    row_id: str
    prompt: Text
    example: Example
    key: str

    @property
    def text(self) -> str:
        """The prompt as the models read it."""
        return self.prompt.plain

    @property
    def where(self) -> str:
        """Where the row comes from, for messages."""
        return f"{self.key}: {self.example.row}"


class SetReader:
    """Reads sets with one tokenizer.

    stop_token_ids: what ends a response, beside the tokenizer's end of sequence.
    num_out_of_bounds: rows left out of each set so far by the token bounds of its source.
    num_shortened, num_too_long: prompts of each set that were cut, or left out with their rows,
    because they are longer than data.max_prompt_tokens.
    num_unknown: prompts of each set that hold no word that the tokenizer knows.
    num_parted: supervised rows of each set whose answer opens otherwise than their prompt says.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Collection[int] = (),
    ) -> None:
        self._data = config.data
        self._tokenizer = tokenizer
        keeps_text = config.data.control_tokens_in_rows == "text"
        self._encoder = TextEncoder(tokenizer, keeps_text=keeps_text)
        self._chats = ChatRenderer(tokenizer, config.data, self._encoder)
        self._stop_ids = {tokenizer.eos_token_id, *stop_token_ids}
        self._is_closed_vocabulary = isinstance(config.tokenizer, EmbeddedTokenizer)
        # Some tokenizers put a beginning-of-sequence token before a text, and chat templates often
        # write one themselves. Texts are encoded without special tokens, and this one is added
        # where the tokenizer would add it and the text does not already begin with it.
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        self._start_ids: list[int] = [bos] if adds_bos else []
        self.num_out_of_bounds: dict[str, int] = {}
        self.num_shortened: dict[str, int] = {}
        self.num_too_long: dict[str, int] = {}
        self.num_unknown: dict[str, int] = {}
        self.num_parted: dict[str, int] = {}

    def rows(
        self, name: str, source: Source, with_answers: bool, *, key: str | None = None
    ) -> list[Row]:
        """The rendered rows of a set, without those outside the source's token bounds.

        key: configuration key of the source; None: data.<name>.
        """
        key = key or f"data.{name}"
        examples = load_examples(source, self._data, key=key, with_answers=with_answers)
        rows = [
            Row(row_id, self._render(turn, key), turn, key)
            for index, example in enumerate(examples)
            for row_id, turn in _turns(f"{name}:{index}", example)
            if turn.answer is not None or not with_answers or len(example.turns) == 1
        ]
        if isinstance(source, RowSource):
            rows = self._within_bounds(name, rows, source, key)
        return self._within_limit(name, rows, key)

    def notes(self) -> Iterator[str]:
        """What a person should know of the rows read so far, beside num_out_of_bounds."""
        limit, how = self._data.max_prompt_tokens, self._data.too_long_prompts
        for name, count in self.num_too_long.items():
            yield f"data.{name}: {count} rows left out, their prompts have more than {limit} tokens"
        for name, count in self.num_shortened.items():
            side = "beginning" if how == "cut_left" else "end"
            yield f"data.{name}: {count} prompts of more than {limit} tokens cut at the {side}"
        for name, count in self.num_unknown.items():
            yield f"data.{name}: the tokenizer knows no word of {count} prompts"
        for name, count in self.num_parted.items():
            yield (
                f"data.{name}: the answers of {count} rows open otherwise than the chat template's "
                "generation prompt; they are learned from where the two part"
            )

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
        split = self._split(rows)
        for row, (prompt_ids, _) in zip(rows, split, strict=True):
            self._check_length(row, len(prompt_ids))
        self._note_unknown(rows, [prompt_ids for prompt_ids, _ in split])
        return tuple(
            Trajectory(
                trajectory_id=row.row_id,
                prompt_id=row.row_id,
                author=Author.DATASET,
                token_ids=np.array([*prompt_ids, *response_ids], dtype=np.int32),
                num_prompt_tokens=len(prompt_ids),
                behaviour_logprobs=np.empty(0, dtype=np.float32),
                temperature=1.0,
                finish=Finish.STOP,
            )
            for row, (prompt_ids, response_ids) in zip(rows, split, strict=True)
        )

    def _split(self, rows: Sequence[Row]) -> list[tuple[list[int], list[int]]]:
        """The tokens of each row's prompt, and of its response with the token that ends it."""
        split: dict[int, tuple[list[int], list[int]]] = {}
        chats = [at for at, row in enumerate(rows) if self._is_chat(row.example)]
        split.update(zip(chats, self._split_chats([rows[at] for at in chats]), strict=True))
        others = [at for at in range(len(rows)) if at not in split]
        plain = [rows[at] for at in others]
        answers = self._encode([self._answer(row) for row in plain], plain)
        end = self._tokenizer.eos_token_id
        for at, prompt, answer in zip(others, self._encode_prompts(plain), answers, strict=True):
            split[at] = prompt, [*answer.ids, end]
        return [split[at] for at in range(len(rows))]

    def _split_chats(self, rows: Sequence[Row]) -> list[tuple[list[int], list[int]]]:
        for row in rows:
            _require_answer(row)
        whole = [self._chats.conversation(row.example, row.where) for row in rows]
        parted = sum(not each.begins_with_prompt for each in whole)
        if parted:
            self.num_parted[rows[0].row_id.partition(":")[0]] = parted
        encoded = self._encode([each.text for each in whole], rows, with_ends=True)
        asked = self._encode([each.prompt for each in whole], rows)
        split: list[tuple[list[int], list[int]]] = []
        for row, each, tokens, prompt in zip(rows, whole, encoded, asked, strict=True):
            prompt_ids, response_ids = split_tokens(each, tokens, prompt.ids)
            response_ids = self._end(response_ids)
            if not prompt_ids or len(response_ids) < 2:
                raise DataError(
                    f"{row.where}: the chat template writes "
                    f"{'an empty answer' if prompt_ids else 'nothing before the answer'}; give "
                    "another template (data.chat_template) or remove the row"
                )
            split.append((prompt_ids, response_ids))
        return split

    def _end(self, response_ids: list[int]) -> list[int]:
        """A rendered response up to the token that ends it; of that alone if it says nothing.

        Templates put line ends or a second end behind that token, which no model is asked to write.
        Where the template writes no such token, the end of sequence is added: a model must stop.
        """
        behind = len(response_ids)
        while behind > 0 and self._says_nothing(response_ids[behind - 1]):
            behind -= 1
        for at in range(behind, len(response_ids)):
            if response_ids[at] in self._stop_ids:
                return response_ids[: at + 1]
        end: int = self._tokenizer.eos_token_id
        return [*response_ids, end]

    def _says_nothing(self, token_id: int) -> bool:
        return token_id in self._stop_ids or not self._tokenizer.decode([token_id]).strip()

    def _within_bounds(self, name: str, rows: list[Row], source: RowSource, key: str) -> list[Row]:
        kept = rows
        if source.max_prompt_tokens is not None:
            longest = source.max_prompt_tokens
            kept = [row for row, n in self._with_lengths(rows) if n <= longest]
        if source.bounds_responses:
            shortest = source.min_response_tokens or 0
            longest = source.max_response_tokens or sys.maxsize
            lengths = [len(response) - 1 for _, response in self._split(kept)]
            kept = [row for row, n in zip(kept, lengths, strict=True) if shortest <= n <= longest]
        if not kept:
            raise DataError(
                f"{key}: none of its {len(rows)} rows is within max_prompt_tokens="
                f"{source.max_prompt_tokens}, min_response_tokens={source.min_response_tokens} and "
                f"max_response_tokens={source.max_response_tokens}; widen them or give other rows"
            )
        if len(kept) < len(rows):
            self.num_out_of_bounds[name] = len(rows) - len(kept)
        return kept

    def _within_limit(self, name: str, rows: list[Row], key: str) -> list[Row]:
        """The rows without prompts that are too long, or with them cut, as the key says."""
        how, limit = self._data.too_long_prompts, self._data.max_prompt_tokens
        if how == "refuse":
            return rows  # `prompts` and `trajectories` do, for those sets that are asked for
        kept: list[Row] = []
        for row, num_tokens in self._with_lengths(rows):
            if num_tokens <= limit:
                kept.append(row)
            elif how != "leave_out":
                kept.append(self._shorten(row, how))
                self.num_shortened[name] = self.num_shortened.get(name, 0) + 1
        if not kept:
            raise DataError(
                f"{key}: each of its {len(rows)} prompts has more than data.max_prompt_tokens="
                f"{limit} tokens, and data.too_long_prompts=leave_out leaves none; raise the limit "
                "or cut them"
            )
        if len(kept) < len(rows):
            self.num_too_long[name] = len(rows) - len(kept)
        return kept

    def _shorten(self, row: Row, side: Side) -> Row:
        limit = self._data.max_prompt_tokens

        def excess(example: Example) -> int:
            cut = row._replace(example=example, prompt=self._render(example, row.key))
            [(_, num_tokens)] = self._with_lengths([cut])
            return num_tokens - limit

        example = shorten(row.example, side, excess=excess, encoder=self._encoder)
        if example is None:
            raise DataError(
                f"{row.where}: the prompt has more than data.max_prompt_tokens={limit} tokens and "
                f"cannot be cut: without the text that data.too_long_prompts={side} may cut it is "
                "still longer; raise the limit, shorten the template, or remove the row"
            )
        return row._replace(example=example, prompt=self._render(example, row.key))

    def _with_lengths(self, rows: Sequence[Row]) -> Iterator[tuple[Row, int]]:
        """Rows with the tokens of their prompts; more than any limit where that is plain to see."""
        read = [row for row in rows if len(row.text) <= MOST_CHARACTERS]
        lengths = iter([len(ids) for ids in self._encode_prompts(read)])
        for row in rows:
            is_read = len(row.text) <= MOST_CHARACTERS
            yield row, next(lengths) if is_read else len(row.text)

    def _render(self, example: Example, key: str) -> Text:
        where = f"{key}: {example.row}"
        if self._is_chat(example):
            return self._chats.prompt(example, where)
        assert isinstance(example.prompt, str), "any other prompt is a chat"
        written = example.prompt_pieces or (Piece(example.prompt, is_data=True),)
        first, *others = self._data.prompt_template.split("{prompt}")
        pieces = [Piece(first, is_data=False)]
        for other in others:
            pieces += [*written, Piece(other, is_data=False)]
        return self._encoder.from_pieces(pieces, where)

    def _answer(self, row: Row) -> Text:
        answer = _require_answer(row)
        pieces = row.example.answer_pieces or (Piece(answer, is_data=True),)
        return self._encoder.from_pieces(pieces, row.where)

    def _is_chat(self, example: Example) -> bool:
        return self._data.use_chat_template or not isinstance(example.prompt, str)

    def _prompt_ids(self, rows: Sequence[Row]) -> list[list[int]]:
        encoded = self._encode_prompts(rows)
        for row, ids in zip(rows, encoded, strict=True):
            self._check_length(row, len(ids))
        self._note_unknown(rows, encoded)
        return encoded

    def _note_unknown(self, rows: Sequence[Row], prompts: Sequence[list[int]]) -> None:
        """Count prompts of which the tokenizer knows nothing; refuse a set of nothing else."""
        unknown = self._tokenizer.unk_token_id
        suspects = [row for row, ids in zip(rows, prompts, strict=True) if unknown in ids]
        said = self._encode([Text(_readable(row.example.prompt)) for row in suspects], suspects)
        lost = [
            row
            for row, encoded in zip(suspects, said, strict=True)
            if all(i == unknown or not self._tokenizer.decode([i]).strip() for i in encoded.ids)
        ]
        if not lost:
            return
        name = lost[0].row_id.partition(":")[0]
        if len(lost) == len(rows):
            raise DataError(
                f"{lost[0].key}: the tokenizer knows no word of any of its {len(rows)} prompts, "
                f"for example {_readable(lost[0].example.prompt)[:80]!r} ({lost[0].example.row}); "
                "the rows are of another language or script than the tokenizer"
            )
        self.num_unknown[name] = len(lost)

    def _check_length(self, row: Row, num_tokens: int) -> None:
        limit = self._data.max_prompt_tokens
        if num_tokens > limit:
            raise DataError(
                f"prompt {row.row_id!r} ({row.example.row}) has {num_tokens} tokens, more than "
                f"data.max_prompt_tokens={limit}; raise the key, remove the row, set "
                "data.too_long_prompts to cut such prompts or leave them out, or give its source "
                "max_prompt_tokens, which leaves longer ones out"
            )

    def _encode_prompts(self, rows: Sequence[Row]) -> list[list[int]]:
        encoded = [each.ids for each in self._encode([row.prompt for row in rows], rows)]
        for i, (row, ids) in enumerate(zip(rows, encoded, strict=True)):
            if self._start_ids and ids[:1] != self._start_ids and not self._is_chat(row.example):
                encoded[i] = self._start_ids + ids
        return encoded

    def _encode(
        self, texts: Sequence[Text], rows: Sequence[Row], *, with_ends: bool = False
    ) -> list[Encoded]:
        for text, row in zip(texts, rows, strict=True):
            if len(text.plain) > MOST_CHARACTERS:
                raise DataError(
                    f"{row.row_id!r} ({row.example.row}) holds a text of {len(text.plain)} "
                    f"characters, which no model here reads: {MOST_CHARACTERS} are the most; "
                    "shorten or remove the row, give its source max_prompt_tokens, or set "
                    "data.too_long_prompts"
                )
        encoded = self._encoder.encode(texts, with_ends=with_ends)
        if self._is_closed_vocabulary:
            self._check_known(encoded, texts, rows)
        return encoded

    def _check_known(
        self, encoded: Iterable[Encoded], texts: Sequence[Text], rows: Sequence[Row]
    ) -> None:
        unknown = self._tokenizer.unk_token_id
        for each, text, row in zip(encoded, texts, rows, strict=True):
            if unknown in each.ids:
                raise DataError(
                    f"{row.row_id!r} ({row.example.row}): {text.plain[:80]!r} holds words outside "
                    "of the embedded tasks' vocabulary; use tokenizer.type=train_bpe or pretrained"
                )


def _turns(row_id: str, example: Example) -> Iterator[tuple[str, Example]]:
    """The turns of an example with their ids; the last keeps the row's."""
    for number, turn in enumerate(example.earlier, 1):
        yield f"{row_id}.turn_{number}", turn
    yield row_id, example


def _require_answer(row: Row) -> str:
    if row.example.answer is None:
        raise DataError(
            f"{row.row_id!r} ({row.example.row}): a supervised row needs an answer and has none; "
            "remove the row or name the field that holds it"
        )
    return row.example.answer


def _readable(prompt: str | Messages) -> str:
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return message_text(prompt[0])
    return "\n".join(f"{message['role']}: {message_text(message)}" for message in prompt)

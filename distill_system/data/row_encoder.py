"""Rows to the text and the tokens that models read, with one tokenizer.

In: examples, then rows with their rendered prompts.  Out: token ids of prompts, and of the
responses that are learned, with the token that ends them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from distill_system.config.data import EmbeddedTokenizer
from distill_system.config.run import RunConfig
from distill_system.config.templates import Piece, joined
from distill_system.data.chats import ChatRenderer, after_context, split_tokens
from distill_system.data.encoding import Encoded, Text, TextEncoder
from distill_system.data.examples import Example
from distill_system.data.messages import Messages, message_text
from distill_system.data.shortening import MOST_CHARACTERS
from distill_system.errors import DataError


def set_name(row_id: str) -> str:
    """The name of a row's set."""
    return row_id.partition(":")[0]


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
    def name(self) -> str:
        """The name of its set."""
        return set_name(self.row_id)

    @property
    def where(self) -> str:
        """Where the row comes from, for messages."""
        return f"{self.key}: {self.example.row}"


class RowEncoder:
    """Encodes rows with one tokenizer.

    stop_token_ids: what ends a response, beside the tokenizer's end of sequence.
    texts: encodes texts alone.
    parted: ids of rows split so far whose answer opens otherwise than their prompt says.
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
        self.texts = TextEncoder(tokenizer, keeps_text=keeps_text)
        self._chats = ChatRenderer(tokenizer, config.data, self.texts)
        self._stop_ids = {tokenizer.eos_token_id, *stop_token_ids}
        self._is_closed_vocabulary = isinstance(config.tokenizer, EmbeddedTokenizer)
        # Some tokenizers put a beginning-of-sequence token before a text, and chat templates often
        # write one themselves. Texts are encoded without special tokens, and this one is added
        # where the tokenizer would add it and the text does not already begin with it.
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        self._start_ids: list[int] = [bos] if adds_bos else []
        self.parted: set[str] = set()

    def render(self, example: Example, key: str, before: Sequence[Piece] = ()) -> Text:
        """The prompt as the models read it.  key: of the example's source, for messages.

        before: what stands before it if it is plain.
        Raises: DataError if the chat template refuses the example or loses a part of it.
        """
        where = f"{key}: {example.row}"
        if self._is_chat(example):
            return self._chats.prompt(example, where)
        return self.texts.from_pieces([*before, *self._plain_pieces(example)], where)

    def _plain_pieces(self, example: Example) -> list[Piece]:
        assert isinstance(example.prompt, str), "any other prompt is a chat"
        written = example.prompt_pieces or (Piece(example.prompt, is_data=True),)
        first, *others = self._data.prompt_template.split("{prompt}")
        pieces = [Piece(first, is_data=False)]
        for other in others:
            pieces += [*written, Piece(other, is_data=False)]
        return pieces

    def as_teacher_reads(self, row: Row, shown: Sequence[Row], separator: str) -> Row:
        """The row behind its context and behind rows with answers.

        separator: behind each of those in a plain prompt.
        Raises: DataError if a chat stands before a plain prompt; and as `render` does.
        """
        example = row.example
        if self._is_chat(example):
            examples = [each.example for each in shown]
            messages = after_context(example, joined(example.context), examples)
            example = replace(example, prompt=messages)
            return row._replace(example=example, prompt=self.render(example, row.key))
        before = [*example.context]
        for each in shown:
            if self._is_chat(each.example):
                raise DataError(
                    f"{each.where} is a chat and {row.where} a plain prompt: give examples of the "
                    "prompts' form"
                )
            before += [*self._plain_pieces(each.example), *_answer_pieces(each)]
            before.append(Piece(separator, is_data=False))
        return row._replace(prompt=self.render(example, row.key, before))

    def render_plain(self, example: Example, key: str) -> Text:
        """The row's text as it is, without a template.  Raises: DataError for a chat."""
        where = f"{key}: {example.row}"
        if not isinstance(example.prompt, str):
            raise DataError(
                f"{where}: expected a plain text, got a chat. Name the column of a text by "
                f"{key}.fields, for instance {{format: prompt_response, prompt: text}}"
            )
        written = example.prompt_pieces or (Piece(example.prompt, is_data=True),)
        return self.texts.from_pieces(written, where)

    def documents(self, rows: Sequence[Row]) -> list[list[int]]:
        """The tokens of each plain text, with its beginning and the end of sequence."""
        end = self._tokenizer.eos_token_id
        encoded = self._encode([row.prompt for row in rows], rows)
        return [[*self._start(each.ids), *each.ids, end] for each in encoded]

    def prompts(self, rows: Sequence[Row]) -> list[list[int]]:
        """The tokens of each row's prompt.  Raises: DataError for a text of no possible length."""
        encoded = [each.ids for each in self._encode([row.prompt for row in rows], rows)]
        for i, (row, ids) in enumerate(zip(rows, encoded, strict=True)):
            if not self._is_chat(row.example):
                encoded[i] = self._start(ids) + ids
        return encoded

    def _start(self, ids: list[int]) -> list[int]:
        """What the tokenizer puts before a text that does not begin with it already."""
        return [] if ids[:1] == self._start_ids else self._start_ids

    def with_lengths(self, rows: Sequence[Row]) -> Iterator[tuple[Row, int]]:
        """Rows with the tokens of their prompts; more than any limit where that is plain to see."""
        read = [row for row in rows if len(row.text) <= MOST_CHARACTERS]
        lengths = iter([len(ids) for ids in self.prompts(read)])
        for row in rows:
            is_read = len(row.text) <= MOST_CHARACTERS
            yield row, next(lengths) if is_read else len(row.text)

    def split(self, rows: Sequence[Row]) -> list[tuple[list[int], list[int]]]:
        """The tokens of each row's prompt, and of its response with the token that ends it."""
        split: dict[int, tuple[list[int], list[int]]] = {}
        chats = [at for at, row in enumerate(rows) if self._is_chat(row.example)]
        split.update(zip(chats, self._split_chats([rows[at] for at in chats]), strict=True))
        others = [at for at in range(len(rows)) if at not in split]
        plain = [rows[at] for at in others]
        answers = self._encode([self._answer(row) for row in plain], plain)
        end = self._tokenizer.eos_token_id
        for at, prompt, answer in zip(others, self.prompts(plain), answers, strict=True):
            split[at] = prompt, [*answer.ids, end]
        return [split[at] for at in range(len(rows))]

    def check_learnable(self, row: Row) -> None:
        """Raises: DataError for a chat whose answer the template does not render."""
        if self._is_chat(row.example) and row.example.answer is not None:
            self._chats.conversation(row.example, row.where)

    def unknown(self, rows: Sequence[Row], prompts: Sequence[list[int]]) -> list[Row]:
        """Rows of whose prompts the tokenizer knows no word.  prompts: their tokens."""
        unknown = self._tokenizer.unk_token_id
        suspects = [row for row, ids in zip(rows, prompts, strict=True) if unknown in ids]
        said = self._encode([Text(readable(row.example.prompt)) for row in suspects], suspects)
        return [
            row
            for row, encoded in zip(suspects, said, strict=True)
            if all(i == unknown or not self._tokenizer.decode([i]).strip() for i in encoded.ids)
        ]

    def _split_chats(self, rows: Sequence[Row]) -> list[tuple[list[int], list[int]]]:
        for row in rows:
            _require_answer(row)
        whole = [self._chats.conversation(row.example, row.where) for row in rows]
        self.parted.update(
            row.row_id for row, each in zip(rows, whole, strict=True) if not each.begins_with_prompt
        )
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

    def _answer(self, row: Row) -> Text:
        return self.texts.from_pieces(_answer_pieces(row), row.where)

    def _is_chat(self, example: Example) -> bool:
        return self._data.use_chat_template or not isinstance(example.prompt, str)

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
        encoded = self.texts.encode(texts, with_ends=with_ends)
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


def _require_answer(row: Row) -> str:
    if row.example.answer is None:
        raise DataError(
            f"{row.row_id!r} ({row.example.row}): a supervised row needs an answer and has none; "
            "remove the row or name the field that holds it"
        )
    return row.example.answer


def _answer_pieces(row: Row) -> tuple[Piece, ...]:
    answer = _require_answer(row)
    return row.example.answer_pieces or (Piece(answer, is_data=True),)


def readable(prompt: str | Messages) -> str:
    """A prompt as a person reads it."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return message_text(prompt[0])
    return "\n".join(f"{message['role']}: {message_text(message)}" for message in prompt)

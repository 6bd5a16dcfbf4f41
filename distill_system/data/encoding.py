"""Texts to token ids, in which a control token that a row spells stays text.

In: texts of which it is known which parts a template wrote and which a row.  Out: token ids, and
where each token ends in its text.

A tokenizer finds its control tokens (those it calls special: <|im_end|>, </s>) wherever they are
spelled, so that a row could end its own turn. Rows that spell one, and they alone, are encoded by a
copy of the tokenizer whose control tokens have other names: templates are written with those names,
rows with the old ones, which mean nothing to the copy. Everything else of it is the same, so that
the text around is split as it would be without control tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from distill_system.config.templates import Piece, joined
from distill_system.errors import DataError

# Private-use characters: no text has them but one that means to deceive, which is refused.
_FROM_ROW = ("\U0010fff0", "\U0010fff1")
_FROM_TEMPLATE = ("\U0010fff2", "\U0010fff3")
_BATCH = 1024


class Text(NamedTuple):
    """A text for people, and, if the row spells a control token, the form that is encoded."""

    plain: str
    guarded: str | None = None

    @property
    def encoded(self) -> str:
        """The form in which token ends are counted."""
        return self.plain if self.guarded is None else self.guarded


class Encoded(NamedTuple):
    """ids: of the tokens.  ends: the character of `Text.encoded` after which each token ends; empty
    if the tokenizer does not say."""

    ids: list[int]
    ends: list[int]


class TextEncoder:
    """Encodes texts with one tokenizer, without adding special tokens.

    keeps_text: control tokens that rows spell stay text; False: they are control tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, keeps_text: bool = True) -> None:
        self._tokenizer = tokenizer
        special = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
        self._names = sorted(filter(None, special), key=len, reverse=True) if keeps_text else []
        self._spelled = re.compile("|".join(map(re.escape, self._names)) or r"(?!)")

    def spells_control(self, value: object) -> bool:
        """Whether a text of a row, at any depth, spells a control token."""
        return any(self._spelled.search(text) for text in _texts(value))

    def hide(self, value: Any, where: str) -> Any:
        """The value with stand-ins for the control tokens that it spells, for a template to render.

        where: the row, for messages.  Raises: DataError if it holds the stand-ins' characters.
        """
        if isinstance(value, str):
            if any(mark in value for mark in (*_FROM_ROW, *_FROM_TEMPLATE)):
                raise DataError(
                    f"{where}: the row spells a control token and holds a private-use character "
                    "from U+10FFF0 to U+10FFF3, which stands for one here; remove the character"
                )
            return self._spelled.sub(lambda found: self._renamed(found[0], _FROM_ROW), value)
        if isinstance(value, dict):
            return {self.hide(k, where): self.hide(v, where) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.hide(item, where) for item in value)
        return value

    def show(self, rendered: str) -> Text:
        """What a template made of hidden values; the control tokens it spells itself are its."""
        back = re.compile(rf"{_FROM_ROW[0]}(\d+){_FROM_ROW[1]}")
        guarded = self._spelled.sub(lambda found: self._renamed(found[0], _FROM_TEMPLATE), rendered)
        plain, guarded = (
            back.sub(lambda found: self._names[int(found[1])], text) for text in (rendered, guarded)
        )
        return Text(plain, guarded)

    def from_pieces(self, pieces: Sequence[Piece], where: str) -> Text:
        """A text of which a template wrote some pieces and a row the others."""
        if not self.spells_control([piece.text for piece in pieces if piece.is_data]):
            return Text(joined(pieces))
        hidden = (self.hide(p.text, where) if p.is_data else p.text for p in pieces)
        return self.show("".join(hidden))

    def encode(self, texts: Sequence[Text], *, with_ends: bool) -> list[Encoded]:
        """Ids of each text, and the ends of its tokens if they are asked for."""
        encoded: dict[int, Encoded] = {}
        ordinary = [at for at, text in enumerate(texts) if text.guarded is None]
        for start in range(0, len(ordinary), _BATCH):
            batch = ordinary[start : start + _BATCH]
            found = self._encode_ordinary([texts[at].plain for at in batch], with_ends)
            encoded.update(zip(batch, found, strict=True))
        for at, text in enumerate(texts):
            if text.guarded is not None:
                guarded = self._renamed_tokenizer.encode(text.guarded, add_special_tokens=False)
                encoded[at] = Encoded(guarded.ids, [end for _, end in guarded.offsets])
        return [encoded[at] for at in range(len(texts))]

    def _encode_ordinary(self, texts: list[str], with_ends: bool) -> list[Encoded]:
        says_where = with_ends and self._tokenizer.is_fast
        found = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=says_where,
        )
        if not says_where:
            return [Encoded(ids, []) for ids in found["input_ids"]]
        both = zip(found["input_ids"], found["offset_mapping"], strict=True)
        return [Encoded(ids, [end for _, end in spans]) for ids, spans in both]

    def _renamed(self, name: str, marks: tuple[str, str]) -> str:
        return f"{marks[0]}{self._names.index(name)}{marks[1]}"

    @cached_property
    def _renamed_tokenizer(self) -> Tokenizer:
        """The copy whose control tokens have other names."""
        if not self._tokenizer.is_fast:
            raise DataError(
                f"a row spells one of the control tokens {self._names[:8]}, and the tokenizer "
                f"({type(self._tokenizer).__name__}) has no tokenizer.json by which it could stay "
                "text; remove such rows, or set data.control_tokens_in_rows=control"
            )
        tree = json.loads(self._tokenizer.backend_tokenizer.to_str())
        names = {name: self._renamed(name, _FROM_TEMPLATE) for name in self._names}
        for token in tree["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = tree["model"]
        vocabulary = model["vocab"]
        if isinstance(vocabulary, dict):
            model["vocab"] = {names.get(token, token): at for token, at in vocabulary.items()}
        else:
            model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        tree["post_processor"] = None  # adds special tokens, by their old names
        tree["truncation"] = tree["padding"] = None
        renamed = Tokenizer.from_str(json.dumps(tree))
        ids = self._tokenizer.backend_tokenizer.token_to_id
        assert all(renamed.token_to_id(new) == ids(old) for old, new in names.items()), "same ids"
        return renamed


def _texts(value: object) -> Iterable[str]:
    """All texts of a value, keys of mappings included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)

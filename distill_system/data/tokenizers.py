"""The tokenizer of a run: the embedded tasks' own, one trained on its data, or an existing one.

In: the configuration (and texts to train on).  Out: a Hugging Face tokenizer that saves to a
folder from which AutoTokenizer and vLLM load it.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distill_system.config.data import EmbeddedTokenizer, TrainedTokenizer
from distill_system.config.run import RunConfig
from distill_system.data.embedded_families import all_texts
from distill_system.errors import DataError, ModelError

_SPACE = "▁"  # marks a token that follows a space, so that decoding restores the spaces
_EMBEDDED_SPECIAL = ("<pad>", "<eos>", "<sep>", "<unk>")
_TRAINED_SPECIAL = ("<pad>", "<s>", "</s>")
_PUNCTUATION = ".,:;?"


def build_tokenizer(config: RunConfig, texts: Iterable[str] | None) -> PreTrainedTokenizerBase:
    """The tokenizer that both models of a run share, with data.chat_template if that is given.

    config: the run; its `tokenizer` section chooses.
    texts: what tokenizer.type=train_bpe is trained on (see `tokenizer_texts`); ignored by the
        other types.
    Raises: DataError if there is no text to train on; ModelError if an existing tokenizer cannot be
        loaded or has no end-of-sequence token.
    """
    tokenizer = _build(config, texts)
    if config.data.chat_template is not None:
        tokenizer.chat_template = read_template(config.data.chat_template, config.data.directory)
    return tokenizer


def is_template_text(template: str) -> bool:
    """Whether data.chat_template is Jinja text and no file of it."""
    return "{{" in template or "{%" in template


def read_template(template: str, directory: str) -> str:
    """The Jinja text of data.chat_template, which may name a file below data.directory.

    Raises: DataError if it is no Jinja text and there is no such file.
    """
    if is_template_text(template):
        return template
    path = Path(directory, template).absolute()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(
            f"data.chat_template={template!r}: expected Jinja text, or a file of it at {path}: "
            f"{error}; relative paths start from data.directory={directory!r}"
        ) from error


def _build(config: RunConfig, texts: Iterable[str] | None) -> PreTrainedTokenizerBase:
    wanted = config.tokenizer
    if isinstance(wanted, EmbeddedTokenizer):
        return _build_embedded()
    if isinstance(wanted, TrainedTokenizer):
        return _train_byte_level_bpe(wanted.vocab_size, texts)
    if wanted.path is not None:
        return _load_pretrained(wanted.path, "tokenizer.path", trust_remote_code=False)
    teacher = config.teacher
    assert teacher.path is not None, "RunConfig refuses a teacher without path or tokenizer"
    return _load_pretrained(teacher.path, "teacher.path", teacher.trust_remote_code)


def embedded_vocabulary() -> list[str]:
    """Tokens of the embedded tokenizer in the order of their ids, special ones first."""
    slots_removed = re.sub(r"\{\w+\}", " ", " ".join(all_texts()))
    words = {*re.findall("[a-z]+", slots_removed), *string.ascii_lowercase, *string.digits}
    ordinary = {_SPACE + word for word in words} | {*string.digits, *_PUNCTUATION}
    return [*_EMBEDDED_SPECIAL, *sorted(ordinary)]


def _build_embedded() -> PreTrainedTokenizerBase:
    ids = {token: token_id for token_id, token in enumerate(embedded_vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    pieces = Regex(f"{_SPACE}?[a-z]+|{_SPACE}?[0-9]|[{_PUNCTUATION}]")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(_SPACE, prepend_scheme="always", split=False),
            pre_tokenizers.Split(pieces, "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(_SPACE, prepend_scheme="always", split=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        sep_token="<sep>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def _train_byte_level_bpe(vocab_size: int, texts: Iterable[str] | None) -> PreTrainedTokenizerBase:
    corpus = list(texts or ())
    if not corpus:
        raise DataError("tokenizer.type=train_bpe: expected texts to train on, got none")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_TRAINED_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer, length=len(corpus))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def _load_pretrained(path: str, key: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises plain Exception for a broken file
        raise ModelError(
            f"{key}: no tokenizer could be loaded from {path!r} "
            f"({type(error).__name__}: {error}); give a folder with tokenizer.json and "
            "tokenizer_config.json, or the name of a model on the hub"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{key}: the tokenizer of {path!r} has no end-of-sequence token, so no response could "
            "end; set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer

"""Scores of generated text against reference answers: pure functions, texts in, percentages out.

Every score is in percent, 0..100.  N examples; K = 10 sufficient statistics of BLEU: hypothesis
length, reference length, matched n-grams of order 1..4, n-grams of order 1..4.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from rouge_score.scoring import fmeasure
from rouge_score.tokenizers import DefaultTokenizer
from sacrebleu.metrics.bleu import BLEU

from distill_system.config.evaluation import BleuConfig, RougeTokenizer
from distill_system.errors import ConfigError
from distill_system.standard_errors import FloatArray

_DEFAULT_BLEU = BleuConfig()


class Direction(IntEnum):
    """Which way a metric is better; times it, more is better."""

    HIGHER = 1
    LOWER = -1
    NEITHER = 0


class UnicodeWordTokenizer:
    """Lower-cased runs of letters, digits and combining marks; the rest separates words.

    rouge_score's own tokenizer keeps [a-z0-9] alone: it cuts "läuft" into "l" and "uft" and drops
    Greek, Cyrillic or Arabic text altogether, so that such answers score 0.  On ASCII text the two
    give the same words.  Punctuation is dropped by both, as in the first ROUGE.
    """

    def tokenize(self, text: str) -> list[str]:
        """The words of a text, in order."""
        # NFC after lower(): lower-casing may itself leave a letter and a combining mark apart.
        composed = unicodedata.normalize("NFC", text.lower())
        return "".join(c if unicodedata.category(c)[0] in "LNM" else " " for c in composed).split()


class CharacterTokenizer:
    """The characters of the words, each with the combining marks on it.

    everywhere: False cuts only scripts written without spaces (SPACELESS) into characters, and
    leaves the words of others whole.
    """

    def __init__(self, *, everywhere: bool) -> None:
        self._everywhere = everywhere

    def tokenize(self, text: str) -> list[str]:
        """The characters and words of a text, in order."""
        words = UnicodeWordTokenizer().tokenize(text)
        if not self._everywhere and not _SPACELESS_CHARACTER.search(text):
            return words
        return [token for word in words for token in self._cut(word)]

    def _cut(self, word: str) -> list[str]:
        tokens: list[str] = []
        alone = True  # whether the last token may not grow by a letter
        for character in word:
            is_mark = unicodedata.category(character)[0] == "M"
            cut = self._everywhere or _SPACELESS_CHARACTER.match(character) is not None
            if tokens and (is_mark or not (cut or alone)):
                tokens[-1] += character
            else:
                tokens.append(character)
            if not is_mark:
                alone = cut
        return tokens


class StemTokenizer:
    """rouge_score's own Porter stems of ASCII words, and what it drops of other scripts.

    A text in a script without spaces gives its characters beside the stems; a text in which neither
    is found gives its words. Otherwise the tokens are rouge_score's to the letter.
    """

    def __init__(self) -> None:
        self._stems = DefaultTokenizer(use_stemmer=True)
        self._characters = CharacterTokenizer(everywhere=False)

    def tokenize(self, text: str) -> list[str]:
        """The stems, or characters, of a text, in order."""
        tokens: list[str] = []
        for piece in _SPACELESS_RUN.split(text):
            is_spaceless = _SPACELESS_CHARACTER.match(piece) is not None
            tokens += (self._characters if is_spaceless else self._stems).tokenize(piece)
        return tokens or UnicodeWordTokenizer().tokenize(text)


SPACELESS = (
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3031-\u303b\u3400-\u4dbf\u4e00-\u9fff"  # Han
    "\uf900-\ufaff\U00020000-\U0003ffff\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Han, Japanese
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff"
    # Thai and Lao; Tibetan; Burmese; Khmer
)
"""Scripts written without spaces between words, as ranges of a regular expression's class."""
_SPACELESS_CHARACTER = re.compile(f"[{SPACELESS}]")
_SPACELESS_RUN = re.compile(f"([{SPACELESS}]+)")

_WORD_TOKENIZERS: dict[str, Any] = {
    "auto": CharacterTokenizer(everywhere=False),
    "words": UnicodeWordTokenizer(),
    "characters": CharacterTokenizer(everywhere=True),
}
_STEM_TOKENIZERS: dict[str, Any] = {
    "auto": StemTokenizer(),
    "words": DefaultTokenizer(use_stemmer=True),
    "characters": CharacterTokenizer(everywhere=True),
}

_YES_NO_WORD = re.compile(r"\b(yes|no|true|false)\b", re.IGNORECASE)
# A mark has to follow: "No wings, so yes" does not begin with its answer.
_ANSWER_FIRST = re.compile(r"\W*(yes|no|true|false)\s*(?:[^\w\s]|$)", re.IGNORECASE)
_STATED_ANSWER = re.compile(r"\banswer(?: is|:)\W*(yes|no|true|false)\b", re.IGNORECASE)


def exact_match(text: str, references: Sequence[str]) -> float:
    """100 if the text equals any reference, white space at both ends aside; else 0."""
    stripped = text.strip()
    return 100.0 if any(stripped == reference.strip() for reference in references) else 0.0


def rouge_l(text: str, references: Sequence[str], tokenizer: RougeTokenizer = "auto") -> float:
    """ROUGE-L F1 in percent against the best reference, over unicode words.

    Source: Lin 2004, as rouge_score has it.  Differs: the tokenizer (see CharacterTokenizer).
    """
    return 100.0 * _best_rouge_l(text, references, _WORD_TOKENIZERS[tokenizer].tokenize)


def rouge_l_stemmed(
    text: str, references: Sequence[str], tokenizer: RougeTokenizer = "auto"
) -> float:
    """ROUGE-L F1 in percent against the best reference, over Porter stems of ASCII words.

    Source: rouge_score with its own tokenizer and use_stemmer=True, the score that MiniLLM
    (arXiv 2306.08543) and DistiLLM (arXiv 2402.03898) report. Differs: nothing on texts in which it
    finds a word and no script without spaces (see StemTokenizer).
    """
    return 100.0 * _best_rouge_l(text, references, _STEM_TOKENIZERS[tokenizer].tokenize)


def _best_rouge_l(
    text: str, references: Sequence[str], tokenize: Callable[[str], list[str]]
) -> float:
    words = tokenize(text)
    return max(_rouge_l(words, tokenize(reference)) for reference in references)


def _rouge_l(words: Sequence[str], reference: Sequence[str]) -> float:
    if not words or not reference:
        return 0.0
    common = longest_common_subsequence(words, reference)
    return float(fmeasure(common / len(words), common / len(reference)))


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Words of the longest sequence that both hold in order, with others between.

    rouge_score fills a table of len(first) x len(second) in Python, half a second for two texts of
    a thousand words. Here a row of it is the bits of one whole number.
    Source: Hyyrö 2004, "Bit-parallel LCS-length computation revisited".
    """
    places: dict[str, int] = {}
    for at, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << at
    every = (1 << len(first)) - 1
    row = every  # a zero bit where the length grows from one word of `first` to the next
    for word in second:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & every
    return len(first) - row.bit_count()


def yes_no_answer(text: str) -> bool | None:
    """The yes (True) or no (False) that a response comes to; None if it says neither.

    The last "answer is ..." or "answer: ..." counts; without one a yes or no that begins the text
    and is set off by a mark, else the last such word. "True" and "false" mean the same; case does
    not matter.
    """
    stated = _STATED_ANSWER.findall(text)
    words = _YES_NO_WORD.findall(text)
    if not words:
        return None
    first = _ANSWER_FIRST.match(text)
    said = stated[-1] if stated else first[1] if first else words[-1]
    return said.lower() in ("yes", "true")


def accuracy(text: str, references: Sequence[str]) -> float:
    """100 if the response comes to the yes or no of a reference (see yes_no_answer); else 0."""
    said = yes_no_answer(text)
    right = {yes_no_answer(reference) for reference in references} - {None}
    return 100.0 if said in right else 0.0


def build_bleu(config: BleuConfig) -> BLEU:
    """sacrebleu's scorer with these settings.

    Raises: ConfigError if the tokenizer needs a package that is not installed.
    """
    try:
        return BLEU(
            lowercase=config.lowercase,
            force=True,  # only silences a warning about text that looks tokenised
            tokenize="13a" if config.tokenizer == "auto" else config.tokenizer,
            smooth_method=config.smoothing,
            smooth_value=config.smoothing_value,
        )
    except Exception as error:  # sacrebleu raises RuntimeError, its tokenizers what MeCab raises
        raise ConfigError(
            f"evaluation.bleu.tokenizer={config.tokenizer!r} cannot be used: "
            f"{' '.join(str(error).split())} Install what it needs (sacrebleu[ja], sacrebleu[ko]) "
            "or take char"
        ) from error


def bleu_statistics(
    texts: Sequence[str], references: Sequence[Sequence[str]], config: BleuConfig = _DEFAULT_BLEU
) -> FloatArray:
    """What each example adds to the sums that BLEU is computed from.

    texts: N hypotheses.
    references: for each its accepted answers, one or more; their number may vary.
    config: tokenizer and case; auto looks at all references together.
    Returns: float64 [N, 10] of whole numbers.
    """
    tokenizer = config.tokenizer
    if tokenizer == "auto" and _is_spaceless("".join(chain.from_iterable(references))):
        tokenizer = "char"
    # Smoothing writes into the counts; it is done once, over the sums.
    bleu = build_bleu(BleuConfig(tokenizer=tokenizer, lowercase=config.lowercase, smoothing="none"))
    rows = []
    for text, accepted in zip(texts, references, strict=True):
        # A corpus of one sentence: sacrebleu's reference streams then need no padding with None.
        score = bleu.corpus_score([text], [[reference] for reference in accepted])
        rows.append([score.sys_len, score.ref_len, *score.counts, *score.totals])
    return np.array(rows, dtype=np.float64)


def _is_spaceless(text: str) -> bool:
    """Whether most letters of a text belong to scripts written without spaces."""
    letters = sum(map(str.isalpha, text))
    return 2 * len(_SPACELESS_CHARACTER.findall(text)) > letters


def bleu_from_sums(sums_K: FloatArray, config: BleuConfig = _DEFAULT_BLEU) -> float:
    """Corpus BLEU in percent from the float64 [10] sums of bleu_statistics over its examples.

    Source: sacrebleu (orders 1..4; by default exponential smoothing of empty orders).
    """
    sums = [round(value) for value in sums_K.tolist()]
    score = BLEU.compute_bleu(
        correct=sums[2:6],
        total=sums[6:],
        sys_len=sums[0],
        ref_len=sums[1],
        smooth_method=config.smoothing,
        smooth_value=config.smoothing_value,
    )
    return float(score.score)


def scores_of_texts(
    tokenizer: RougeTokenizer = "auto",
) -> dict[str, Callable[[str, Sequence[str]], float]]:
    """Each score that one text has against its references: name -> (text, references) -> percent.

    tokenizer: of both forms of ROUGE-L.
    """
    return {
        "exact_match": exact_match,
        "rouge_l": partial(rouge_l, tokenizer=tokenizer),
        "rouge_l_stemmed": partial(rouge_l_stemmed, tokenizer=tokenizer),
        "accuracy": accuracy,
    }


METRICS: dict[str, Direction] = {
    "exact_match": Direction.HIGHER,
    "rouge_l": Direction.HIGHER,
    "rouge_l_stemmed": Direction.HIGHER,
    "accuracy": Direction.HIGHER,
    "bleu": Direction.HIGHER,
    "mean_length": Direction.NEITHER,
    "ended_share": Direction.NEITHER,
}
"""Which way each metric is better, those of evaluation.metrics first."""

"""Scores of generated text against reference answers: pure functions, texts in, percentages out.

Every score is in percent, 0..100.  N examples; K = 10 sufficient statistics of BLEU: hypothesis
length, reference length, matched n-grams of order 1..4, n-grams of order 1..4.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from rouge_score.scoring import fmeasure
from rouge_score.tokenizers import DefaultTokenizer
from sacrebleu.metrics.bleu import BLEU

from distill_system.standard_errors import FloatArray


class Direction(IntEnum):
    """Which way a metric is better; times it, more is better."""

    HIGHER = 1
    LOWER = -1
    NEITHER = 0


class UnicodeWordTokenizer:
    """Lower-cased runs of letters, digits and combining marks; the rest separates words.

    rouge_score's own tokenizer keeps [a-z0-9] alone: it cuts "läuft" into "l" and "uft" and drops
    Greek, Cyrillic or Arabic text altogether, so that such answers score 0.  On ASCII text the two
    give the same words.  Punctuation is dropped by both, as in the first ROUGE.  Scripts written
    without spaces (Chinese, Japanese, Thai) come out as one word per run; use BLEU's character
    tokenizers or exact match there.
    """

    def tokenize(self, text: str) -> list[str]:
        """The words of a text, in order."""
        # NFC after lower(): lower-casing may itself leave a letter and a combining mark apart.
        composed = unicodedata.normalize("NFC", text.lower())
        return "".join(c if unicodedata.category(c)[0] in "LNM" else " " for c in composed).split()


_UNICODE_WORDS = UnicodeWordTokenizer().tokenize
_STEMS = DefaultTokenizer(use_stemmer=True).tokenize
# force only silences a warning about text that looks tokenised; the score is the same.
_BLEU = BLEU(force=True)

_YES_NO_WORD = re.compile(r"\b(yes|no|true|false)\b", re.IGNORECASE)
# A mark has to follow: "No wings, so yes" does not begin with its answer.
_ANSWER_FIRST = re.compile(r"\W*(yes|no|true|false)\s*(?:[^\w\s]|$)", re.IGNORECASE)
_STATED_ANSWER = re.compile(r"\banswer(?: is|:)\W*(yes|no|true|false)\b", re.IGNORECASE)


def exact_match(text: str, references: Sequence[str]) -> float:
    """100 if the text equals any reference, white space at both ends aside; else 0."""
    stripped = text.strip()
    return 100.0 if any(stripped == reference.strip() for reference in references) else 0.0


def rouge_l(text: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 in percent against the best reference, over unicode words.

    Source: Lin 2004, as rouge_score has it.  Differs: the tokenizer (see UnicodeWordTokenizer).
    """
    return 100.0 * _best_rouge_l(text, references, _UNICODE_WORDS)


def rouge_l_stemmed(text: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 in percent against the best reference, over Porter stems of ASCII words.

    Source: rouge_score with its own tokenizer and use_stemmer=True, the score that MiniLLM
    (arXiv 2306.08543) and DistiLLM (arXiv 2402.03898) report. Differs: nothing.
    """
    return 100.0 * _best_rouge_l(text, references, _STEMS)


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


def bleu_statistics(texts: Sequence[str], references: Sequence[Sequence[str]]) -> FloatArray:
    """What each example adds to the sums that BLEU is computed from.

    Args:
        texts: N hypotheses.
        references: for each its accepted answers, one or more; their number may vary.

    Returns:
        float64 [N, 10] of whole numbers.  Words by sacrebleu's 13a tokenizer, case kept.
    """
    rows = []
    for text, accepted in zip(texts, references, strict=True):
        # A corpus of one sentence: sacrebleu's reference streams then need no padding with None.
        score = _BLEU.corpus_score([text], [[reference] for reference in accepted])
        rows.append([score.sys_len, score.ref_len, *score.counts, *score.totals])
    return np.array(rows, dtype=np.float64)


def bleu_from_sums(sums_K: FloatArray) -> float:
    """Corpus BLEU in percent from the float64 [10] sums of bleu_statistics over its examples.

    Source: sacrebleu's defaults (orders 1..4, 13a, exponential smoothing of empty orders).
    """
    sums = [round(value) for value in sums_K.tolist()]
    score = BLEU.compute_bleu(
        correct=sums[2:6], total=sums[6:], sys_len=sums[0], ref_len=sums[1], smooth_method="exp"
    )
    return float(score.score)


@dataclass(frozen=True, slots=True)
class Metric:
    """One thing that an evaluation measures of generations.

    per_text: (text, references) -> the score of one example in percent; None where it is not made
    of the text alone: of a whole corpus, or of a response's tokens.
    """

    direction: Direction
    per_text: Callable[[str, Sequence[str]], float] | None = None


METRICS: dict[str, Metric] = {
    "exact_match": Metric(Direction.HIGHER, exact_match),
    "rouge_l": Metric(Direction.HIGHER, rouge_l),
    "rouge_l_stemmed": Metric(Direction.HIGHER, rouge_l_stemmed),
    "accuracy": Metric(Direction.HIGHER, accuracy),
    "bleu": Metric(Direction.HIGHER),
    "mean_length": Metric(Direction.NEITHER),
    "ended_share": Metric(Direction.NEITHER),
}
"""All metrics by name, those of evaluation.metrics first."""

"""Configuration of the evaluation: which scores, and the settings of their scorers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from distill_system.config.base import ConfigModel

MetricName = Literal["exact_match", "rouge_l", "rouge_l_stemmed", "bleu", "accuracy"]
RougeTokenizer = Literal["auto", "words", "characters"]

DECODING_NAMES = ("greedy", "sampled")
"""Every score is of generations at temperature 0, and of some at temperature 1."""
LENGTH_METRICS = ("mean_length", "ended_share")
"""Measured on every split, with references or without."""
HELD_OUT_MEASURES = (
    *("on_policy_distance", "off_policy_distance", "cross_entropy", "forward_kl"),
    *("logprob_gap", "max_logprob_gap", "top_token_overlap"),
)
"""What is measured on data.held_out, each as held_out/<name>."""


class RougeConfig(ConfigModel):
    """Settings of both forms of ROUGE-L."""

    tokenizer: RougeTokenizer = "auto"
    """auto: words, and characters of scripts written without spaces (Chinese, Japanese, Thai, Lao,
    Khmer, Burmese, Tibetan). words: what stands between spaces. characters: each letter and digit
    of every script."""


class BleuConfig(ConfigModel):
    """Settings of sacrebleu's BLEU."""

    tokenizer: Literal["auto", "13a", "intl", "zh", "char", "ja-mecab", "ko-mecab", "none"] = "auto"
    """sacrebleu's tokenizer of that name; auto: char for a split whose references are mostly in
    scripts written without spaces, else 13a. 13a and intl are for languages with spaces; zh cuts
    Chinese, char everything into characters; ja-mecab and ko-mecab need MeCab (sacrebleu[ja],
    sacrebleu[ko])."""
    lowercase: bool = False
    """Whether case is ignored."""
    smoothing: Literal["exp", "floor", "add-k", "none"] = "exp"
    """What counts for an order of n-grams of which none matches."""
    smoothing_value: NonNegativeFloat | None = None
    """The value of floor (null: 0.1) or add-k (null: 1)."""

    @model_validator(mode="after")
    def _check(self) -> BleuConfig:
        if self.smoothing_value is not None and self.smoothing not in ("floor", "add-k"):
            raise ValueError(
                "smoothing_value has a meaning with smoothing=floor and smoothing=add-k alone: "
                f"expected null, got {self.smoothing_value} with smoothing={self.smoothing}"
            )
        return self


class EvaluationConfig(ConfigModel):
    """How generations are scored."""

    metrics: Annotated[tuple[MetricName, ...], Field(min_length=1)] = ("exact_match", "rouge_l")
    """Scores of every split, for greedy and for sampled generations; at least one."""
    rouge: RougeConfig = RougeConfig()
    bleu: BleuConfig = BleuConfig()
    num_examples_during: PositiveInt = 100
    """Examples per split of an evaluation during training; before and after use all."""
    num_shown: NonNegativeInt = 6
    """Generations per split that the report shows side by side."""

    def names(self, split: str) -> list[str]:
        """The names of the split's scores, as in docs/metrics.md."""
        return [
            f"evaluation/{split}/{metric}_{decoding}"
            for metric in (*self.metrics, *LENGTH_METRICS)
            for decoding in DECODING_NAMES
        ]

"""Prompts by split in; out the scores of greedy and sampled generations, per example too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product, zip_longest
from typing import TypeAlias

from distill_system.config.evaluation import (
    DECODING_NAMES,
    LENGTH_METRICS,
    BleuConfig,
    EvaluationConfig,
    MetricName,
    RougeConfig,
)
from distill_system.errors import DataError, RecordError
from distill_system.evaluation.scores import (
    bleu_from_sums,
    bleu_statistics,
    build_bleu,
    scores_of_texts,
    yes_no_answer,
)
from distill_system.records import Finish, Prompt, Trajectory
from distill_system.standard_errors import (
    bootstrap_replicates,
    bootstrap_standard_error,
    standard_error,
)

_ROUGE, _BLEU = RougeConfig(), BleuConfig()

Generate: TypeAlias = Callable[[Sequence[Prompt], float, str], Sequence[Trajectory]]
Decode: TypeAlias = Callable[[Sequence[int]], str]

DECODINGS: dict[str, float] = dict(zip(DECODING_NAMES, (0.0, 1.0), strict=True))
"""Name of each decoding -> its temperature."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A score and its standard error, both in the score's unit; None for a single example."""

    mean: float
    stderr: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownGeneration:
    """One prompt with its references and generations, for people to read."""

    prompt: str
    references: tuple[str, ...]
    greedy: str
    sampled: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitEvaluation:
    """Scores of one split; its JSON form goes into the run's evaluations/<label>.json.

    scores: `<metric>_<decoding>` -> estimate; the metrics and ended_share in percent,
    mean_length in response tokens (the end-of-sequence token included).
    prompt_ids: [N], the order of all values per example.
    per_example: same names -> [N] values; without bleu, which has no value per example.
    bootstrap: `bleu_<decoding>` -> [R] replicates; replicate r of any two evaluations of the same
    prompt_ids drew the same examples.
    """

    num_examples: int
    scores: dict[str, Estimate]
    prompt_ids: tuple[str, ...]
    per_example: dict[str, tuple[float, ...]]
    bootstrap: dict[str, tuple[float, ...]] = field(default_factory=dict)
    shown: tuple[ShownGeneration, ...] = ()

    def to_json(self) -> dict[str, object]:
        """All fields as a dictionary that json.dumps takes."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Scorers:
    """of_texts: name -> (text, references) -> percent.  bleu: its settings."""

    of_texts: Mapping[str, Callable[[str, Sequence[str]], float]]
    bleu: BleuConfig


@dataclass(frozen=True, slots=True)
class _Generation:
    text: str
    num_tokens: int
    ended: bool


def check_evaluation(
    config: EvaluationConfig,
    splits: Mapping[str, Sequence[Prompt]],
    places: Mapping[str, str] | None = None,
) -> None:
    """Refuse what could not be scored, before any text is written.

    config: metrics and scorers.
    splits: name -> prompts.
    places: prompt id -> file and row that it was read from, for messages.
    Raises: DataError if a split is empty, only some of its prompts have references, or accuracy is
        asked for and a reference says neither yes nor no; ConfigError if a scorer needs a package
        that is not installed.
    """
    if "bleu" in config.metrics:
        build_bleu(config.bleu)
    for name, prompts in splits.items():
        _check_split(name, prompts, places or {})
        if "accuracy" in config.metrics:
            _check_yes_no(name, prompts, places or {})


def evaluate_splits(
    splits: Mapping[str, Sequence[Prompt]],
    generate: Generate,
    decode: Decode,
    metrics: Sequence[MetricName],
    num_shown: int,
    *,
    rouge: RougeConfig = _ROUGE,
    bleu: BleuConfig = _BLEU,
) -> dict[str, SplitEvaluation]:
    """Generate for all splits together, greedily and by sampling, and score each split.

    splits: name -> prompts, as check_evaluation takes them.  A split without references gets
        only lengths and ended share.
    generate: (prompts, temperature, label) -> one trajectory per prompt, in order; called once
        per decoding with the prompts of all splits, since one large batch is fastest.
    decode: token ids [T] -> text without special tokens.
    metrics: which scores.
    num_shown: generations kept per split for people to read.
    rouge, bleu: settings of the scorers.
    Raises: DataError, as check_evaluation does; RecordError if generate returned other prompts than
        it was given.
    """
    for name, prompts in splits.items():
        _check_split(name, prompts, {})
        if "accuracy" in metrics:
            _check_yes_no(name, prompts, {})
    everything = [prompt for prompts in splits.values() for prompt in prompts]
    generations = {
        label: _generate(everything, generate, decode, label=label, temperature=temperature)
        for label, temperature in DECODINGS.items()
    }
    scorers = _Scorers(scores_of_texts(rouge.tokenizer), bleu)
    evaluations, start = {}, 0
    for name, prompts in splits.items():
        stop = start + len(prompts)
        rows = {label: generations[label][start:stop] for label in DECODINGS}
        evaluations[name] = _evaluate_split(prompts, rows, metrics, num_shown, scorers)
        start = stop
    return evaluations


def _check_split(name: str, prompts: Sequence[Prompt], places: Mapping[str, str]) -> None:
    if not prompts:
        raise DataError(f"evaluation split {name!r}: expected at least one prompt, got none")
    without = [prompt.prompt_id for prompt in prompts if not prompt.references]
    if without and len(without) < len(prompts):
        raise DataError(
            f"evaluation split {name!r}: expected references for every prompt or for none, but "
            f"{len(without)} of {len(prompts)} have none, the first {_say(without[0], places)}; "
            "fill them in or move those rows to a split of their own"
        )


def _check_yes_no(name: str, prompts: Sequence[Prompt], places: Mapping[str, str]) -> None:
    for prompt in prompts:
        for reference in prompt.references:
            if yes_no_answer(reference) is None:
                raise DataError(
                    f"evaluation split {name!r}: accuracy needs references that say yes or no, "
                    f"{_say(prompt.prompt_id, places)} has {reference[:80]!r}; take accuracy out "
                    "of evaluation.metrics, or name another field"
                )


def _say(prompt_id: str, places: Mapping[str, str]) -> str:
    place = places.get(prompt_id)
    return f"{prompt_id!r} ({place})" if place else repr(prompt_id)


def _generate(
    prompts: Sequence[Prompt], generate: Generate, decode: Decode, *, label: str, temperature: float
) -> list[_Generation]:
    trajectories = generate(prompts, temperature, label)
    given = [prompt.prompt_id for prompt in prompts]
    actual = [trajectory.prompt_id for trajectory in trajectories]
    if given != actual:
        pairs = enumerate(zip_longest(given, actual))
        position = next(position for position, (wanted, got) in pairs if wanted != got)
        raise RecordError(
            f"{label} evaluation: expected one trajectory per prompt in the order given, "
            f"{len(given)} in all, got {len(actual)}; they differ from position {position} on"
        )
    return [
        _Generation(
            text=decode(trajectory.response_ids.tolist()),
            num_tokens=trajectory.num_response_tokens,
            ended=trajectory.finish is Finish.STOP,
        )
        for trajectory in trajectories
    ]


def _evaluate_split(
    prompts: Sequence[Prompt],
    generations: Mapping[str, Sequence[_Generation]],
    metrics: Sequence[MetricName],
    num_shown: int,
    scorers: _Scorers,
) -> SplitEvaluation:
    per_example: dict[str, tuple[float, ...]] = {}
    bootstrap: dict[str, tuple[float, ...]] = {}
    scores: dict[str, Estimate] = {}
    asked = [*metrics, *LENGTH_METRICS] if prompts[0].references else LENGTH_METRICS
    for metric, label in product(asked, DECODINGS):
        name, rows = f"{metric}_{label}", generations[label]
        if metric == "bleu":
            scores[name], bootstrap[name] = _bleu(prompts, rows, scorers.bleu)
        else:
            per_example[name] = _score_each(metric, prompts, rows, scorers)
            scores[name] = _mean(per_example[name])
    return SplitEvaluation(
        num_examples=len(prompts),
        scores=scores,
        prompt_ids=tuple(prompt.prompt_id for prompt in prompts),
        per_example=per_example,
        bootstrap=bootstrap,
        shown=_shown(prompts[:num_shown], generations),
    )


def _score_each(
    metric: str, prompts: Sequence[Prompt], rows: Sequence[_Generation], scorers: _Scorers
) -> tuple[float, ...]:
    if metric == "mean_length":
        return tuple(float(row.num_tokens) for row in rows)
    if metric == "ended_share":
        return tuple(100.0 * row.ended for row in rows)
    score = scorers.of_texts[metric]
    return tuple(score(row.text, p.references) for p, row in zip(prompts, rows, strict=True))


def _bleu(
    prompts: Sequence[Prompt], rows: Sequence[_Generation], config: BleuConfig
) -> tuple[Estimate, tuple[float, ...]]:
    texts = [row.text for row in rows]
    statistics_NK = bleu_statistics(texts, [prompt.references for prompt in prompts], config)
    from_sums = partial(bleu_from_sums, config=config)
    replicates = bootstrap_replicates(statistics_NK, from_sums)
    # Every resample of a single example is that example: a spread of 0 would mean nothing.
    stderr = bootstrap_standard_error(replicates.tolist()) if len(prompts) > 1 else None
    estimate = Estimate(mean=from_sums(statistics_NK.sum(axis=0)), stderr=stderr)
    # Four decimals of a percentage suffice for standard errors; the file is a third as big.
    return estimate, tuple(replicates.round(4).tolist())


def _mean(values: Sequence[float]) -> Estimate:
    return Estimate(mean=sum(values) / len(values), stderr=standard_error(values))


def _shown(
    prompts: Sequence[Prompt], generations: Mapping[str, Sequence[_Generation]]
) -> tuple[ShownGeneration, ...]:
    return tuple(
        ShownGeneration(
            prompt=prompt.text,
            references=prompt.references,
            greedy=generations["greedy"][index].text,
            sampled=generations["sampled"][index].text,
        )
        for index, prompt in enumerate(prompts)
    )

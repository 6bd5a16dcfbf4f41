import json
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU

from distill_system.config.evaluation import (
    BleuConfig,
    EvaluationConfig,
    MetricName,
    RougeConfig,
)
from distill_system.errors import ConfigError, DataError, RecordError
from distill_system.evaluation.evaluate import SplitEvaluation, check_evaluation, evaluate_splits
from distill_system.records import Author, Finish, Prompt, Trajectory

TEXTS = {1: "red", 2: "green", 3: "blue"}
END = 9


def decode(token_ids: Sequence[int]) -> str:
    return " ".join(TEXTS[token] for token in token_ids if token != END)


def build_prompt(prompt_id: str, *references: str) -> Prompt:
    ids = np.array([7, 8], dtype=np.int32)
    return Prompt(
        prompt_id=prompt_id, token_ids=ids, text=f"ask {prompt_id}", references=references
    )


def build_trajectory(prompt: Prompt, response: list[int], temperature: float) -> Trajectory:
    return Trajectory(
        trajectory_id=f"t-{prompt.prompt_id}",
        prompt_id=prompt.prompt_id,
        author=Author.STUDENT,
        token_ids=np.concatenate([prompt.token_ids, np.array(response, dtype=np.int32)]),
        num_prompt_tokens=2,
        behaviour_logprobs=np.zeros(len(response), dtype=np.float32),
        temperature=temperature,
        finish=Finish.STOP if response[-1] == END else Finish.LENGTH,
    )


class ScriptedGenerator:
    """Answers by prompt id, and remembers what it was asked."""

    def __init__(self, greedy: dict[str, list[int]], sampled: dict[str, list[int]]) -> None:
        self._responses = {0.0: greedy, 1.0: sampled}
        self.calls: list[tuple[list[str], float, str]] = []

    def __call__(
        self, prompts: Sequence[Prompt], temperature: float, label: str
    ) -> list[Trajectory]:
        self.calls.append(([prompt.prompt_id for prompt in prompts], temperature, label))
        responses = self._responses[temperature]
        return [build_trajectory(p, responses[p.prompt_id], temperature) for p in prompts]


SPLITS = {
    "near": [build_prompt("a", "red green"), build_prompt("b", "blue", "green")],
    "bare": [build_prompt("c")],
}
GREEDY = {"a": [1, 2, END], "b": [3, END], "c": [1, 1, 1, 1]}
SAMPLED = {"a": [1, 3, END], "b": [2, END], "c": [2, END]}


def evaluate() -> tuple[dict[str, SplitEvaluation], ScriptedGenerator]:
    generator = ScriptedGenerator(GREEDY, SAMPLED)
    metrics: tuple[MetricName, ...] = ("exact_match", "rouge_l", "bleu")
    return evaluate_splits(SPLITS, generator, decode, metrics, 1), generator


def test_each_decoding_generates_once_for_all_splits_together() -> None:
    _, generator = evaluate()
    assert generator.calls == [
        (["a", "b", "c"], 0.0, "greedy"),
        (["a", "b", "c"], 1.0, "sampled"),
    ]


def test_scores_lengths_and_ends_by_hand() -> None:
    near = evaluate()[0]["near"]
    means = {name: score.mean for name, score in near.scores.items()}
    assert near.num_examples == 2
    assert means["exact_match_greedy"] == 100.0
    assert means["exact_match_sampled"] == 50.0
    assert means["rouge_l_sampled"] == pytest.approx(75.0)  # one of two words, then all of one
    assert means["mean_length_greedy"] == 2.5
    assert means["ended_share_greedy"] == 100.0
    assert near.scores["exact_match_sampled"].stderr == pytest.approx(50.0)
    assert list(means)[:2] == ["exact_match_greedy", "exact_match_sampled"]


def test_bleu_is_that_of_the_whole_split_and_has_an_error_for_two_prompts_or_more() -> None:
    prompts = [
        build_prompt("a", "red green blue red green"),
        build_prompt("b", "blue blue red green", "green"),
        build_prompt("c", "red"),
    ]
    wrote = {"a": [1, 2, 3, 1, 1, END], "b": [3, 3, 1, 2, END], "c": [2, END]}
    generator = ScriptedGenerator(wrote, wrote)
    both = evaluate_splits({"all": prompts, "one": prompts[:1]}, generator, decode, ("bleu",), 0)
    whole = BLEU(force=True).corpus_score(
        [decode(wrote[name]) for name in "abc"],
        [[prompt.references[0] for prompt in prompts], [None, "green", None]],
    )
    score = both["all"].scores["bleu_greedy"]
    assert 0 < whole.score < 100
    assert score.mean == pytest.approx(whole.score)
    assert score.stderr is not None
    assert score.stderr > 0
    replicates = both["all"].bootstrap["bleu_greedy"]
    assert score.stderr == pytest.approx(np.std(replicates, ddof=1), rel=1e-4)
    assert both["one"].scores["bleu_greedy"].stderr is None
    assert "bleu_greedy" not in both["all"].per_example


def test_a_split_without_references_has_lengths_and_ends_alone() -> None:
    bare = evaluate()[0]["bare"]
    assert set(bare.scores) == {
        "mean_length_greedy",
        "mean_length_sampled",
        "ended_share_greedy",
        "ended_share_sampled",
    }
    assert bare.scores["ended_share_greedy"].mean == 0.0
    assert bare.scores["mean_length_greedy"].stderr is None
    assert bare.shown[0].greedy == "red red red red"


def test_neither_a_cut_nor_an_aborted_response_has_ended_by_itself() -> None:
    finishes = {"a": Finish.STOP, "b": Finish.LENGTH, "c": Finish.ABORT, "d": Finish.ABORT}

    def generate(prompts: Sequence[Prompt], temperature: float, label: str) -> list[Trajectory]:
        written = [build_trajectory(prompt, [1, END], temperature) for prompt in prompts]
        return [replace(each, finish=finishes[each.prompt_id]) for each in written]

    prompts = [build_prompt(name) for name in finishes]
    bare = evaluate_splits({"bare": prompts}, generate, decode, (), 0)["bare"]
    assert bare.per_example["ended_share_greedy"] == (100.0, 0.0, 0.0, 0.0)
    assert bare.scores["ended_share_sampled"].mean == 25.0


def test_accuracy_reads_yes_and_no_out_of_responses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TEXTS, 1, "no wings, so yes")
    monkeypatch.setitem(TEXTS, 2, "the answer is no")
    splits = {"asked": [build_prompt("a", "yes"), build_prompt("b", "yes")]}
    generator = ScriptedGenerator({"a": [1, END], "b": [2, END]}, {"a": [2, END], "b": [2, 3]})
    asked = evaluate_splits(splits, generator, decode, ("accuracy",), 0)["asked"]
    assert asked.per_example["accuracy_greedy"] == (100.0, 0.0)
    assert asked.scores["accuracy_sampled"].mean == 0.0


def test_accuracy_without_a_yes_or_no_to_compare_with_is_refused_before_generating() -> None:
    splits = {"asked": [build_prompt("a", "yes"), build_prompt("b", "blue")]}
    generator = ScriptedGenerator({}, {})
    with pytest.raises(DataError, match="accuracy needs references that say yes or no, 'b' has"):
        evaluate_splits(splits, generator, decode, ("accuracy",), 0)
    assert generator.calls == []


def test_what_is_shown_is_limited_and_complete() -> None:
    (shown,) = evaluate()[0]["near"].shown
    assert (shown.prompt, shown.references) == ("ask a", ("red green",))
    assert (shown.greedy, shown.sampled) == ("red green", "red blue")


def test_the_json_form_holds_every_field() -> None:
    evaluation = evaluate()[0]["near"]
    form = json.loads(json.dumps(evaluation.to_json(), allow_nan=False))
    assert form["num_examples"] == len(form["prompt_ids"]) == evaluation.num_examples
    assert form["scores"] == {name: asdict(score) for name, score in evaluation.scores.items()}
    assert form["per_example"] == {n: list(v) for n, v in evaluation.per_example.items()}
    assert form["bootstrap"] == {n: list(v) for n, v in evaluation.bootstrap.items()}
    assert form["shown"][0]["references"] == ["red green"]


def test_references_for_some_prompts_only_are_refused() -> None:
    splits = {"mixed": [build_prompt("a", "red"), build_prompt("b")]}
    with pytest.raises(DataError, match=r"'mixed'.*1 of 2.*'b'"):
        evaluate_splits(splits, ScriptedGenerator(GREEDY, SAMPLED), decode, ("bleu",), 1)


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(DataError, match="'none'"):
        evaluate_splits({"none": []}, ScriptedGenerator({}, {}), decode, (), 1)


def test_trajectories_of_other_prompts_are_refused() -> None:
    def shuffled(prompts: Sequence[Prompt], temperature: float, label: str) -> list[Trajectory]:
        return ScriptedGenerator(GREEDY, SAMPLED)(prompts[::-1], temperature, label)

    with pytest.raises(RecordError, match="position 0"):
        evaluate_splits({"near": SPLITS["near"]}, shuffled, decode, ("bleu",), 1)


def test_what_cannot_be_scored_is_refused_with_the_row_before_anything_is_written() -> None:
    places = {"q": "test.jsonl:3"}
    some = {"test": [build_prompt("p", "yes"), build_prompt("q")]}
    with pytest.raises(DataError, match=r"1 of 2 have none, the first 'q' \(test\.jsonl:3\)"):
        check_evaluation(EvaluationConfig(), some, places)
    vague = {"test": [build_prompt("p", "yes"), build_prompt("q", "perhaps")]}
    with pytest.raises(DataError, match=r"'q' \(test\.jsonl:3\) has 'perhaps'; take accuracy"):
        check_evaluation(EvaluationConfig(metrics=("accuracy",)), vague, places)
    check_evaluation(EvaluationConfig(), vague, places)


def test_a_scorer_that_is_not_installed_is_refused_before_anything_is_written() -> None:
    config = EvaluationConfig(metrics=("bleu",), bleu=BleuConfig(tokenizer="ko-mecab"))
    with pytest.raises(
        ConfigError,
        match=r"tokenizer='ko-mecab' cannot be used: .*extra dependencies.* or take char",
    ):
        check_evaluation(config, SPLITS)
    check_evaluation(config.model_copy(update={"metrics": ("rouge_l",)}), SPLITS)


def test_settings_of_the_scorers_reach_them() -> None:
    prompts = [build_prompt("a", "RED green red blue")]
    generator = ScriptedGenerator({"a": [1, 2, 1, 3, END]}, {"a": [1, 2, 1, 3, END]})
    names: tuple[MetricName, ...] = ("bleu", "rouge_l")

    def score(bleu: BleuConfig, tokenizer: str) -> dict[str, float]:
        rouge = RougeConfig.model_validate({"tokenizer": tokenizer})
        scored = evaluate_splits(
            {"x": prompts}, generator, decode, names, 0, rouge=rouge, bleu=bleu
        )["x"]
        return {name: estimate.mean for name, estimate in scored.scores.items()}

    assert score(BleuConfig(), "auto")["bleu_greedy"] < 60
    assert score(BleuConfig(lowercase=True), "auto")["bleu_greedy"] == pytest.approx(100.0)
    floored = score(BleuConfig(smoothing="none"), "auto")["bleu_greedy"]
    assert (
        floored
        == BLEU(smooth_method="none")
        .corpus_score(["red green red blue"], [["RED green red blue"]])
        .score
    )

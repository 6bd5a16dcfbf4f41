import math
from typing import get_args

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from distill_system.config.evaluation import LENGTH_METRICS, BleuConfig, MetricName
from distill_system.errors import RecordError
from distill_system.evaluation.scores import (
    METRICS,
    CharacterTokenizer,
    Direction,
    StemTokenizer,
    UnicodeWordTokenizer,
    accuracy,
    bleu_from_sums,
    bleu_statistics,
    exact_match,
    longest_common_subsequence,
    rouge_l,
    rouge_l_stemmed,
    yes_no_answer,
)
from distill_system.standard_errors import (
    bootstrap_replicates,
    bootstrap_standard_error,
    paired_bootstrap_standard_error,
    paired_standard_error,
    standard_error,
)

GERMAN = [
    "Ein Hund läuft über die Wiese.",
    "Zwei Männer stehen vor einem Haus und reden.",
    "Eine Frau liest.",
    "Das Kind spielt mit dem roten Ball im Garten hinter dem Haus.",
]
GERMAN_REFERENCES = [
    ("Ein Hund rennt über die grüne Wiese.", "Der Hund läuft über eine Wiese."),
    ("Zwei Männer stehen vor einem Haus und reden.",),
    ("Eine Frau liest ein Buch.", "Die Frau liest.", "Eine Dame liest."),
    ("Ein Kind spielt mit dem Ball im Garten.",),
]


def test_exact_match_ignores_white_space_at_the_ends_only() -> None:
    assert exact_match(" a b.\n", ["c", "a b. "]) == 100.0
    assert exact_match("a  b.", ["a b."]) == 0.0
    assert exact_match("A b.", ["a b."]) == 0.0
    assert exact_match("", ["a"]) == 0.0


def test_rouge_l_by_hand() -> None:
    # Longest common subsequence "the dog": precision 2/3, recall 2/4.
    expected = 100 * 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)
    assert rouge_l("the big dog", ["the dog runs fast"]) == pytest.approx(expected)
    assert rouge_l("the big dog", ["no match", "The big dog!"]) == pytest.approx(100.0)
    assert rouge_l("", ["the dog"]) == 0.0


def test_rouge_l_keeps_words_that_are_not_ascii() -> None:
    assert rouge_l("привет мир", ["привет мир"]) == pytest.approx(100.0)
    assert RougeScorer(["rougeL"]).score("привет мир", "привет мир")["rougeL"].fmeasure == 0.0
    assert UnicodeWordTokenizer().tokenize("Läuft, u\u0308ber!") == ["läuft", "über"]
    assert UnicodeWordTokenizer().tokenize("हिन्दी में") == ["हिन्दी", "में"]


def test_rouge_l_of_several_references_is_that_of_the_best_one() -> None:
    text = "the cat sat on the mat"
    references = ["a dog ran", "the cat sat", "on a mat the cat sat down"]
    alone = [rouge_l(text, [reference]) for reference in references]
    assert rouge_l(text, references) == max(alone)
    assert len(set(alone)) == 3


WORDS = st.lists(st.sampled_from(["cat", "cats", "dog", "the", "runs", "running"]), max_size=80)


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_rouge_l_is_rouge_scores_to_the_bit(words: list[str], answers: list[list[str]]) -> None:
    text, references = " ".join(words), [" ".join(answer) for answer in answers]
    for stems, ours in ((False, rouge_l), (True, rouge_l_stemmed)):
        theirs = RougeScorer(["rougeL"], use_stemmer=stems).score_multi(references, text)
        assert ours(text, references) == 100.0 * theirs["rougeL"].fmeasure


def test_rouge_l_of_answers_of_thousands_of_words_by_construction() -> None:
    """Every third word left out, another put in everywhere; a table would have 48 million cells."""
    words = [f"w{index}" for index in range(6_000)]
    kept = [word for index, word in enumerate(words) if index % 3]
    noisy = [each for word in kept for each in (word, "noise")]
    assert longest_common_subsequence(words, noisy) == len(kept) == 4_000
    assert longest_common_subsequence(noisy, words) == len(kept)


def test_stemmed_rouge_l_by_hand() -> None:
    # Stems "cat run quick" against "the cat run": common "cat run", precision and recall 2/3.
    assert rouge_l_stemmed("cats running quickly", ["the cat runs"]) == pytest.approx(200 / 3)
    assert rouge_l("cats running quickly", ["the cat runs"]) == 0.0
    assert rouge_l_stemmed("cats", ["dogs", "cat"]) == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("yes", True),
        ("No.", False),
        ("  'Yes', fish swim, no doubt.", True),
        ("False: cats have wings, true or not.", False),
        ("Cats have no wings. So the answer is yes.", True),
        ("The answer is yes? It has no wings. The answer is: **no**.", False),
        ("Answer: true. There is no other.", True),
        ("No wings, so yes", True),
        ("It has no wings, so yes", True),
        ("no", False),
        ("It may say yes or no or no. In the end it says yes", True),
        ("The answer is no. Or: the answer is no. Or else the answer is yes", True),
        ("There is nothing to know", None),
        ("Norway, yesterday", None),
        ("", None),
    ],
)
def test_the_yes_or_no_of_a_response(text: str, said: bool | None) -> None:
    assert yes_no_answer(text) is said


def test_accuracy_is_whether_the_answers_agree() -> None:
    assert accuracy("Fish live in water. So the answer is yes.", ["yes"]) == 100.0
    assert accuracy("So the answer is no.", ["yes"]) == 0.0
    assert accuracy("I cannot say.", ["no"]) == 0.0
    assert accuracy("no", ["The answer is no.", "false"]) == 100.0


@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_on_ascii_text_the_words_are_those_of_rouge_score(text: str) -> None:
    assert UnicodeWordTokenizer().tokenize(text) == DefaultTokenizer().tokenize(text)


def test_bleu_from_summed_statistics_is_sacrebleus_corpus_bleu_with_uneven_references() -> None:
    most = max(map(len, GERMAN_REFERENCES))
    streams = [
        [accepted[i] if i < len(accepted) else None for accepted in GERMAN_REFERENCES]
        for i in range(most)
    ]
    ours = bleu_from_sums(bleu_statistics(GERMAN, GERMAN_REFERENCES).sum(axis=0))
    assert 10 < ours < 90
    assert ours == pytest.approx(sacrebleu.corpus_bleu(GERMAN, streams).score, abs=1e-9)


def test_bleu_of_empty_and_of_perfect_texts() -> None:
    references = [("a b c d e",), ("f g h i",)]
    assert bleu_from_sums(bleu_statistics(["", ""], references).sum(axis=0)) == 0.0
    perfect = bleu_statistics(["a b c d e", "f g h i"], references)
    assert bleu_from_sums(perfect.sum(axis=0)) == pytest.approx(100.0)


def test_bleu_takes_off_for_texts_that_are_right_and_too_short() -> None:
    short = bleu_statistics(["a b c d e f"], [["a b c d e f g h"]])
    assert bleu_from_sums(short.sum(axis=0)) == pytest.approx(100.0 * math.exp(1 - 8 / 6))
    long = bleu_statistics(["a b c d e f g h"], [["a b c d e f"]])
    precisions = (6 / 8) * (5 / 7) * (4 / 6) * (3 / 5)
    assert bleu_from_sums(long.sum(axis=0)) == pytest.approx(100.0 * precisions**0.25)


def test_standard_error_of_a_share_is_the_binomial_one() -> None:
    values = [100.0] * 30 + [0.0] * 70
    # sqrt(p (1 - p) / (n - 1)), in percent.
    assert standard_error(values) == pytest.approx(100 * math.sqrt(0.3 * 0.7 / 99))
    assert standard_error([1.0]) is None


def test_bootstrap_of_a_mean_agrees_with_its_closed_form() -> None:
    values = np.random.default_rng(0).exponential(size=400)
    sums = np.stack([values, np.ones(400)], axis=1)
    replicates = bootstrap_replicates(sums, lambda total: float(total[0] / total[1]))
    closed_form = standard_error(values.tolist())
    assert closed_form is not None
    # 1,000 replicates know a standard deviation to about 1 / sqrt(2000) = 2%.
    assert bootstrap_standard_error(replicates.tolist()) == pytest.approx(closed_form, rel=0.08)
    assert float(replicates.mean()) == pytest.approx(values.mean(), abs=0.01)


def test_paired_standard_error_sees_what_the_two_share() -> None:
    generator = np.random.default_rng(1)
    shared = generator.normal(50.0, 20.0, size=500)
    before = shared + generator.normal(0.0, 1.0, size=500)
    after = shared + 3.0 + generator.normal(0.0, 1.0, size=500)
    paired = paired_standard_error(before.tolist(), after.tolist())
    assert paired == pytest.approx(math.sqrt(2.0 / 500), rel=0.1)


def test_bootstraps_of_the_same_prompts_draw_the_same_prompts() -> None:
    generator = np.random.default_rng(2)
    before = generator.normal(50.0, 20.0, size=300)
    after = before + generator.normal(2.0, 1.0, size=300)

    def replicate(values: np.ndarray) -> list[float]:
        sums = np.stack([values, np.ones(len(values))], axis=1)
        return bootstrap_replicates(sums, lambda total: float(total[0] / total[1])).tolist()

    bootstrapped = paired_bootstrap_standard_error(replicate(before), replicate(after))
    closed_form = paired_standard_error(before.tolist(), after.tolist())
    assert bootstrapped == pytest.approx(closed_form, rel=0.08)


def test_unequal_numbers_of_examples_cannot_be_paired() -> None:
    with pytest.raises(RecordError, match="got 2 and 3"):
        paired_standard_error([1.0, 2.0], [1.0, 2.0, 3.0])


def test_a_hypothesis_without_its_references_is_refused_and_not_left_out() -> None:
    with pytest.raises(ValueError, match="shorter"):
        bleu_statistics(["red", "green"], [["red"]])


def test_every_metric_says_which_way_it_is_better() -> None:
    assert set(METRICS) == {*get_args(MetricName), *LENGTH_METRICS}
    neither = {name for name, direction in METRICS.items() if direction is Direction.NEITHER}
    assert neither == set(LENGTH_METRICS)


SAID = ["今天北京的天气非常好、适合出去散步。", "私は昨日東京に行きました。", "ฉันชอบกินข้าว"]
RIGHT = ["今天北京的天气很好、适合出去散步。", "私は昨日大阪に行きました。", "ฉันชอบกินปลา"]


@pytest.mark.parametrize("score", [rouge_l, rouge_l_stemmed])
def test_near_identical_answers_without_spaces_score_by_their_characters(score) -> None:
    assert all(60 < score(said, [right]) < 100 for said, right in zip(SAID, RIGHT, strict=True))
    # Common: 7 characters before 非常好 and 很好, 好 itself, 5 after it; of 15 and of 14.
    expected = 200 * 13 / (15 + 14)
    assert score(
        "今天北京的天气非常好适合出去散", ["今天北京的天气很好适合出去散"]
    ) == pytest.approx(expected)
    assert rouge_l(SAID[0], [RIGHT[0]], "words") < 60


def test_characters_keep_their_marks_and_words_of_other_scripts_stay_whole() -> None:
    tokens = CharacterTokenizer(everywhere=False).tokenize("GPT-4 läuft 東京タワー2024年 กิน")
    assert tokens == ["gpt", "4", "läuft", *"東京タワー", "2024", "年", "กิ", "น"]
    assert CharacterTokenizer(everywhere=True).tokenize("ab हि") == ["a", "b", "हि"]


@given(st.text(min_size=1))
def test_every_text_with_a_letter_is_like_itself(text: str) -> None:
    has_words = bool(UnicodeWordTokenizer().tokenize(text))
    for score in (rouge_l, rouge_l_stemmed):
        assert score(text, [text]) == pytest.approx(100.0 if has_words else 0.0)


@given(st.text(alphabet=st.characters(max_codepoint=0x2FF)))
def test_texts_with_spaces_are_cut_as_before(text: str) -> None:
    assert CharacterTokenizer(everywhere=False).tokenize(text) == UnicodeWordTokenizer().tokenize(
        text
    )
    stems = DefaultTokenizer(use_stemmer=True).tokenize(text)
    assert StemTokenizer().tokenize(text) == stems or not stems


CHINESE = (["今天天气非常好。", "我们明天去学校。"], ["今天天气很好。", "我们明天去上学。"])
MIXED = (["the 好 day", "a cat"], ["the 好 days are long", "a cat sat"])


@pytest.mark.parametrize(("texts", "tokenizer"), [(CHINESE, "char"), (MIXED, "13a")])
def test_bleu_cuts_into_characters_where_most_references_have_no_spaces(texts, tokenizer) -> None:
    said, right = texts
    ours = bleu_from_sums(bleu_statistics(said, [[text] for text in right]).sum(axis=0))
    assert ours == pytest.approx(sacrebleu.corpus_bleu(said, [right], tokenize=tokenizer).score)


def test_bleu_by_each_tokenizer_is_sacrebleus() -> None:
    for name in ("13a", "intl", "zh", "char", "none"):
        config = BleuConfig(tokenizer=name)
        ours = bleu_from_sums(
            bleu_statistics(SAID, [[right] for right in RIGHT], config).sum(axis=0), config
        )
        assert ours == pytest.approx(sacrebleu.corpus_bleu(SAID, [RIGHT], tokenize=name).score)


@pytest.mark.parametrize(("smoothing", "value"), [("floor", 0.3), ("add-k", 2.0), ("none", None)])
def test_bleu_by_each_smoothing_is_sacrebleus(smoothing, value) -> None:
    config = BleuConfig(smoothing=smoothing, smoothing_value=value)
    texts, references = ["a b c q"], [["a b c d"]]  # no 4-gram matches
    ours = bleu_from_sums(bleu_statistics(texts, references, config).sum(axis=0), config)
    theirs = sacrebleu.corpus_bleu(
        texts, [["a b c d"]], smooth_method=smoothing, smooth_value=value
    )
    assert ours == pytest.approx(theirs.score)

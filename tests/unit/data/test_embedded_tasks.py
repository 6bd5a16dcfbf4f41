"""Answers are re-derived from the prompt's text alone, by code of its own."""

import hashlib
import re
from collections import Counter

import pytest

from distill_system.config.data import EmbeddedSplit
from distill_system.data.embedded_tasks import Task, collect_unique, generate_tasks, is_reserved
from distill_system.errors import DataError

TEST_SPLITS: tuple[EmbeddedSplit, ...] = (
    "in_distribution",
    "paraphrase",
    "longer_input",
    "composition",
    "distractor",
)
ANIMALS = "bee cat cow dog fox hen owl pig"
FRUITS = "apple fig grape kiwi lime melon pear plum"
COLORS = "black blue gold gray green pink red white"
TOOLS = "axe drill fork glue nail rope saw tape"
MEMBERS = {"animals": ANIMALS, "fruits": FRUITS, "colors": COLORS, "tools": TOOLS}
WORTH = {"weeks": 168, "days": 24, "hours": 1}  # of three incomparable scales
WORTH_OF_LENGTH = {"feet": 12, "inches": 1}
WORTH_OF_SPAN = {"decades": 120, "years": 12, "months": 1}
WORTH_OF_COUNT = {"pairs": 2, "items": 1}
SCALES = (WORTH, WORTH_OF_LENGTH, WORTH_OF_SPAN, WORTH_OF_COUNT)


def list_answers(words):
    text = " ".join(words)
    return {f"{text}.", f"the answer is {text}.", f"here is the list: {text}."}


def do_operation(phrase, words):
    result = []
    if "reverse" in phrase:
        for word in words:
            result.insert(0, word)
    elif "alphabetically" in phrase:
        remaining = list(words)
        while remaining:
            result.append(min(remaining))
            remaining.remove(min(remaining))
    elif match := re.search(r"the (first|last) (\d)", phrase):
        size = int(match[2])
        start = 0 if match[1] == "first" else len(words) - size
        result = [words[i] for i in range(max(0, start), min(len(words), start + size))]
    elif "move the first word" in phrase:
        result = [words[(i + 1) % len(words)] for i in range(len(words))]
    else:
        assert "repeated" in phrase
        for word in words:
            if word not in result:
                result.append(word)
    return result


def answer_composition(prompt):
    first, second, words = re.fullmatch(r"(.+), then (.+): (.+)", prompt).groups()
    return list_answers(do_operation(second, do_operation(first, words.split())))


def answer_lookup(prompt):
    owners = {item: name for name, item in re.findall(r"(\w+) has the (\w+)\.", prompt)}
    question = re.sub(r"\w+ has the \w+\.", "", prompt)
    (item,) = set(owners) & set(re.findall(r"\w+", question))
    name = owners[item]
    return {f"{name} has the {item}.", f"the {item} is with {name}.", f"{name}."}


def answer_profile(prompt):
    facts = dict(re.findall(r"(name|city|job|likes): (\w+);", prompt))
    name, city, job = facts["name"], facts["city"], facts["job"]
    end = f" and likes the {facts['likes']}." if "likes" in facts else "."
    return {
        f"{name} is a {job} from {city}{end}",
        f"{name} lives in {city} and works as a {job}{end}",
        f"from {city}, {name} works as a {job}{end}",
    }


def answer_convert(prompt):
    (number,) = re.findall(r"\d+", prompt)
    unit = re.search(r"\d+ (\w+)", prompt)[1]
    named = {word for scale in SCALES for word in scale} & set(re.findall(r"\w+", prompt))
    (target,) = named - {unit}
    (scale,) = [scale for scale in SCALES if unit in scale and target in scale]
    result = int(number) * scale[unit] // scale[target]
    return {
        f"{number} {unit} is {result} {target}.",
        f"{result} {target}.",
        f"there are {result} {target} in {number} {unit}.",
    }


def answer_spell(prompt):
    words, direction = re.search(r"(?:spell|letters of) (.+) (\w+)\.$", prompt).groups()
    letters = [letter for letter in words if letter != " "]
    return list_answers(letters if direction == "forwards" else letters[::-1])


def answer_add(prompt):
    left, right = map(int, re.search(r"(\d+) plus (\d+)", prompt).groups())
    return {
        f"{left + right}.",
        f"the sum is {left + right}.",
        f"{left} plus {right} is {left + right}.",
    }


def answer_extreme(prompt):
    numbers = sorted(map(int, re.findall(r"\d+", prompt)))
    word = "largest" if "largest" in prompt else "smallest"
    number = numbers[-1] if word == "largest" else numbers[0]
    return {f"{number}.", f"the answer is {number}.", f"{number} is the {word} number."}


def answer_replace(prompt, words):
    if match := re.search(r"use (\w+) in place of (\w+)", prompt):
        new, old = match.groups()
    else:
        old, new = re.search(r"(?:replace|change) (\w+) (?:with|to) (\w+)", prompt).groups()
    assert words.count(old) == 1
    assert new not in words
    at = words.index(old)
    return list_answers([*words[:at], new, *words[at + 1 :]])


def answer_list_task(prompt):
    request, words = re.fullmatch(r"(.*?[:?]) ([a-z ]+)", prompt).groups()
    words = words.split()
    if re.search(r"replace|change|in place of", request):
        return answer_replace(request, words)
    if "alphabetic" in request:
        return list_answers(sorted(words))
    if "revers" in request or "backwards" in request:
        return list_answers(do_operation("reverse", words))
    if re.search(r"(move|put) the first word", request):
        return list_answers(do_operation("move the first word", words))
    if "repeated" in request or "once" in request:
        return list_answers(do_operation("repeated", words))
    if match := re.search(r"(first|last) \d", request):
        return list_answers(do_operation(f"the {match[0]}", words))
    (category,) = set(MEMBERS) & set(re.findall(r"\w+", request))
    return list_answers([word for word in words if word in MEMBERS[category].split()])


def answer(prompt):
    """Every accepted answer of a request, derived from its text."""
    rules = (
        (", then ", answer_composition),
        (" has the ", answer_lookup),
        ("name: ", answer_profile),
        (" plus ", answer_add),
        ("spell |letters of", answer_spell),
        ("largest|smallest", answer_extreme),
        (r"\d+ (weeks|feet|years|days|pairs|decades)", answer_convert),
    )
    for mark, rule in rules:
        if re.search(mark, prompt):
            return rule(prompt)
    return answer_list_task(prompt)


def request_of(prompt, split):
    """The prompt without what stands in front of the request."""
    if split == "distractor":
        bare = re.sub(r"^[^.]+\. (then please|please|now) ", "", prompt)
        assert bare != prompt
        return bare
    return prompt.removeprefix("please ")


@pytest.mark.parametrize("split", ["train", *TEST_SPLITS])
def test_every_answer_follows_from_the_text_of_its_prompt(split):
    tasks = generate_tasks(split, 3000, seed=5)
    for task in tasks:
        assert set(task.references) == answer(request_of(task.prompt, split)), task
        assert task.answer in task.references


def test_phrasings_come_in_the_documented_proportions():
    tasks = generate_tasks("train", 20000, seed=1)
    counts = Counter(task.references.index(task.answer) for task in tasks)
    shares = [counts[i] / len(tasks) for i in range(3)]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.02)  # 5 standard errors


def test_no_test_prompt_occurs_in_training_for_any_seed():
    training = {task.prompt for seed in range(4) for task in generate_tasks("train", 15000, seed)}
    bare = {prompt.removeprefix("please ") for prompt in training}
    for split in TEST_SPLITS:
        for seed in (0, 1, 99):
            for task in generate_tasks(split, 300, seed):
                assert task.prompt not in training
                assert request_of(task.prompt, split) not in bare


@pytest.mark.parametrize("split", TEST_SPLITS)
def test_prompts_of_a_test_split_are_unique(split):
    prompts = [task.prompt for task in generate_tasks(split, 2000, seed=3)]
    assert len(set(prompts)) == 2000


def test_small_families_have_enough_on_both_sides():
    training = generate_tasks("train", 40000, seed=0)
    # nearly every problem is trained on in some phrasing: 6 units x 8 numbers, 12 x 12 sums,
    # 48 words x 2 directions
    for family, num_problems in (("convert", 48), ("add", 144), ("spell", 96)):
        problems = {task.references for task in training if task.family == family}
        assert len(problems) >= 0.93 * num_problems
    tests = {task.prompt: task.family for task in generate_tasks("in_distribution", 4000, seed=0)}
    requests = Counter(
        family for _, family in {(p.removeprefix("please "), f) for p, f in tests.items()}
    )
    assert requests["convert"] >= 15
    assert requests["spell"] >= 15
    assert requests["add"] >= 50


def test_each_split_is_what_its_name_says():
    def longest_list(split):
        tasks = generate_tasks(split, 2000, seed=7)
        return Counter(
            len(task.prompt.rsplit(": ", 1)[-1].split()) for task in tasks if task.family == "sort"
        )

    assert set(longest_list("train")) == {2, 3, 4}
    assert set(longest_list("longer_input")) == {5, 6}
    train_pairs = {
        re.sub(": .*", "", task.prompt.removeprefix("please "))
        for task in generate_tasks("train", 10000, seed=0)
        if task.family == "composition"
    }
    test_pairs = {
        re.sub(": .*", "", task.prompt) for task in generate_tasks("composition", 1000, seed=0)
    }
    assert len(train_pairs) == 9
    assert len(test_pairs) == 6
    assert not train_pairs & test_pairs
    families = {task.family for task in generate_tasks("train", 2000, seed=0)}
    assert len(families) == 14  # thirteen and the compositions


def test_a_distractor_names_nothing_that_the_request_names():
    common = {"the", "is", "with", "from", "in", "there", "are", "likes"}
    for task in generate_tasks("distractor", 2000, seed=0):
        request = request_of(task.prompt, "distractor")
        sentence = set(re.findall("[a-z]+", task.prompt.split(".")[0])) - common
        assert not sentence & set(re.findall("[a-z]+", request)), task.prompt


def test_the_reserved_share_is_one_fifth():
    share = sum(is_reserved(f"request {i}") for i in range(20000)) / 20000
    assert share == pytest.approx(0.2, abs=0.015)  # 5 standard errors


def test_the_same_seed_gives_the_same_tasks_and_another_seed_gives_others():
    assert generate_tasks("train", 200, 4) == generate_tasks("train", 200, 4)
    assert generate_tasks("paraphrase", 200, 4)[:50] == generate_tasks("paraphrase", 50, 4)
    assert generate_tasks("train", 200, 4) != generate_tasks("train", 200, 5)


def test_the_data_has_not_changed_since_results_were_recorded():
    # Change this digest only together with a note in the log: every recorded score moves with it.
    digest = hashlib.sha256()
    for split in ("train", *TEST_SPLITS):
        for task in generate_tasks(split, 500, seed=0):
            digest.update(f"{task.prompt}\n{task.answer}\n".encode())
    assert digest.hexdigest()[:16] == "c4ad48ab33ff132a"


def test_a_split_too_small_for_the_request_says_how_much_it_holds():
    prompts = iter(range(10**6))

    def draw():
        return Task("spell", f"prompt {next(prompts) % 5}", ("a.",), "a.")

    with pytest.raises(DataError, match=r"expected 6 different prompts, got 5.*at most 5"):
        collect_unique(draw, 6, "paraphrase")

"""The families of the embedded tasks: words, phrasings, and one small function per family.

In: a random generator, and whether the input is to be longer than in training.  Out: the slots that
fill a family's prompt and answer templates.  This file holds every text that a task can contain, so
that the closed vocabulary of the embedded tokenizer can be listed without sampling tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

Slots = dict[str, str]
Words = list[str]

CATEGORIES: dict[str, tuple[str, ...]] = {
    "animals": ("cat", "dog", "fox", "hen", "owl", "pig", "cow", "bee"),
    "fruits": ("fig", "pear", "plum", "lime", "kiwi", "apple", "grape", "melon"),
    "colors": ("red", "blue", "green", "pink", "gray", "black", "white", "gold"),
    "tools": ("saw", "axe", "drill", "nail", "rope", "glue", "tape", "fork"),
}
ITEMS = tuple(item for items in CATEGORIES.values() for item in items)
CATEGORY_OF = {item: category for category, items in CATEGORIES.items() for item in items}
NAMES = ("ana", "bob", "cal", "dee", "eli", "fay", "gus", "hal")
CITIES = ("rome", "oslo", "lima", "cairo", "delhi", "paris", "tokyo", "berlin")
JOBS = ("cook", "nurse", "pilot", "clerk", "judge", "baker", "tailor", "farmer")
CONVERSIONS = (
    ("weeks", "days", 7),
    ("feet", "inches", 12),
    ("years", "months", 12),
    ("days", "hours", 24),
    ("pairs", "items", 2),
    ("decades", "years", 10),
)
ENDS = ("first", "last")
DIRECTIONS = ("forwards", "backwards")
EXTREMES = ("smallest", "largest")
PROFILE_LINES = ("name: {name};", "city: {city};", "job: {job};")
LONGER_PROFILE_LINE = "likes: {item};"
LONGER_PROFILE_ENDING = " and likes the {item}"

# Each task has several accepted answers, drawn with these probabilities in the order of the answer
# templates: distillation methods differ on targets with several modes.
ANSWER_PROBABILITIES = (0.5, 0.3, 0.2)
LIST_ANSWERS = ("{answer}.", "the answer is {answer}.", "here is the list: {answer}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One kind of task: phrasings of the prompt, accepted answers, and a function that fills both.

    held_out_templates are used in the paraphrase split alone.  draw(random, longer): the slots.
    """

    name: str
    train_templates: tuple[str, ...]
    held_out_templates: tuple[str, ...]
    draw: Callable[[Random, bool], Slots]
    answer_templates: tuple[str, ...] = LIST_ANSWERS
    has_longer_inputs: bool = True


def _list_length(random: Random, longer: bool) -> int:
    return random.randint(5, 6) if longer else random.randint(2, 4)


def _draw_reverse(random: Random, longer: bool) -> Slots:
    words = random.sample(ITEMS, _list_length(random, longer))
    return {"words": " ".join(words), "answer": " ".join(reversed(words))}


def _draw_sort(random: Random, longer: bool) -> Slots:
    words = random.sample(ITEMS, _list_length(random, longer))
    return {"words": " ".join(words), "answer": " ".join(sorted(words))}


def _draw_keep(random: Random, longer: bool) -> Slots:
    words = random.sample(ITEMS, _list_length(random, longer) + 1)
    category = CATEGORY_OF[random.choice(words)]
    kept = [word for word in words if CATEGORY_OF[word] == category]
    return {"words": " ".join(words), "category": category, "answer": " ".join(kept)}


def _draw_replace(random: Random, longer: bool) -> Slots:
    *words, new = random.sample(ITEMS, _list_length(random, longer) + 1)
    old = random.choice(words)
    answer = [new if word == old else word for word in words]
    return {"words": " ".join(words), "old": old, "new": new, "answer": " ".join(answer)}


def _draw_take(random: Random, longer: bool) -> Slots:
    words = random.sample(ITEMS, _list_length(random, longer) + 1)
    count = random.randint(2, min(4, len(words) - 1))
    end = random.choice(ENDS)
    taken = words[:count] if end == "first" else words[-count:]
    return {"words": " ".join(words), "end": end, "count": str(count), "answer": " ".join(taken)}


def _draw_unique(random: Random, longer: bool) -> Slots:
    length = _list_length(random, longer) + 1
    pool = random.sample(ITEMS, length // 2 + 1)
    words = random.choices(pool, k=length)
    return {"words": " ".join(words), "answer": " ".join(dict.fromkeys(words))}


def _draw_rotate(random: Random, longer: bool) -> Slots:
    first, *rest = random.sample(ITEMS, _list_length(random, longer) + 1)
    return {"words": " ".join([first, *rest]), "answer": " ".join([*rest, first])}


def _draw_lookup(random: Random, longer: bool) -> Slots:
    count = random.randint(4, 5) if longer else random.randint(2, 3)
    names, items = random.sample(NAMES, count), random.sample(ITEMS, count)
    facts = [f"{name} has the {item}." for name, item in zip(names, items, strict=True)]
    asked = random.randrange(count)
    return {"facts": " ".join(facts), "item": items[asked], "name": names[asked]}


def _draw_profile(random: Random, longer: bool) -> Slots:
    slots = {
        "name": random.choice(NAMES),
        "city": random.choice(CITIES),
        "job": random.choice(JOBS),
        "item": random.choice(ITEMS),
    }
    lines = [*PROFILE_LINES, LONGER_PROFILE_LINE] if longer else [*PROFILE_LINES]
    random.shuffle(lines)
    facts = " ".join(lines).format(**slots)
    ending = LONGER_PROFILE_ENDING.format(**slots) if longer else ""
    return {**slots, "facts": facts, "ending": ending}


def _draw_convert(random: Random, longer: bool) -> Slots:
    unit, target, factor = random.choice(CONVERSIONS)
    number = random.randint(10, 12) if longer else random.randint(2, 9)
    return {"number": str(number), "unit": unit, "target": target, "result": str(number * factor)}


def _draw_spell(random: Random, longer: bool) -> Slots:
    words = [random.choice(ITEMS + CITIES + JOBS)]
    if longer:
        words.append(random.choice(ITEMS + CITIES))
    direction = random.choice(DIRECTIONS)
    letters = "".join(words)
    answer = letters if direction == "forwards" else letters[::-1]
    return {"words": " ".join(words), "direction": direction, "answer": " ".join(answer)}


def _draw_add(random: Random, longer: bool) -> Slots:
    left, right = random.randint(1, 12), random.randint(1, 12)
    return {"left": str(left), "right": str(right), "sum": str(left + right)}


def _draw_extreme(random: Random, longer: bool) -> Slots:
    numbers = random.sample(range(1, 30), _list_length(random, longer))
    extreme = random.choice(EXTREMES)
    answer = max(numbers) if extreme == "largest" else min(numbers)
    return {
        "numbers": " ".join(map(str, numbers)),
        "extreme": extreme,
        "answer": str(answer),
    }


FAMILIES: tuple[Family, ...] = (
    Family(
        name="reverse",
        train_templates=(
            "reverse the order of these words: {words}",
            "write this list backwards: {words}",
            "reverse the list: {words}",
            "put the words in reverse order: {words}",
        ),
        held_out_templates=(
            "write these words in reverse order: {words}",
            "put this list backwards: {words}",
        ),
        draw=_draw_reverse,
    ),
    Family(
        name="sort",
        train_templates=(
            "sort the words alphabetically: {words}",
            "put these words in alphabetical order: {words}",
            "arrange the list alphabetically: {words}",
        ),
        held_out_templates=(
            "arrange the words in alphabetical order: {words}",
            "put the list in alphabetical order: {words}",
        ),
        draw=_draw_sort,
    ),
    Family(
        name="keep",
        train_templates=(
            "keep only the {category}: {words}",
            "which of these are {category}? {words}",
            "list the {category} in: {words}",
        ),
        held_out_templates=(
            "write only the {category} in the list: {words}",
            "give the {category}: {words}",
        ),
        draw=_draw_keep,
    ),
    Family(
        name="replace",
        train_templates=(
            "replace {old} with {new}: {words}",
            "change {old} to {new} in: {words}",
            "in this list use {new} in place of {old}: {words}",
        ),
        held_out_templates=(
            "change {old} to {new} in this list: {words}",
            "replace {old} with {new} in the list: {words}",
        ),
        draw=_draw_replace,
    ),
    Family(
        name="take",
        train_templates=(
            "give the {end} {count} words: {words}",
            "keep the {end} {count} words of: {words}",
            "what are the {end} {count} words? {words}",
        ),
        held_out_templates=(
            "write the {end} {count} words of the list: {words}",
            "list the {end} {count}: {words}",
        ),
        draw=_draw_take,
    ),
    Family(
        name="unique",
        train_templates=(
            "remove the repeated words: {words}",
            "write each word only once: {words}",
            "drop the repeated words of the list: {words}",
        ),
        held_out_templates=(
            "write the list without the repeated words: {words}",
            "keep each word only once: {words}",
        ),
        draw=_draw_unique,
    ),
    Family(
        name="rotate",
        train_templates=(
            "move the first word to the end: {words}",
            "put the first word at the end: {words}",
        ),
        held_out_templates=("move the first word of the list to the end: {words}",),
        draw=_draw_rotate,
    ),
    Family(
        name="lookup",
        train_templates=(
            "{facts} who has the {item}?",
            "{facts} where is the {item}?",
            "{facts} find the {item}.",
        ),
        held_out_templates=(
            "{facts} who is with the {item}?",
            "find who has the {item}: {facts}",
        ),
        answer_templates=("{name} has the {item}.", "the {item} is with {name}.", "{name}."),
        draw=_draw_lookup,
    ),
    Family(
        name="profile",
        train_templates=(
            "describe the person. {facts}",
            "write a sentence. {facts}",
            "summarize: {facts}",
        ),
        held_out_templates=("describe: {facts}", "write a sentence of the person. {facts}"),
        answer_templates=(
            "{name} is a {job} from {city}{ending}.",
            "{name} lives in {city} and works as a {job}{ending}.",
            "from {city}, {name} works as a {job}{ending}.",
        ),
        draw=_draw_profile,
    ),
    Family(
        name="convert",
        train_templates=(
            "convert {number} {unit} to {target}.",
            "how many {target} are in {number} {unit}?",
            "{number} {unit} in {target}?",
        ),
        held_out_templates=(
            "how many {target} are there in {number} {unit}?",
            "change {number} {unit} to {target}.",
        ),
        answer_templates=(
            "{number} {unit} is {result} {target}.",
            "{result} {target}.",
            "there are {result} {target} in {number} {unit}.",
        ),
        draw=_draw_convert,
    ),
    Family(
        name="spell",
        train_templates=("spell {words} {direction}.", "write the letters of {words} {direction}."),
        held_out_templates=("give the letters of {words} {direction}.",),
        draw=_draw_spell,
    ),
    Family(
        name="add",
        train_templates=(
            "what is {left} plus {right}?",
            "add: {left} plus {right}",
            "find the sum: {left} plus {right}",
        ),
        held_out_templates=(
            "what is the sum {left} plus {right}?",
            "give {left} plus {right}.",
        ),
        answer_templates=("{sum}.", "the sum is {sum}.", "{left} plus {right} is {sum}."),
        draw=_draw_add,
        has_longer_inputs=False,
    ),
    Family(
        name="extreme",
        train_templates=(
            "what is the {extreme} number? {numbers}",
            "find the {extreme} number: {numbers}",
            "give the {extreme} of: {numbers}",
        ),
        held_out_templates=(
            "write the {extreme} number of the list: {numbers}",
            "which is the {extreme}? {numbers}",
        ),
        answer_templates=(
            "{answer}.",
            "the answer is {answer}.",
            "{answer} is the {extreme} number.",
        ),
        draw=_draw_extreme,
    ),
)

# Each operation of a two-step composition: its phrase, and what it does to a list.
OPERATIONS: dict[str, tuple[str, Callable[[Words], Words]]] = {
    "reverse": ("reverse the list", lambda words: words[::-1]),
    "sort": ("sort the words alphabetically", sorted),
    "first": ("keep the first 2 words", lambda words: words[:2]),
    "last": ("keep the last 2 words", lambda words: words[-2:]),
    "rotate": ("move the first word to the end", lambda words: [*words[1:], words[0]]),
    "unique": ("remove the repeated words", lambda words: list(dict.fromkeys(words))),
}
COMPOSITION_TEMPLATE = "{first}, then {second}: {words}"
TRAIN_COMPOSITIONS = (
    ("reverse", "first"),
    ("sort", "first"),
    ("rotate", "reverse"),
    ("unique", "reverse"),
    ("sort", "last"),
    ("unique", "rotate"),
    ("reverse", "rotate"),
    ("rotate", "last"),
    ("unique", "sort"),
)
HELD_OUT_COMPOSITIONS = (
    ("reverse", "last"),
    ("sort", "reverse"),
    ("rotate", "first"),
    ("unique", "first"),
    ("unique", "last"),
    ("sort", "rotate"),
)

POLITE_PREFIX = "please "
DISTRACTOR_SENTENCES = (
    "{name} likes the {item}.",
    "the {item} is with {name}.",
    "{name} is from {city}.",
    "there are 3 {item} in {city}.",
)
DISTRACTOR_POLITENESS = ("please", "now", "then please")


def draw_composition(random: Random, pairs: tuple[tuple[str, str], ...]) -> Slots:
    """Slots of COMPOSITION_TEMPLATE and LIST_ANSWERS for one of the pairs of operations."""
    first, second = random.choice(pairs)
    first_phrase, apply_first = OPERATIONS[first]
    second_phrase, apply_second = OPERATIONS[second]
    words = random.sample(ITEMS, random.randint(3, 4))
    if first == "unique":
        words.pop()
        words.insert(random.randrange(len(words) + 1), random.choice(words))
    answer = apply_second(apply_first(words))
    return {
        "first": first_phrase,
        "second": second_phrase,
        "words": " ".join(words),
        "answer": " ".join(answer),
    }


def all_texts() -> list[str]:
    """Every template and every slot value; together they contain every word of every task.

    Slots remain as {slot}.  Numbers and the single letters of spelling tasks are not included.
    """
    templates = [
        text
        for family in FAMILIES
        for text in family.train_templates + family.held_out_templates + family.answer_templates
    ]
    profile = [*PROFILE_LINES, LONGER_PROFILE_LINE, LONGER_PROFILE_ENDING]
    units = [unit for source, target, _ in CONVERSIONS for unit in (source, target)]
    operations = [phrase for phrase, _ in OPERATIONS.values()]
    distractors = [*DISTRACTOR_SENTENCES, *DISTRACTOR_POLITENESS, POLITE_PREFIX]
    words = [*ITEMS, *CATEGORIES, *NAMES, *CITIES, *JOBS, *ENDS, *DIRECTIONS, *EXTREMES]
    facts = ["{name} has the {item}.", COMPOSITION_TEMPLATE]
    return [*templates, *profile, *units, *operations, *distractors, *words, *facts]

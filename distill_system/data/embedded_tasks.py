"""Short instruction-following tasks made by a generator, so that nothing needs downloading.

In: a split, a count, a seed.  Out: tasks with a prompt, all accepted answers, and one of them.

No training prompt occurs in a test split, whatever the seeds. A stable hash of the request (the
prompt without a polite or distracting sentence in front) reserves one fifth of all requests: the
test splits draw from these alone, and `train` from the other four fifths alone. The hash covers the
phrasing too, so that small families (unit conversion, spelling, addition) mostly lose some
phrasings of a problem to the tests, rarely the whole problem (1 of 48 conversions, 4 of 96
spellings).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from random import Random
from typing import NamedTuple

from distill_system.config.data import EmbeddedSplit
from distill_system.data import embedded_families as families
from distill_system.errors import DataError
from distill_system.seeds import derive_seed

RESERVED_ONE_IN = 5
COMPOSITION_SHARE = 0.1
POLITE_SHARE = 0.15
MAX_DRAWS_WITHOUT_NEW = 10_000

_LONGER_FAMILIES = tuple(family for family in families.FAMILIES if family.has_longer_inputs)


class Task(NamedTuple):
    """One task.  references: every accepted answer.  answer: the one of them to learn from."""

    family: str
    prompt: str
    references: tuple[str, ...]
    answer: str


def generate_tasks(split: EmbeddedSplit, num_examples: int, seed: int) -> list[Task]:
    """num_examples tasks of a split; the same arguments give the same tasks on every machine.

    Prompts may repeat in train; in every other split they are unique.

    Raises: DataError if the split has fewer different prompts than asked for.
    """
    random = Random(derive_seed(seed, "embedded_tasks", split))
    if split == "train":
        return [_draw_task(random, split) for _ in range(num_examples)]
    return collect_unique(lambda: _draw_task(random, split), num_examples, split)


def collect_unique(draw: Callable[[], Task], num_examples: int, split: str) -> list[Task]:
    """The first num_examples tasks of a stream whose prompts all differ.

    Raises: DataError if MAX_DRAWS_WITHOUT_NEW draws in a row gave no new prompt.
    """
    tasks: dict[str, Task] = {}
    num_misses = 0
    while len(tasks) < num_examples:
        task = draw()
        if task.prompt not in tasks:
            tasks[task.prompt] = task
            num_misses = 0
            continue
        num_misses += 1
        if num_misses == MAX_DRAWS_WITHOUT_NEW:
            raise DataError(
                f"embedded split {split!r}: expected {num_examples} different prompts, got "
                f"{len(tasks)}, and {num_misses} draws in a row gave no new one; "
                f"set num_examples to at most {len(tasks)}"
            )
    return list(tasks.values())


def is_reserved(request: str) -> bool:
    """Whether a request (a prompt without a sentence in front) is reserved for the test splits."""
    digest = hashlib.blake2b(request.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % RESERVED_ONE_IN == 0


def _draw_task(random: Random, split: EmbeddedSplit) -> Task:
    wants_reserved = split != "train"
    while True:
        task = _draw_request(random, split)
        if is_reserved(task.prompt) == wants_reserved:
            break
    if split == "distractor":
        return task._replace(prompt=_distract(random, task.prompt))
    if split in ("train", "in_distribution") and random.random() < POLITE_SHARE:
        return task._replace(prompt=families.POLITE_PREFIX + task.prompt)
    return task


def _draw_request(random: Random, split: EmbeddedSplit) -> Task:
    if split == "composition":
        return _draw_composition(random, families.HELD_OUT_COMPOSITIONS)
    if split in ("train", "in_distribution") and random.random() < COMPOSITION_SHARE:
        return _draw_composition(random, families.TRAIN_COMPOSITIONS)
    longer = split == "longer_input"
    family = random.choice(_LONGER_FAMILIES if longer else families.FAMILIES)
    slots = family.draw(random, longer)
    templates = family.held_out_templates if split == "paraphrase" else family.train_templates
    prompt = random.choice(templates).format(**slots)
    return _build_task(random, family.name, prompt, family.answer_templates, slots)


def _draw_composition(random: Random, pairs: tuple[tuple[str, str], ...]) -> Task:
    slots = families.draw_composition(random, pairs)
    prompt = families.COMPOSITION_TEMPLATE.format(**slots)
    return _build_task(random, "composition", prompt, families.LIST_ANSWERS, slots)


def _build_task(
    random: Random, family: str, prompt: str, answers: tuple[str, ...], slots: families.Slots
) -> Task:
    references = tuple(answer.format(**slots) for answer in answers)
    answer = random.choices(references, families.ANSWER_PROBABILITIES)[0]
    return Task(family, prompt, references, answer)


def _distract(random: Random, request: str) -> str:
    # The sentence uses no word of the request: "ana has the cat" would change a look-up's answer.
    used = set(re.findall("[a-z]+", request))

    def unused(words: tuple[str, ...]) -> str:
        return random.choice([word for word in words if word not in used])

    sentence = random.choice(families.DISTRACTOR_SENTENCES).format(
        name=unused(families.NAMES), item=unused(families.ITEMS), city=unused(families.CITIES)
    )
    return f"{sentence} {random.choice(families.DISTRACTOR_POLITENESS)} {request}"

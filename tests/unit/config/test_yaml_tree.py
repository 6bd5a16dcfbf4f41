import math
import time

import pytest

from distill_system.config.yaml_tree import Plain, parse_yaml, to_plain
from distill_system.errors import ConfigError


def _parse(text: str) -> Plain:
    tree = parse_yaml(text, source="text", place=lambda mark: f"line {mark.line + 1}")
    assert tree is not None
    return to_plain(tree)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("1e-3", 0.001),  # YAML 1.1 reads text
        ("1e3", 1000.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("-2", -2),
        ("010", 10),  # YAML 1.1 reads eight
        ("0o10", 8),
        ("0x1F", 31),
        ("1_000", "1_000"),  # YAML 1.1 reads a number
        ("1:30", "1:30"),  # YAML 1.1 reads ninety
        ("on", "on"),  # YAML 1.1 reads true
        ("off", "off"),
        ("yes", "yes"),
        ("No", "No"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("2026-01-31", "2026-01-31"),  # YAML 1.1 reads a date
        ("-.inf", -math.inf),
        ("'3'", "3"),
        ("!!str 3", "3"),
        ("[1, {a: b}]", [1, {"a": "b"}]),
    ],
)
def test_scalars_follow_the_core_schema_of_yaml_1_2(written: str, meant: object) -> None:
    came = _parse(written)
    assert came == meant
    assert type(came) is type(meant)


def test_keys_are_the_text_as_written() -> None:
    assert _parse("on: 1\n2024: 2\nnull: 3\n") == {"on": 1, "2024": 2, "null": 3}


def test_every_value_knows_the_line_of_its_key() -> None:
    tree = parse_yaml("a: 1\nb:\n  c:\n    - 2\n", source="t", place=lambda m: str(m.line + 1))
    assert tree is not None
    assert isinstance(tree.value, dict)
    below = tree.value["b"].value
    assert isinstance(below, dict)
    items = below["c"].value
    assert isinstance(items, list)
    assert [tree.value["b"].where, below["c"].where, items[0].where] == ["2", "3", "4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: the key 'a' already stands in this mapping at line 1"),
        ("a: {b: 1, c: {}, b: 2}", "line 1: the key 'b' already stands"),
        ("a: [1\nb: 2\n", "line 2: not valid YAML: while parsing a flow sequence"),
        ("a: 1\n---\nb: 2\n", "line 2: not valid YAML: expected a single document"),
        ("x: !secret y", "line 1: expected a plain value, got one with the tag !secret; drop it"),
        ("x: !secret {a: 1}", "line 1: expected a plain value, got one with the tag !secret; drop"),
        ("x: !!set {a, b}", "got one with the tag tag:yaml.org,2002:set; drop it"),
        ("x: !mine [a]", "line 1: expected a plain value, got one with the tag !mine; drop it"),
        ('x: "a\\uD83D"', r"line 1: expected text that UTF-8 can write, got '\ud83d' in it"),
        ('"\\uDC80": 1', r"line 1: expected text that UTF-8 can write, got '\udc80' in it"),
        ("x: !!int y", "line 1: 'y' is not a tag:yaml.org,2002:int"),
        ("? [a]\n: 1\n", "line 1: expected a text as key, got a sequence"),
        ("a: &a [*a]", "line 1: an alias (*name) that contains itself"),
        ("a: \x00", "text: not valid YAML"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        _parse(text)
    assert message in str(raised.value)


def _alias_bomb() -> str:
    """Ten levels of ten aliases each: ten thousand million values in 600 characters."""
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 11)]
    return "a0: &a0 [x]\n" + "".join(levels)


def _alias_chain(length: int) -> str:
    """Each list holds the one before: shallow as written, deep as meant."""
    return "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, length))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_alias_bomb(), "line 1: expected at most 100,000 values, got more once all aliases"),
        (_alias_chain(2000), "line 1: expected lists and mappings of at most 50 levels"),
        (
            "[" * 60 + "]" * 60,
            "line 1: not valid YAML: expected lists and mappings of at most 50 levels",
        ),
        (
            "[" * 5000 + "]" * 5000,
            "line 1: not valid YAML: expected lists and mappings of at most 50 levels",
        ),
        ("{a: " * 5000, "line 1: not valid YAML: expected lists and mappings of at most 50 levels"),
        ("- " * 5000, "line 1: not valid YAML: expected lists and mappings of at most 50 levels"),
        ("x" * 300_000, "text: expected at most 262,144 characters, got 300,000"),
        ("a\x00b: 1", "text: not valid YAML"),
        ("\x00" * 1000, "text: not valid YAML"),
    ],
    ids=["bomb", "chain", "deep", "lists", "mappings", "blocks", "long", "nul", "nuls"],
)
def test_a_text_that_no_configuration_is_ends_at_once(text: str, message: str) -> None:
    started = time.process_time()
    with pytest.raises(ConfigError) as raised:
        _parse(text)
    assert message in str(raised.value)
    assert time.process_time() - started < 10.0


def test_an_alias_is_written_out() -> None:
    assert _parse("a: &x {b: [1]}\nc: *x\n") == {"a": {"b": [1]}, "c": {"b": [1]}}


def test_a_text_without_a_document_has_no_tree() -> None:
    assert parse_yaml("# nothing\n", source="t", place=str) is None

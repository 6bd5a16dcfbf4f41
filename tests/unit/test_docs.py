"""The pages against the code: links, commands, configuration keys, paths, and the lines of make."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from distill_system.cli import app
from distill_system.config import RunConfig, load_config
from distill_system.config.schema import Slot, root_slot

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [
    *(
        ROOT / page
        for page in ("README.md", "CHANGELOG.md", "configs/README.md", "deploy/README.md")
    ),
    *sorted((ROOT / "docs").rglob("*.md")),
]
BASE_CONFIG = ROOT / "configs/quickstart.yaml"

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def _blocks(page: Path, *languages: str) -> list[str]:
    """The text of fenced blocks, of all or of some languages."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [text for language, text in found if not languages or language in languages]


def _code(page: Path) -> list[str]:
    """Everything set as code: inline, and line by line in fenced blocks."""
    lines = [line for block in _blocks(page) for line in block.splitlines()]
    return INLINE.findall(_prose(page)) + lines


def _section(page: Path, heading: str) -> str:
    """What stands under a heading, up to the next one; a single # may be a comment in code."""
    _, _, after = page.read_text(encoding="utf-8").partition(f"\n{heading}\n")
    assert after, f"{_name(page)} has no heading {heading!r}"
    return re.split(r"^##+ ", after, flags=re.MULTILINE)[0]


def _anchors(page: Path) -> set[str]:
    """The anchors that a page's headings get."""
    headings = re.findall(r"^#+ (.+)$", _prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(_prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in _anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_command_named_exists(page: Path) -> None:
    commands = {
        command.name or command.callback.__name__
        for command in app.registered_commands
        if command.callback
    }
    named = {name for text in _code(page) for name in re.findall(r"distill-system ([a-z]+)", text)}
    assert named <= commands


def _exists(slot: Slot, keys: list[str]) -> bool:
    """Whether a key path stands in the configuration, under any alternative of a union."""
    if not keys:
        return True
    tags: list[str | None] = [*slot.alternatives] or [None]
    children = [slot.child(keys[0], tag) for tag in tags]
    return any(child.annotation is not object and _exists(child, keys[1:]) for child in children)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_configuration_key_named_exists(page: Path) -> None:
    dotted = {key for text in INLINE.findall(_prose(page)) for key in _dotted_keys(text)}
    assigned = {key for line in _code(page) for key in re.findall(r"(?<=\s)([a-z_.]+)=", line)}
    keys = dotted | {key for key in assigned if "." in key}
    unknown = {
        key
        for key in keys
        if key.split(".")[0] in RunConfig.model_fields
        and not _exists(root_slot(RunConfig), key.split("."))
    }
    assert unknown == set()


def _dotted_keys(text: str) -> list[str]:
    """a.b.c alone in its code span, with or without a value."""
    return re.findall(r"^([a-z_]+(?:\.[A-Za-z_]+)+)(?:=.*)?$", text)


def test_keys_are_told_from_what_only_looks_like_them() -> None:
    root = root_slot(RunConfig)
    assert _exists(root, ["distill", "objective", "critic", "step_size"])
    assert _exists(root, ["data", "evaluation", "mine", "path"])
    assert not _exists(root, ["distill", "objective", "critic", "step_sizes"])
    assert not _exists(root, ["distill", "step"])
    assert _dotted_keys("distill.steps=5") == ["distill.steps"]
    assert _dotted_keys("runs/mine/student.safetensors") == []


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_yaml_block_is_a_configuration(page: Path, tmp_path: Path) -> None:
    """A block with a name is a whole configuration; another is a layer on top of the quickstart."""
    for number, block in enumerate(_blocks(page, "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block, encoding="utf-8")
        config = load_config([file] if re.match("name:", block) else [BASE_CONFIG, file])
        assert config.distill.steps > 0


def test_every_path_of_the_map_exists() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", _section(README, "## The map"), flags=re.MULTILINE)
    assert len(rows) > 15
    assert [path for path in rows if not (ROOT / path).exists()] == []


def test_every_room_is_on_the_map() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", _section(README, "## The map"), flags=re.MULTILINE)
    package = ROOT / "distill_system"
    rooms = {f"distill_system/{path.parent.name}/" for path in package.glob("*/__init__.py")}
    files = {f"distill_system/{path.name}" for path in package.glob("[a-z]*.py")}
    assert rooms | files <= set(rows)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_file_of_the_repository_that_is_named_exists(page: Path) -> None:
    folders = "distill_system|tests|configs|docs|benchmarks|requirements|deploy"
    named = {text for text in INLINE.findall(_prose(page)) if re.match(f"({folders})/", text)}
    paths = {
        text for text in named if "<" not in text and not text.startswith("benchmarks/results")
    }
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def _command_lines(text: str) -> list[str]:
    """Commands that use the environment, in order, without what only quietens pip."""
    joined = re.sub(r"\\\n\s*", " ", text)
    commands = re.split(r"\n|&&|\|\||;", joined)
    lines = [re.sub(r" (--disable-pip-version-check|-qq?)(?= )", "", c).strip() for c in commands]
    lines = [re.sub(r"\s+2>/dev/null.*", "", re.sub(r"\s+", " ", line)) for line in lines]
    return [line for line in lines if line.startswith((".venv/bin/", "python3 -m venv"))]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make to compare with")
def test_the_readme_shows_the_lines_that_make_runs() -> None:
    outside = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    dry_run = subprocess.run(
        ["make", "--dry-run", "--always-make", "PYTHON=python3", "demo", "test"],
        cwd=ROOT,
        env=outside,
        capture_output=True,
        text=True,
        check=True,
    )
    [block] = FENCE.findall(_section(README, "### Without make"))
    ours = _command_lines(block[1])
    assert len(ours) == 9
    assert ours == _command_lines(dry_run.stdout)

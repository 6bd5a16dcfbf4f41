"""The pages against the code: whatever a page names in backticks exists under that name.

Links, files, commands and their options, configuration keys, metrics, Python names, YAML blocks,
and the lines that make runs. Each test gathers all misses of all pages. What the learner reports is
held against docs/metrics.md in tests/unit/learner/test_documented_metrics.py.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
from metric_names import documented_metrics, is_documented, pattern_of
from typer.main import get_command

from distill_system.cli import app
from distill_system.config import RunConfig, load_config
from distill_system.config.foreign_keys import OURS
from distill_system.config.schema import Slot, root_slot
from distill_system.observe.run_gauges import Rate, describe_load
from distill_system.observe.series import PREFIX, to_series
from distill_system.records import EngineLoad

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "distill_system"
README = ROOT / "README.md"
CHANGELOG = ROOT / "CHANGELOG.md"
PAGES = [
    *(README, CHANGELOG, ROOT / "SECURITY.md"),
    *(ROOT / "configs/README.md", ROOT / "deploy/README.md"),
    *sorted((ROOT / "docs").rglob("*.md")),
]
OF_TODAY = [page for page in PAGES if page != CHANGELOG]
"""Pages whose names are those of today; a changelog may name what is gone."""

BASE_CONFIG = ROOT / "configs/quickstart.yaml"

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")

# ---- names of others -----------------------------------------------------------------------------

OF_OTHERS = {
    # TRL, transformers, Axolotl, LLaMA-Factory: the tables of docs/migrating.md
    *OURS,
    *("use_vllm", "learning_rate", "warmup_steps", "weight_decay"),
    # vLLM
    *("LLMEngine", "VLLM_TARGET_DEVICE", "return_sampling_mask"),
    # torch, Ray, Prometheus, transformers, glibc, gloo, NCCL
    *("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"),
    *("async_save", "varlen_attn", "AttentionInterface", "use_deterministic_algorithms"),
    *("PlacementGroup", "prom_metrics_service_discovery", "file_sd_configs"),
    *("RAY_PROMETHEUS_HOST", "RAY_PROMETHEUS_NAME", "RAY_GRAFANA_HOST", "RAY_GRAFANA_IFRAME_HOST"),
    *("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_PROJECT"),
    *("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN", "MLFLOW_EXPERIMENT_NAME"),
    *("TRACKIO_PROJECT", "TRACKIO_SPACE_ID", "HF_TOKEN"),
    *("MALLOC_MMAP_THRESHOLD_", "getsignal"),
    # Kubernetes, Ray
    *("ReadWriteMany", "RAY_USE_TLS"),
    # TRL
    *("SFTTrainer", "DistillationTrainer", "AsyncDistillationTrainer", "batch_rebalance"),
    *("group_by_length", "padding_free", "ChunkedDivergenceFunction"),
}
"""Names in backticks that belong to libraries; an entry that no page uses is refused."""

MATHEMATICS = {
    *("pi_theta", "l_on", "l_off", "m_on", "m_off", "w_k"),
    *(f"{letter}_t" for letter in ("s", "y", "c", "chat", "a", "f", "r", "b", "w", "kl")),
}
"""Symbols of docs/objectives.md with an underscore; compared in lower case."""


# ---- reading pages -------------------------------------------------------------------------------


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def _inline(page: Path) -> list[str]:
    return INLINE.findall(_prose(page))


def _blocks(page: Path, *languages: str) -> list[str]:
    """The text of fenced blocks, of all or of some languages."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [text for language, text in found if not languages or language in languages]


def _code(page: Path) -> list[str]:
    """Everything set as code: inline, and line by line in fenced blocks, continued lines joined."""
    lines = [line for block in _blocks(page) for line in re.sub(r"\\\n", " ", block).splitlines()]
    return _inline(page) + lines


def _section(page: Path, heading: str) -> str:
    """What stands under a heading, up to the next one; a single # may be a comment in code."""
    _, _, after = page.read_text(encoding="utf-8").partition(f"\n{heading}\n")
    assert after, f"{_name(page)} has no heading {heading!r}"
    return re.split(r"^##+ ", after, flags=re.MULTILINE)[0]


def _anchors(page: Path) -> set[str]:
    """The anchors that a page's headings get."""
    headings = re.findall(r"^#+ (.+)$", _prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _misses(
    pages: list[Path],
    texts: Callable[[Path], list[str]],
    is_right: Callable[[str], bool],
) -> list[str]:
    """page: text, for every text that is not right."""
    return [f"{_name(p)}: {text}" for p in pages for text in texts(p) if not is_right(text)]


# ---- links, commands, options --------------------------------------------------------------------


def test_every_relative_link_leads_somewhere() -> None:
    def leads(page: Path, link: str) -> bool:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        inside = target.exists() and target.is_relative_to(ROOT)
        return inside and (not anchor or anchor in _anchors(target))

    broken = [
        f"{_name(page)}: {link}"
        for page in PAGES
        for link in LINK.findall(_prose(page))
        if "://" not in link and not leads(page, link)
    ]
    assert broken == []


@cache
def _options_of_commands() -> dict[str, set[str]]:
    """Each command of distill-system with its options."""
    commands = get_command(app).commands  # type: ignore[attr-defined]
    return {name: {o for p in each.params for o in p.opts} for name, each in commands.items()}


@cache
def _options_of_script(path: str) -> set[str]:
    """The options that a script under benchmarks/ declares, its own modules' included."""
    stem = Path(path).stem.split("_")[0]
    sources = [file.read_text("utf-8") for file in (ROOT / "benchmarks").glob(f"{stem}*.py")]
    return set(re.findall(r'"(--[a-z][a-z0-9-]*)"', "\n".join(sources)))


def _wrong_options(line: str) -> list[str]:
    """Commands and options of a line of code that do not exist; other programs' are not ours."""
    commands, named = _options_of_commands(), re.findall(r"distill-system ([a-z]+)", line)
    wrong = [name for name in named if name not in commands]
    script = re.search(r"benchmarks/\w+\.py", line)
    _, command, after = line.partition("distill-system " + named[0] if named else "\n")
    options = OPTION.findall(after if command else line)  # what stands before is another program's
    if named and not wrong:
        known = set.union(*(commands[name] for name in named))
    elif script:
        known = _options_of_script(script[0])
    elif line.startswith("--"):
        known = set.union(*commands.values())
        known |= {o for f in (ROOT / "benchmarks").glob("*.py") for o in _options_of_script(f.name)}
    else:
        return wrong
    return wrong + [option for option in options if option not in known]


def test_every_command_and_option_named_exists() -> None:
    assert _misses(PAGES, _code, lambda line: not _wrong_options(line)) == []


def test_wrong_options_are_told_from_right_ones() -> None:
    assert _wrong_options("distill-system train a.yaml --resume") == []
    assert _wrong_options("distill-system train a.yaml --at-once 2") == ["--at-once"]
    assert _wrong_options("distill-system trains a.yaml") == ["trains"]
    assert _wrong_options("python benchmarks/pipeline.py real --fixed-stale 1") == ["--fixed-stale"]
    assert _wrong_options("--samples-per-prompts 4") == ["--samples-per-prompts"]
    assert _wrong_options("pip install --no-deps x") == []
    assert _wrong_options("docker run --rm image distill-system train a.yaml --now") == ["--now"]


# ---- configuration -------------------------------------------------------------------------------


def _exists(slot: Slot, keys: list[str]) -> bool:
    """Whether a key path stands in the configuration, under any alternative of a union."""
    if not keys:
        return True
    tags: list[str | None] = [*slot.alternatives] or [None]
    children = [slot.child(keys[0], tag) for tag in tags]
    return any(child.annotation is not object and _exists(child, keys[1:]) for child in children)


def _dotted_keys(text: str) -> list[str]:
    """a.b.c alone in its code span, with or without a value."""
    return re.findall(r"^([a-z_]+(?:\.[A-Za-z_]+)+)(?:[=:].*)?$", text)


def _keys(page: Path) -> list[str]:
    """Dotted keys of the configuration that a page names; pools.* stands for every pool."""
    dotted = [key for text in _inline(page) for key in _dotted_keys(text)]
    assigned = [key for line in _code(page) for key in re.findall(r"(?<=\s)([a-z_.]+)=", line)]
    keys = {*dotted, *(key for key in assigned if "." in key)}
    keys = {key for key in keys if not key.endswith((".json", ".jsonl"))}  # files of a run
    return sorted(key for key in keys if key.split(".")[0] in RunConfig.model_fields)


def test_every_configuration_key_named_exists() -> None:
    root = root_slot(RunConfig)
    assert _misses(OF_TODAY, _keys, lambda key: _exists(root, key.split("."))) == []


def test_keys_are_told_from_what_only_looks_like_them() -> None:
    root = root_slot(RunConfig)
    assert _exists(root, ["distill", "objective", "critic", "step_size"])
    assert _exists(root, ["data", "evaluation", "mine", "path"])
    assert not _exists(root, ["distill", "objective", "critic", "step_sizes"])
    assert not _exists(root, ["distill", "step"])
    assert _dotted_keys("distill.steps=5") == ["distill.steps"]
    assert _dotted_keys("scaling.automatic: true") == ["scaling.automatic"]
    assert _dotted_keys("runs/mine/student.safetensors") == []


def test_every_yaml_block_is_a_configuration(tmp_path: Path) -> None:
    """A block with a name is a whole configuration; another is a layer on top of the quickstart."""
    blocks = [block for page in PAGES for block in _blocks(page, "yaml")]
    assert len(blocks) > 8
    for number, block in enumerate(blocks):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block, encoding="utf-8")
        config = load_config([file] if re.match("name:", block) else [BASE_CONFIG, file])
        assert config.distill.steps > 0


# ---- files ---------------------------------------------------------------------------------------

FOLDERS = "distill_system|tests|configs|docs|benchmarks|requirements|deploy"
SOURCE = re.compile(
    rf"^(?:({FOLDERS})/[\w./*-]*|[\w./-]+\.(py|md|yaml|toml|svg|json|jsonl|html|csv))$"
)


@cache
def _files() -> frozenset[str]:
    """Every file and folder of the repository, as git would list them."""
    top = [ROOT / name for name in FOLDERS.split("|")]
    inner = [
        path for folder in top for path in folder.rglob("*") if "__pycache__" not in path.parts
    ]
    beside = [path for path in ROOT.iterdir() if path.is_file()]
    return frozenset(str(path.relative_to(ROOT)) for path in [*top, *inner, *beside])


def _is_a_file(text: str) -> bool:
    """Whether a path exists, from the repository's root or shortened at its front."""
    wanted = text.rstrip("/")
    if "*" in wanted:
        return any(ROOT.glob(wanted))
    return (ROOT / wanted).exists() or any(path.endswith(f"/{wanted}") for path in _files())


EXAMPLES = {"mine.yaml", "rows.jsonl", "reuse.yaml", "OBJECTIVE/seed_K.json"}
"""Files of the reader's own, and forms of names."""

WRITTEN = {".json", ".jsonl", ".html", ".md", ".csv"}
"""What runs and comparisons write; the names are texts of the code."""


def test_every_file_of_the_repository_that_is_named_exists() -> None:
    def named(page: Path) -> list[str]:
        return [t for t in _inline(page) if SOURCE.match(t) and t not in EXAMPLES]

    def exists(text: str) -> bool:
        path, words = Path(text), _definitions().words | OF_OTHERS
        is_written = path.suffix in WRITTEN and {path.name, path.stem} & words
        return _is_a_file(text) or bool(is_written)

    assert _misses(OF_TODAY, named, exists) == []


def test_every_file_that_the_sources_point_to_exists() -> None:
    """Pages and modules that docstrings, comments and configurations name: docs/x.md, window.py."""
    sources = [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.yaml"), *ROOT.glob("configs/**/*.yaml")]
    pointer = re.compile(r"\bdocs/[\w/-]+(?:\.md)?|\b[a-z]\w*(?:/\w+)*\.py\b")

    def exists(text: str) -> bool:
        return _is_a_file(text) or any(ROOT.glob(f"{text}-*.md"))

    misses = [
        f"{_name(path)}: {text}"
        for path in sources
        for text in pointer.findall(path.read_text(encoding="utf-8"))
        if not exists(text)
    ]
    assert misses == []


def test_every_path_of_the_map_exists_and_every_room_is_on_it() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", _section(README, "## The map"), flags=re.MULTILINE)
    rooms = {f"distill_system/{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    files = {f"distill_system/{path.name}" for path in PACKAGE.glob("[a-z]*.py")}
    assert [path for path in rows if not (ROOT / path).exists()] == []
    assert sorted((rooms | files) - set(rows)) == []


# ---- metrics -------------------------------------------------------------------------------------


def _strings(path: Path) -> Iterator[str]:
    """Texts of a module, without docstrings; {} stands for what is filled in."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    within = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
    }
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(_part(value, constants) for value in node.values)
        elif isinstance(node, ast.Constant) and id(node) not in within | prose:
            yield str(node.value)


def _part(value: ast.expr, constants: Mapping[str, object]) -> str:
    """A piece of an f-string: as it stands, a constant of the module, or {}."""
    if isinstance(value, ast.Constant):
        return str(value.value)
    assert isinstance(value, ast.FormattedValue)
    name = value.value.id if isinstance(value.value, ast.Name) else ""
    return str(constants[name]) if isinstance(constants.get(name), str) else "{}"


@cache
def _metrics_of_the_code() -> frozenset[str]:
    """Metric names as the package spells them out, {} for what is filled in; never learner/ or
    held_out/ names that are put together from two parts."""
    rooms = "|".join(sorted({name.split("/")[0] for name in documented_metrics()}))
    shape = re.compile(rf"({rooms})/[a-z_{{}}]+(/[a-z_{{}}]+)?")
    found = {text for path in PACKAGE.rglob("*.py") for text in _strings(path)}
    return frozenset(text for text in found if shape.fullmatch(text) and not text.endswith("_"))


def test_every_metric_of_the_code_is_documented() -> None:
    assert [name for name in sorted(_metrics_of_the_code()) if not is_documented(name)] == []


def test_every_documented_metric_is_one_of_the_code() -> None:
    """What the learner names by itself is held against its steps, in tests/unit/learner."""
    ours = [name for name in documented_metrics() if not name.startswith(("learner/", "held_out/"))]
    patterns = [pattern_of(name) for name in _metrics_of_the_code()]
    filled = {name: re.sub(r"<\w+>", "x", name) for name in ours}
    assert len(ours) > 15
    assert [n for n, text in filled.items() if not any(p.fullmatch(text) for p in patterns)] == []


def test_every_metric_that_a_page_names_is_documented() -> None:
    rooms = {name.split("/")[0] for name in documented_metrics()}

    def named(page: Path) -> list[str]:
        shaped = [text for text in _inline(page) if re.fullmatch(r"[a-z_]+(/[a-z_<>*]+)+", text)]
        return [text for text in shaped if text.split("/")[0] in rooms]

    assert _misses(OF_TODAY, named, is_documented) == []


# ---- Python names --------------------------------------------------------------------------------


@dataclass
class _Definitions:
    """What the sources of the repository define and use.

    classes: name -> what may stand after its dot, bases included by name.
    words: every identifier and every short text.
    """

    classes: dict[str, set[str]] = field(default_factory=dict)
    bases: dict[str, set[str]] = field(default_factory=dict)
    functions: set[str] = field(default_factory=set)
    words: set[str] = field(default_factory=set)

    def members(self, name: str) -> set[str]:
        """What a class has, with what it has from its bases in the repository."""
        inherited = [self.members(base) for base in self.bases.get(name, ()) if base != name]
        return set.union(self.classes.get(name, set()), *inherited)

    def read(self, path: Path) -> None:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if id(node) not in prose:
                self._take(node)
        self.words |= {path.stem, path.parent.name}

    def _take(self, node: ast.AST) -> None:
        match node:
            case ast.ClassDef():
                self.classes.setdefault(node.name, set()).update(_members(node))
                self.bases.setdefault(node.name, set()).update(
                    base.id for base in node.bases if isinstance(base, ast.Name)
                )
                self.words.add(node.name)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self.functions.add(node.name)
                self.words.add(node.name)
            case ast.Name():
                self.words.add(node.id)
            case ast.Attribute():
                self.words.add(node.attr)
            case ast.arg() | ast.keyword() if node.arg:
                self.words.add(node.arg)
            case ast.alias():
                self.words |= set(node.name.split("."))
            case ast.Constant() if isinstance(node.value, str):
                self.words |= {node.value, *re.findall(r"\w+", node.value)}


def _members(node: ast.ClassDef) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield inner.name
        elif isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
            yield inner.target.id
        elif isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
            yield inner.attr


@cache
def _definitions() -> _Definitions:
    found = _Definitions()
    for folder in ("distill_system", "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            if path != Path(__file__):
                found.read(path)
    for path in (ROOT / "benchmarks/results").glob("*.json"):
        found.words |= set(json.loads(path.read_text(encoding="utf-8")).get("headline", ()))
    for path in [*ROOT.glob("configs/**/*.yaml"), *PACKAGE.glob("config/recipes/*.yaml")]:
        found.words |= {path.stem, *re.findall(r"\w+", path.read_text(encoding="utf-8"))}
    return found


NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(\(\w*\))?")


def _is_a_python_name(text: str) -> bool:
    """Whether Class, Class.member, function() or distill_system.module.name is defined here."""
    known, parts = _definitions(), text.partition("(")[0].split(".")
    if parts[0] in OF_OTHERS or parts[-1] in OF_OTHERS:
        return True
    if parts[0] == "distill_system":
        inner = [part for part in parts[1:] if not part[0].isupper()]
        path = PACKAGE.joinpath(*inner)
        module = path.is_dir() or path.with_suffix(".py").exists()
        return module and all(p in known.words for p in parts)
    if parts[0] in known.classes:
        return all(part in known.members(parts[0]) for part in parts[1:])
    return "(" in text and parts[-1] in known.functions | known.words


def _python_names(page: Path) -> list[str]:
    """Inline code that can only be a name of Python: CamelCase, a call, or a dotted module."""
    names = [text for text in _inline(page) if NAME.fullmatch(text)]
    return [
        text
        for text in names
        if re.match(r"[A-Z][A-Za-z0-9]*[a-z]", text)
        or re.fullmatch(r"[a-z_.]{3,}\(\w*\)", text)
        or text.startswith("distill_system.")
    ]


def test_every_python_name_exists() -> None:
    assert _misses(OF_TODAY, _python_names, _is_a_python_name) == []


def test_python_names_are_told_from_what_is_none() -> None:
    assert _is_a_python_name("LockstepStreams.take")
    assert _is_a_python_name("LearnerGroup.start_publish(version)")
    assert _is_a_python_name("distill_system.config.reference")
    assert not _is_a_python_name("LockstepStreams.takes")
    assert not _is_a_python_name("AheadStreams")
    assert not _is_a_python_name("distill_system.flow.window")
    assert not _is_a_python_name("take_the_lot()")


def _snake_words(page: Path) -> list[str]:
    """Words with an underscore in inline code that is one name or one setting of a name."""
    found = []
    for text in _inline(page):
        if re.fullmatch(r"[A-Za-z_.]+([=:] ?[\w.-]+)?", text):
            words = re.findall(r"[A-Za-z]\w*_\w*", text)
            found += [word for word in words if word.lower() not in MATHEMATICS]
    return found


def test_every_word_with_an_underscore_is_one_of_the_code() -> None:
    """The net under the tests above: a key without its path, an argument, a field, a phase."""
    known = _definitions().words | OF_OTHERS
    filled = [re.sub(r"<\w+>", "learner", name) for name in documented_metrics()]
    known |= {PREFIX + to_series(metric).name for metric in filled}
    known |= {f"ray_{word}" for word in known if word.startswith("distill_")}
    load = EngineLoad(running=0, waiting=0, cache_use=0.0, written_tokens=0, version=0)
    known |= {f"ray_distill_engine_{word}" for word in describe_load(load, Rate(), 0.0)}
    assert _misses(OF_TODAY, _snake_words, known.__contains__) == []


def test_no_library_s_name_is_listed_that_no_page_uses() -> None:
    used = {
        word for page in OF_TODAY for text in _inline(page) for word in re.findall(r"\w+", text)
    }
    assert sorted(OF_OTHERS - used) == []


# ---- make ----------------------------------------------------------------------------------------


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
    assert len(ours) > 5
    assert ours == _command_lines(dry_run.stdout)

"""Nothing in the package executes what it reads: no pickle, no YAML tags, no shell."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "distill_system"

PICKLES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
SAFE_LOADERS = {"SafeLoader", "CSafeLoader"}


def _calls_that_execute(source: str) -> Iterator[str]:
    """Calls and imports that may run what stands in a file or a text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLES:
            yield f"line {node.lineno}: from {node.module} import"
        if isinstance(node, ast.Import):
            # pickle itself may be imported: a subclass of its Unpickler can refuse what is named
            names = {alias.name.split(".")[0] for alias in node.names} & (PICKLES - {"pickle"})
            yield from (f"line {node.lineno}: import {name}" for name in names)
        if isinstance(node, ast.Call):
            name, keywords = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
            if _executes(name, keywords, len(node.args)):
                yield f"line {node.lineno}: {name}"


def _executes(name: str, keywords: dict[str | None, ast.expr], num_arguments: int) -> bool:
    def is_true(key: str) -> bool:
        value = keywords.get(key)
        return isinstance(value, ast.Constant) and value.value is True

    loader = ast.unparse(keywords["Loader"]) if "Loader" in keywords else ""
    return (
        name in {"pickle.load", "pickle.loads", "pickle.Unpickler", "eval", "exec", "os.system"}
        or (name == "torch.load" and not is_true("weights_only"))
        or (name in {"yaml.load", "yaml.load_all"} and not loader.endswith(tuple(SAFE_LOADERS)))
        or name in {"yaml.unsafe_load", "yaml.full_load", "os.popen"}
        or (name.startswith("subprocess.") and is_true("shell"))
        or is_true("allow_pickle")
        or is_true("trust_remote_code")
    )


def test_the_package_executes_nothing_that_it_reads() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}, {fault}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for fault in _calls_that_execute(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "import pickle\npickle.loads(data)",
        "from pickle import loads",
        "import cloudpickle",
        "yaml.load(text, Loader=yaml.Loader)",
        "numpy.load(path, allow_pickle=True)",
        "subprocess.run(line, shell=True)",
        "exec(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_each_way_to_execute_would_be_found(line: str) -> None:
    assert len([*_calls_that_execute(line)]) == 1


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path, weights_only=True)",
        "yaml.load(text, Loader=yaml.CSafeLoader)",
        "model.eval()",
        "import pickle\nclass Reader(pickle.Unpickler):\n    pass",
        "subprocess.run(['git', 'status'])",
        "from_pretrained(name, trust_remote_code=config.trust_remote_code)",
    ],
)
def test_what_executes_nothing_is_let_through(line: str) -> None:
    assert [*_calls_that_execute(line)] == []

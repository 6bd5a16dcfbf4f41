"""Faults from inside: a worker that breaks at a moment which nobody outside could meet.

Python runs sitecustomize.py as each process begins; the one written here changes a class of the
package as its module is imported. Nothing in the package knows of it.
"""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.command_line import ROOT

PREAMBLE = """
import importlib.abc, importlib.util, os, pathlib, signal, sys

HERE = pathlib.Path(__file__).parent

def is_worker(name):
    return os.environ.get("DISTILL_SYSTEM_WORKER") == name

def die(name):
    print(f"sabotage: {name}", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

def die_once(name):
    if not (HERE / name).exists():
        (HERE / name).touch()
        die(name)

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name not in PATCHES:
            return None
        patch = PATCHES.pop(name)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_patch(module):
            execute(module)
            patch(module)

        spec.loader.exec_module = execute_and_patch
        return spec

def wrap(owner, name, before):
    original = getattr(owner, name)

    def wrapped(self, *arguments, **options):
        before(self, *arguments, **options)
        return original(self, *arguments, **options)

    setattr(owner, name, wrapped)

sys.meta_path.insert(0, Finder())
"""


def sabotaged(folder: Path, program: str) -> dict[str, str]:
    """Variables under which every process runs this program as it begins; vLLM cannot be imported.

    program: defines PATCHES, module -> function that changes it; see PREAMBLE for what it may use.
    """
    folder.mkdir()
    text = f'{PREAMBLE}\nsys.modules["vllm"] = None\n{program}\n'
    (folder / "sitecustomize.py").write_text(text)
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}

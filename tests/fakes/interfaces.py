"""Where a stand-in differs from the interface that it stands for, and calls from what it takes."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import Any


def find_misfits(fake: type, interface: type, *, own: Collection[str] | None = ()) -> list[str]:
    """A line for each public member that only one of the two has, or that differs in them.

    own: what the fake offers to tests alone; None: it may have anything else.
    """
    expected, actual = _public_members(interface), _public_members(fake)
    missing = sorted(expected.keys() - actual.keys())
    foreign = [] if own is None else sorted(actual.keys() - expected.keys() - {*own})
    vain = sorted({*(own or ())} - (actual.keys() - expected.keys()))
    shared = sorted(expected.keys() & actual.keys())
    return [
        *(f"{fake.__name__} has no {name}" for name in missing),
        *(f"{interface.__name__} has no {name}" for name in foreign),
        *(
            f"{name}: expected {_shape(expected[name])}, got {_shape(actual[name])}"
            for name in shared
            if _shape(expected[name]) != _shape(actual[name])
        ),
        *(f"{fake.__name__} has no {name} of its own" for name in vain),
    ]


def require_call(worker_class: type, method: str, arguments: Sequence[Any]) -> None:
    """Raises: AssertionError unless the class has the method and it takes such arguments."""
    function: Any = getattr(worker_class, method, None)
    known = inspect.isroutine(function) and not method.startswith("_")
    assert known, f"{worker_class.__name__} has no method {method!r}"
    try:
        inspect.signature(function).bind(None, *arguments)
    except TypeError as error:
        raise AssertionError(
            f"{worker_class.__name__}.{method} takes {inspect.signature(function)}, got "
            f"{len(arguments)} arguments: {error}"
        ) from error


def _public_members(kind: type) -> dict[str, Any]:
    """Methods and properties by name; __call__ where the class itself defines it."""
    named = {name: inspect.getattr_static(kind, name) for name in dir(kind)}
    return {
        name: member
        for name, member in named.items()
        if name == "__call__" or (not name.startswith("_") and _is_member(member))
    }


def _is_member(member: Any) -> bool:
    return isinstance(member, property) or inspect.isroutine(member)


def _shape(member: Any) -> str:
    """What a caller must know: a property, or the names, kinds and defaults of the parameters."""
    if isinstance(member, property):
        return "a property"
    if not callable(member):
        return f"a {type(member).__name__}"
    parameters = inspect.signature(member).parameters.values()
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    return str(inspect.Signature(bare))

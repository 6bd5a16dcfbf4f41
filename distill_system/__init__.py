"""Distil a large language model into a small one by adversarial moment matching, on Ray.

`distill` runs what `distill-system train` does and returns what it left; `configure` checks a
configuration. They are imported when they are first asked for, so that `import distill_system`
costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill_system.api import DistillResult, configure, distill

__version__ = "0.1.0"
__all__ = ["DistillResult", "__version__", "configure", "distill"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from distill_system import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""A template and its values in, one self-contained HTML page out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from distill_system.observe.formats import format_metric, format_signed, format_value
from distill_system.observe.live import format_duration


def render_page(
    template: str,
    values: Mapping[str, Any],
    *,
    filters: Mapping[str, Callable[..., str]] | None = None,
) -> str:
    """The page as text; everything in the values is escaped.

    template: its path below the package, as observe/report.html; it extends observe/page.html,
        which has the style; observe/chart.html has the macros for charts.
    values: a value for every name in the template.
    filters: additions to number, signed, duration and metric_title.
    Raises: jinja2.UndefinedError if the template uses a name that has no value.
    """
    environment = Environment(
        loader=PackageLoader("distill_system", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": format_value,
        "signed": format_signed,
        "duration": format_duration,
        "metric_title": format_metric,
        **(filters or {}),
    }
    return environment.get_template(template).render(**values)

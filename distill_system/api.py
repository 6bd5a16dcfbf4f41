"""The Python interface: `from distill_system import distill; result = distill("mine.yaml")`.

What the command line does, with the same checks and messages, as a function that returns what the
run left behind. Nothing heavy is imported before a configuration has been checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from distill_system.config import RunConfig, dump_config, load_config
from distill_system.config.recipes import recipe_path

Settings = RunConfig | str | Path | Mapping[str, Any] | Sequence[str | Path | Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillResult:
    """What a finished run left behind.

    run: its folder, of a curriculum that of its last stage.  student: the exported student, which
    transformers and vLLM load.
    summary: the figures of summary.json (docs/metrics.md).
    metrics: stage -> a row for each step, in order: {"step": s, metric: value}; a value that was
        not finite is None.
    """

    run: Path
    student: Path
    summary: Mapping[str, Any] = field(repr=False)
    metrics: Mapping[str, Sequence[Mapping[str, float | None]]] = field(repr=False)

    def scores(self, split: str) -> dict[str, float | None]:
        """Scores of the student after distillation on one of data.evaluation, by metric."""
        return {name: score["after"] for name, score in self.summary["scores"][split].items()}


def configure(
    config: Settings, *overrides: str, objective: str | None = None, **keys: Any
) -> RunConfig:
    """A checked configuration.

    config: a RunConfig, a mapping of keys as in YAML, a YAML or JSON file, or several files
        and mappings, the later ones on top.
    overrides: single keys as on the command line, "distill.steps=50".
    objective: a method by name, such as "gkd", over config.
    keys: whole sections or top keys, `name="mine"`, over everything but overrides.
    Raises: ConfigError, with every problem of the configuration at once.
    """
    layers: list[str | Path | Mapping[str, Any]]
    if isinstance(config, RunConfig):
        layers = [json.loads(dump_config(config))]
    elif isinstance(config, str | Path | Mapping):
        layers = [config]
    else:
        layers = list(config)
    layers = [Path(f).expanduser() if isinstance(f, str | Path) else f for f in layers]
    if objective is not None:
        layers.append(recipe_path(objective))
    if keys:
        layers.append(keys)
    return load_config(layers, overrides)


def distill(
    config: Settings,
    *overrides: str,
    objective: str | None = None,
    resume: bool | Literal["auto"] = False,
    **keys: Any,
) -> DistillResult:
    """Fine-tune, distil, evaluate and report, as `distill-system train` does; wait for the end.

    Stages whose output exists are skipped. Workers are processes of their own: a script that calls
    this needs no `if __name__ == "__main__"`.

    config, overrides, objective, keys: see configure.
    resume: continue unfinished stages from their newest checkpoints; "auto": or begin the run.
    Raises: DistillError with one message for the person; every worker is ended first.
    """
    checked = configure(config, *overrides, objective=objective, **keys)
    # After the configuration is checked: these imports take many seconds.
    from distill_system.observe.metrics import read_metrics
    from distill_system.observe.run_directory import read_json
    from distill_system.stages.curriculum import train_all

    run = train_all(checked, resume=resume)
    metrics: dict[str, list[dict[str, float | None]]] = {}
    for row in read_metrics(run):
        metrics.setdefault(row.stage, []).append({"step": row.step, **row.metrics})
    return DistillResult(
        run=run.path,
        student=run.student_directory,
        summary=read_json(run.summary_path),
        metrics=metrics,
    )

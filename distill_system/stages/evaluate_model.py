"""`distill-system evaluate --model`: any model on the evaluation sets of a configuration.

In: a configuration and a model's folder or hub name.  Out: a JSON file of scores. It needs no run:
the sets may be others than a run was trained beside, the model need not come from one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from distill_system.cluster import ClusterSession, require_room
from distill_system.config import RunConfig
from distill_system.config.base import check_path
from distill_system.config.data import PretrainedTokenizer
from distill_system.config.distill import DistillConfig
from distill_system.config.model import ModelConfig
from distill_system.data import build_tokenizer
from distill_system.driver.standing_pools import score_model
from distill_system.errors import ConfigError
from distill_system.evaluation import SplitEvaluation, check_evaluation
from distill_system.observe import LiveView
from distill_system.observe.formats import format_metric, format_value
from distill_system.observe.run_directory import RunDirectory, write_json
from distill_system.run.model_checks import check_folders, check_models
from distill_system.run.model_data import load_model_data


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedModel:
    """A model's scores, and the file that holds them with every example."""

    model: str
    path: Path
    splits: dict[str, SplitEvaluation]


def evaluate_model(
    config: RunConfig, model: str, *, out: Path | None = None, notify: Callable[[str], None] = print
) -> EvaluatedModel:
    """Let a model answer data.evaluation, and score it by evaluation.metrics.

    Prompts are tokenised by the model's own tokenizer. Engine and workers are those of the student:
    rollout.student_engine, pools.evaluation or pools.student_rollout.

    model: folder or hub name; of a run's folder its student is taken.
    out: the file to write; None: in the folder of the run that the configuration names.
    Raises: DistillError with one message for the person; every worker is ended first.
    """
    for option, given in (("--model", model), ("--out", "" if out is None else str(out))):
        _require_path(option, given)
    if out is not None and out.is_dir():
        raise ConfigError(f"--out {out}: expected a file for the scores, got a folder")
    require_room(config, ["student_rollout" if config.pools.evaluation is None else "evaluation"])
    model = _resolve(model)
    config = _of_one_model(config, model)
    check_folders(config)
    tokenizer = build_tokenizer(config, None)
    check_models(config, tokenizer)
    data = load_model_data(config, tokenizer, ["evaluation"])
    check_evaluation(config.evaluation, data.evaluation, data.places)
    path = _default_path(config, model) if out is None else out
    with LiveView(f"{config.name}: {model}") as view:
        counts = ", ".join(f"{name} ({len(split)})" for name, split in data.evaluation.items())
        view.note(f"evaluating {model} on {counts}")
        with ClusterSession(config, notify=view.note) as cluster:
            splits = score_model(
                config, cluster, tokenizer, path=model, splits=data.evaluation, notify=view.note
            )
    form = {name: split.to_json() for name, split in splits.items()}
    write_json(path, {"model": model, "time": time.time(), "splits": form})
    notify(f"evaluation: {path}")
    return EvaluatedModel(model=model, path=path, splits=splits)


def render_scores(evaluated: EvaluatedModel) -> Table:
    """A row for each score of each split, with its standard error, for a rich console."""
    table = Table(title=f"scores of {evaluated.model}", title_justify="left")
    for heading in ("split", "examples", "score", "mean", "±"):
        is_number = heading in ("examples", "mean", "±")
        table.add_column(heading, justify="right" if is_number else "left")
    for name, split in evaluated.splits.items():
        for score, estimate in split.scores.items():
            spread = format_value(estimate.stderr, 1)
            row = (str(split.num_examples), format_metric(score), format_value(estimate.mean, 1))
            table.add_row(Text(name), *row, spread)
    return table


def _require_path(option: str, path: str) -> None:
    try:
        check_path(path)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from error


def _resolve(model: str) -> str:
    """An absolute folder, since workers stand elsewhere; of a run's folder that of its student."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return model
    student = RunDirectory(folder).student_directory
    is_run = student.is_dir() and RunDirectory(folder).metrics_path.exists()
    return str((student if is_run else folder).absolute())


def _of_one_model(config: RunConfig, path: str) -> RunConfig:
    """The configuration with this model in both places, and nothing to learn.

    Checks and data then speak of this model alone.
    """
    trusted = config.student.trust_remote_code
    model = ModelConfig(path=path, trust_remote_code=trusted)
    distill = DistillConfig(steps=1, optimizer=config.distill.optimizer)
    data = config.data.model_copy(update={"teacher_context": None})
    changes = {"teacher": model, "student": model, "distill": distill, "data": data}
    return config.model_copy(update={**changes, "tokenizer": PretrainedTokenizer()})


def _default_path(config: RunConfig, model: str) -> Path:
    run = RunDirectory(Path(config.runs_directory).absolute() / config.name)
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(Path(model).parts[-2:])).strip("-.")
    return run.evaluation_path(f"model_{label}")

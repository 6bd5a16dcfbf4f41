"""Prepares a run before any worker starts: its folder, its tokenizer, checks of its models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from distill_system.config import RunConfig, dump_config, load_config
from distill_system.data import build_tokenizer, tokenizer_texts
from distill_system.errors import ConfigError, RunStateError
from distill_system.job_process import is_job
from distill_system.language_model import one_line
from distill_system.observe import RunDirectory, write_environment
from distill_system.observe.recorded import flatten, read_config
from distill_system.observe.run_directory import remove_half_written, write_text
from distill_system.run.model_checks import check_folders, check_models

MAY_CHANGE = (
    "deadlines",
    "faults",
    "pools",
    "scaling",
    "cluster",
    "data.cache_directory",
    "data.max_memory_mebibytes",
    "evaluation",
    "learner.activation_checkpointing",
    "learner.max_tokens_per_microbatch",
    "learner.offload",
    "learner.shard_ranks",
    "scoring.shard_ranks",
    "runs_directory",
    "runs_mirror",
    "trackers",
    "distill.measure_every",
    "distill.evaluate_every",
    "distill.checkpoint_every",
    "distill.keep_checkpoints",
    "distill.keep_best",
    "distill.early_stopping",
    "distill.collapse",
    "export",
    "hub",
    "logging",
)
"""Keys that may differ when a run is continued: they do not change what a step learns, apart from
rounding (another number of ranks or another microbatch size adds up in another order)."""

_DAY = "data.chat_date"


def run_directory(config: RunConfig) -> RunDirectory:
    """The run's folder, which need not exist yet.

    Raises: ConfigError for a relative runs_directory in a submitted job.
    """
    if is_job():
        require_lasting_folder(config)
    # Absolute, because Ray may start workers in another working directory.
    return RunDirectory(Path(config.runs_directory).absolute() / config.name)


def open_run(config: RunConfig) -> RunDirectory:
    """Find the run's folder, which need not exist yet.

    The caller holds the folder's lock: the tokenizer of another configuration is removed.
    Raises: RunStateError if the folder holds work of another configuration.
    """
    run = run_directory(config)
    if run.config_path.exists():
        _require_same(run, config)
    elif found := _find_work(run):
        raise RunStateError(
            f"{run.path} holds work ({found[0].name}) and no {run.config_path.name}, which says of "
            "which configuration. Put that file back, or give the run another name (name=...)"
        )
    return run


def require_begun(run: RunDirectory) -> None:
    """Refuse to go on with a run that has not begun.  Raises: RunStateError."""
    if not run.config_path.exists():
        raise RunStateError(
            f"--resume: nothing to go on from, {run.path} holds no run. Check name and "
            "runs_directory; `--resume auto` begins a run where there is none"
        )


def require_lasting_folder(config: RunConfig) -> None:
    """Refuse a runs_directory that starts from a job's own folder.

    Raises: ConfigError.
    """
    if not Path(config.runs_directory).is_absolute():
        raise ConfigError(
            f"runs_directory={config.runs_directory!r}: a job runs in a folder that Ray makes for "
            "it and removes, and checkpoints, student and report would go with it. Give an "
            "absolute path that every node of the cluster reaches, such as "
            "runs_directory=/shared/runs"
        )


def with_chat_date(config: RunConfig, run: RunDirectory) -> RunConfig:
    """The configuration with the day that chat templates are told, for all lives of the run.

    It is data.chat_date; where that is null, the day on which the run began.
    """
    if config.data.chat_date is not None:
        return config
    recorded = flatten(_read_recorded(run)).get(_DAY) if run.config_path.exists() else None
    try:
        return on_day(config, date.fromisoformat(recorded) if recorded else date.today())
    except (TypeError, ValueError) as error:
        raise RunStateError(
            f"{run.config_path}, {_DAY}: expected a day such as 2026-01-31, got {recorded!r}. Put "
            "back the configuration with which the run began"
        ) from error


def on_day(config: RunConfig, day: date) -> RunConfig:
    """The configuration with this day for chat templates, unless it names one."""
    data = config.data.model_copy(update={"chat_date": config.data.chat_date or day})
    return config.model_copy(update={"data": data})


def record_start(config: RunConfig, run: RunDirectory) -> None:
    """Record what runs: the resolved configuration, versions, git commit, machine, seeds.

    Raises: RunStateError if the folder cannot be written.
    """
    try:
        remove_half_written(run.path)
        write_text(run.config_path, dump_config(config) + "\n")
        write_environment(run, seeds={"seed": config.seed})
    except OSError as error:
        raise RunStateError(
            f"the run's folder {run.path} cannot be written: {error}. Give another runs_directory"
        ) from error


@contextmanager
def refusal_leaves_nothing(run: RunDirectory) -> Iterator[Callable[[], None]]:
    """Take back what was written of the run, if the block fails before it calls what it is given.

    A run that is refused leaves its folder as it was, and none where there was none. The block
    calls the function once its workers may start: from there on the folder keeps what happened.
    """
    absent = [path for path in (run.path, *run.path.parents) if not path.exists()]
    held = {path.name for path in run.path.iterdir()} if run.path.is_dir() else set()
    recorded = (run.config_path, run.environment_path)
    contents = {path: path.read_bytes() for path in recorded if path.is_file()}
    begun: list[bool] = []
    try:
        yield lambda: begun.append(True)
    except BaseException:
        if not begun and run.path.is_dir():
            with suppress(OSError):  # what the block failed with says more
                _take_back(run, held, contents)
                for folder in absent:
                    folder.rmdir()
        raise


def _take_back(run: RunDirectory, held: set[str], contents: dict[Path, bytes]) -> None:
    """Leave what the folder held, and the two files that are written anew as they were."""
    for path in run.path.iterdir():
        if path.name not in held and path.is_dir():
            shutil.rmtree(path)
        elif path.name not in held:
            path.unlink()
    for path, content in contents.items():
        path.write_bytes(content)


def _require_same(run: RunDirectory, config: RunConfig) -> None:
    old, new = flatten(_read_recorded(run)), flatten(json.loads(dump_config(config)))
    if new[_DAY] is None:  # the run keeps the day on which it began
        new[_DAY] = old.get(_DAY)
    changed = [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _may_change(key)
    ]
    # Without work there is nothing that could be mixed up, as after a run that failed to start.
    if changed and _has_work(run):
        sets_alone = all(line.startswith("data.evaluation.") for line in changed)
        raise RunStateError(
            f"{run.path} holds work of another configuration: {'; '.join(changed)}. Give the run "
            f"another name (name=...), or remove {run.path}"
            + (
                ". Other sets are evaluated beside a run by `distill-system evaluate ... --model "
                f"{run.path}`"
                if sets_alone
                else ""
            )
        )
    if changed:
        # Nothing else was made from the old configuration.
        shutil.rmtree(run.tokenizer_directory, ignore_errors=True)
        shutil.rmtree(run.models_directory, ignore_errors=True)


def _read_recorded(run: RunDirectory) -> Any:
    """The configuration that the run began with, read with the present version of the models.

    A key that was added to the package since then gets its default, which is what the run did. A
    file that the present version refuses is compared as it is.
    """
    try:
        return json.loads(dump_config(load_config([run.config_path])))
    except ConfigError:
        return read_config(run)


def _has_work(run: RunDirectory) -> bool:
    """Whether anything was learned or measured; a tokenizer alone does not count."""
    return bool(_find_work(run)) or run.evaluations_directory.exists()


def _find_work(run: RunDirectory) -> list[Path]:
    """What was learned or measured of the student.

    The teacher's evaluation does not count: a comparison copies it to runs that have not begun.
    """
    models = (run.teacher_directory, run.student_sft_directory, run.student_directory)
    measured = [run.evaluation_path(label) for label in ("before", "after")]
    made = (*models, run.checkpoints_directory, *measured)
    return [path for path in made if path.exists()]


def _may_change(key: str) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in MAY_CHANGE)


def prepare_tokenizer(config: RunConfig, run: RunDirectory) -> Any:
    """The run's tokenizer: loaded from its folder, or built and saved there the first time.

    Raises: ModelError if tokenizer, teacher and student do not belong together or do not fit the
        run; ConfigError for an architecture that does not fit it.
    """
    check_folders(config)
    if config.data.chat_template is not None and not _has_work(run):
        # The file of the template may have been mended since the run failed to start.
        shutil.rmtree(run.tokenizer_directory, ignore_errors=True)
    if run.tokenizer_directory.exists():
        tokenizer = _load_own_tokenizer(config, run)
        check_models(config, tokenizer)
        return tokenizer
    tokenizer = build_tokenizer(config, tokenizer_texts(config))
    check_models(config, tokenizer)
    partial = run.tokenizer_directory.with_suffix(".partial")
    tokenizer.save_pretrained(partial)
    partial.rename(run.tokenizer_directory)
    return tokenizer


def _load_own_tokenizer(config: RunConfig, run: RunDirectory) -> Any:
    """The tokenizer that this run saved; it may carry the teacher's own code."""
    try:
        return AutoTokenizer.from_pretrained(
            run.tokenizer_directory, trust_remote_code=config.teacher.trust_remote_code
        )
    except Exception as error:  # the tokenizers library raises plain Exception for a broken file
        raise RunStateError(
            f"the run's tokenizer {run.tokenizer_directory} cannot be read: {one_line(error)}. "
            "Remove that folder: the same command makes it again"
        ) from error

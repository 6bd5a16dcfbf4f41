"""A whole configuration, run: the stages of its curriculum one after another, or the one run.

    stage 1 --> student --> stage 2 --> student --> ... --> summary.json and report.html of all

Every stage is an ordinary run in a folder of its own, runs/NAME/1_STAGE, and can be looked at,
evaluated and gone on with alone: `distill-system evaluate runs/NAME/1_STAGE/config.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal

from distill_system.cluster import require_room
from distill_system.config import RunConfig, load_stages, require_one_run
from distill_system.config.curriculum import Stage
from distill_system.data import build_tokenizer, load_run_data, tokenizer_texts
from distill_system.errors import DistillError
from distill_system.evaluation import check_evaluation
from distill_system.observe import RunDirectory, require_trackers, write_curriculum
from distill_system.observe.run_directory import read_json, write_json
from distill_system.observe.run_lock import locked
from distill_system.run.mirror import mirrored
from distill_system.run.model_checks import check_data, check_engine, check_folders, check_models
from distill_system.run.preparation import (
    open_run,
    record_start,
    refusal_leaves_nothing,
    require_begun,
    run_directory,
    with_chat_date,
)
from distill_system.stages.closed_form import measure_label_weight, with_label_weight
from distill_system.stages.push import require_token
from distill_system.stages.train import STAGES, find_sets, require_a_run, train
from distill_system.stopping import StopRequest

LABEL_WEIGHT_FILE = "label_weight.json"
"""In the folder of a stage whose objective has a weight in closed form."""


def train_all(
    config: RunConfig,
    *,
    resume: bool | Literal["auto"] = False,
    stages: Collection[str] = STAGES,
    notify: Callable[[str], None] = print,
    stop: StopRequest | None = None,
) -> RunDirectory:
    """Train a configuration: its one run, or every stage of its curriculum that is not done.

    The arguments are those of `train`; a resumed curriculum goes on inside the stage it was in.
    Returns the run's folder, or that of the last stage.
    Raises: DistillError with one message for the person; every worker is ended first.
    """
    if not config.curriculum:
        return train(config, resume=resume, stages=stages, notify=notify, stop=stop)
    if "report" not in stages:
        require_one_run(config, f"{' '.join(stages)} alone")
    folder = run_directory(config)
    with locked(folder, notify=notify), mirrored(config, folder, notify=notify):
        run = open_run(config)
        trains = "distill" in stages
        if resume is True:
            require_begun(run)
        elif not trains:
            require_a_run(run)
        config = with_chat_date(config, run)
        each = load_stages(config)
        if trains:
            with refusal_leaves_nothing(run) as begin:
                record_start(config, run)
                _check(each)
                begin()
        folders = {stage.name: run_directory(stage.config) for stage in each}
        for number, stage in enumerate(each, start=1):
            if not trains and not folders[stage.name].config_path.exists():
                break  # it has not come to this one
            notify(f"stage {number} of {len(each)}: {stage.name}")
            going_on: bool | Literal["auto"] = "auto" if resume else False
            ready = _with_label_weight(stage, notify) if trains else stage.config
            train(ready, resume=going_on, stages=stages, notify=notify, stop=stop)
            write_curriculum(run, folders)
    notify(f"curriculum: {run.report_path}")
    return folders[each[-1].name]


def _with_label_weight(stage: Stage, notify: Callable[[str], None]) -> RunConfig:
    """The stage's run, with the weight that earlier stages determine: measured once, then kept."""
    if stage.label_weight is None:
        return stage.config
    kept = run_directory(stage.config).path / LABEL_WEIGHT_FILE
    if not kept.exists():
        labels, teacher = stage.label_weight
        weight = measure_label_weight(stage.config, labels, teacher, notify=notify)
        write_json(kept, {"label_weight": weight})
    return with_label_weight(stage.config, float(read_json(kept)["label_weight"]))


def _check(stages: Sequence[Stage]) -> None:
    """Look at models and data of every stage that has not begun, with models that are there.

    The first stage does so itself as it begins.
    Raises: DistillError that names the stage.
    """
    if stages[-1].config.hub is not None:
        require_token(stages[-1].config)
    for stage in stages[1:]:
        if run_directory(stage.config).config_path.exists():
            continue
        try:
            _check_run(stage.planned)
        except DistillError as error:
            raise type(error)(f"curriculum, stage {stage.name!r}: {error}") from error


def _check_run(config: RunConfig) -> None:
    """What `train` looks at before its cluster starts, without a folder."""
    check_engine(config)
    require_trackers(config.trackers)
    check_folders(config)
    tokenizer = build_tokenizer(config, tokenizer_texts(config))
    check_models(config, tokenizer)
    # Without the store, whose samples are a teacher's that may not be there yet.
    sets = [each for each in find_sets(config, run_directory(config), STAGES) if each != "stored"]
    data = load_run_data(config, tokenizer, sets)
    check_data(config, data)
    check_evaluation(config.evaluation, data.evaluation, data.places)
    require_room(config)

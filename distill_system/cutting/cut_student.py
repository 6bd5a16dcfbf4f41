"""`distill-system cut`: a student for a run, cut from the run's teacher.

In: a configuration whose teacher exists and whose student.path does not.  Out: that folder, in
Hugging Face form, with cut.json, which says what was kept. Rows of data.student_sft say what
matters, unless blocks are spread evenly. It runs in this process, on its GPU if it has one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.utils import logging

from distill_system.config import RunConfig, require_one_run
from distill_system.cutting.importance import Importance, all_alike, measure_importance, read_loss
from distill_system.cutting.layouts import require_layouts
from distill_system.cutting.surgery import Choice, Shape, check_shape, cut_model
from distill_system.data import build_tokenizer, load_run_data, tokenizer_texts
from distill_system.errors import ConfigError, ModelError, RunStateError
from distill_system.language_model import LanguageModel, load_language_model
from distill_system.records import Trajectory

CUT_RECORD = "cut.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class CutRequest:
    """The arguments of `distill-system cut`; sizes that are None stay the teacher's.

    blocks: which go, evenly spread ones or the least important.  num_rows: rows that are read.
    """

    config: RunConfig
    num_layers: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_heads: int | None = None
    num_key_value_heads: int | None = None
    blocks: Literal["even", "important"] = "even"
    num_rows: int = 128

    @property
    def narrows(self) -> bool:
        """Whether a width is asked for."""
        widths = (self.hidden_size, self.intermediate_size, self.num_heads)
        return any((*widths, self.num_key_value_heads))

    @property
    def is_measured(self) -> bool:
        """Whether rows say what is kept."""
        return self.blocks == "important" or self.narrows


@dataclass(frozen=True, slots=True)
class CutReport:
    """What a cut made.

    parameters: millions, of teacher and student.  losses: mean cross-entropy of the rows' response
    tokens in nats, of teacher and student; None where no rows say what is kept.
    """

    folder: Path
    parameters: tuple[float, float]
    losses: tuple[float, float] | None


def cut_student(request: CutRequest) -> CutReport:
    """Cut the student and write its folder, by a rename: it is complete or absent.

    Raises: ConfigError or DataError before the teacher is read, where the configuration or its data
        do not allow it; ModelError if it cannot be read, or not be cut to this shape; RunStateError
        if the disk does not take it.
    """
    logging.disable_progress_bar()
    config = request.config
    require_one_run(config, "cut")
    if not (request.num_layers or request.narrows):
        raise ConfigError(
            "cut: expected a size that is smaller than the teacher's, got none: give --layers, "
            "--hidden-size, --intermediate-size, --heads or --key-value-heads"
        )
    teacher, folder = _find_models(config)
    day = config.data.chat_date or date.today()
    config = config.model_copy(update={"data": config.data.model_copy(update={"chat_date": day})})
    tokenizer = build_tokenizer(config, tokenizer_texts(config))
    texts = _read_texts(request, config, tokenizer) if request.is_measured else ()
    model, name = _load(config, teacher), f"teacher.path={teacher!r}"
    whole = Shape.of(model)
    wanted = _shape(request, whole)
    check_shape(model, wanted, name)
    if request.is_measured:
        require_layouts(model, name)
    importance = measure_importance(model, texts) if texts else _unmeasured(whole)
    choice = Choice.best(whole, wanted, importance, spread_blocks=request.blocks == "even")
    student = cut_model(model, wanted, choice)
    _save(student, tokenizer, folder, {"teacher": teacher, "kept": _lists(choice)})
    return CutReport(
        folder=folder,
        parameters=(_millions(model), _millions(student)),
        losses=(_mean_loss(model, texts), _mean_loss(student, texts)) if texts else None,
    )


def _find_models(config: RunConfig) -> tuple[str, Path]:
    """The teacher that is cut and the folder that is written.  Raises: ConfigError."""
    if config.teacher.path is None:
        raise ConfigError(
            "teacher.path: a student is cut from a teacher that exists, and this one is to be "
            "trained first. Train it (`distill-system sft`), and give teacher.path=RUN/teacher"
        )
    if config.student.path is None:
        raise ConfigError("student.path: expected the folder that the cut student is written to")
    folder = Path(config.student.path)
    if folder.exists():
        raise ConfigError(
            f"student.path={config.student.path!r} exists already: remove it, or give another one"
        )
    return config.teacher.path, folder


def _read_texts(request: CutRequest, config: RunConfig, tokenizer: Any) -> Sequence[Trajectory]:
    if config.data.student_sft is None:
        raise ConfigError(
            "data.student_sft: expected rows with responses, by which blocks, heads, neurons and "
            "units are chosen, got null. Give some, or spread the blocks evenly (--layers alone)"
        )
    rows = load_run_data(config, tokenizer, ["student_sft"]).student_sft
    return rows[: request.num_rows]


def _load(config: RunConfig, path: str) -> LanguageModel:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trusted = config.teacher.trust_remote_code
    model = load_language_model(path, dtype=torch.float32, device=device, trust_remote_code=trusted)
    if model.config.is_encoder_decoder:
        raise ModelError(
            f"teacher.path={path!r}: students are cut from decoders alone, and this model has an "
            "encoder. Give a student's folder"
        )
    return model


def _shape(request: CutRequest, whole: Shape) -> Shape:
    """The teacher's sizes but for those that were asked for; a head's width stays."""
    sizes = {name: getattr(request, name) for name in asdict(whole)}
    wanted = replace(whole, **{name: size for name, size in sizes.items() if size is not None})
    if request.num_heads is not None and request.num_key_value_heads is None:
        queries = whole.num_heads // whole.num_key_value_heads
        wanted = replace(wanted, num_key_value_heads=max(1, request.num_heads // queries))
    return wanted


def _unmeasured(whole: Shape) -> Importance:
    return all_alike(whole.num_layers, whole.hidden_size, whole.num_heads, whole.intermediate_size)


def _mean_loss(model: LanguageModel, texts: Sequence[Trajectory]) -> float:
    with torch.no_grad():
        return sum(float(read_loss(model, text)) for text in texts) / len(texts)


def _millions(model: LanguageModel) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def _lists(choice: Choice) -> dict[str, Any]:
    return {name: kept.tolist() for name, kept in asdict(choice).items()}


def _save(model: LanguageModel, tokenizer: Any, folder: Path, record: dict[str, Any]) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / CUT_RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunStateError(
            f"the student cannot be written to {folder}: {error}. Give another student.path"
        ) from error

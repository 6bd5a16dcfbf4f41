"""`distill-system select`: the rows of a set that a teacher knows better than a smaller reference.

In: a set of rows, the run's teacher and a reference model.  Out: a folder with the rows that are
kept, each with its score, and what both models say of every row, so that a command that was killed
goes on and another share costs nothing.

    score(row) = mean over its learned tokens of  log p_teacher - log p_reference         nats

Source: the difference of losses of MiniPLM (arXiv 2410.17215). Differs: a row is scored by itself,
with its prompt if it has one, where the paper scores windows of a packed corpus.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
import pyarrow

from distill_system.cluster import ClusterSession
from distill_system.config import RunConfig
from distill_system.config.model import ModelConfig
from distill_system.config.objective import TeacherNeeds
from distill_system.data import Example, TargetStore, fingerprint_model, load_run_data
from distill_system.data.fingerprints import fingerprint_prompt
from distill_system.data.set_reader import PLAIN_TEXT, SetReader
from distill_system.data.stored_rows import TRAJECTORY_SCHEMA, trajectory_columns
from distill_system.errors import ConfigError, ModelError
from distill_system.observe import LiveView
from distill_system.offline.cached_targets import compute_targets, require_single_ranks
from distill_system.offline.opening import opened
from distill_system.records import Author, Trajectory
from distill_system.run.model_checks import check_folders, check_models
from distill_system.run.sample_origin import sample_origin
from distill_system.run.vocabulary import stop_token_ids
from distill_system.run.worker_requests import scorer_arguments

LearnedSet = Literal["plain_text", "student_sft", "teacher_sft"]

LOGPROBS = TeacherNeeds(logprobs=True)
ROWS_PER_CALL = 1024
ROWS_READ_AT_ONCE = 4096
EXTREMES = 5
BINS, BAR, MOST_SHOWN = 12, 40, 100


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectRequest:
    """The arguments of `distill-system select`.

    reference: folder or hub name of a model that shares the teacher's tokenizer.
    out: folder.  rows: the set; None: data.plain_text where it is given, else data.student_sft.
    keep: share of the rows that is kept, the best first.  at_least: keep by score instead, nats.
    """

    config: RunConfig
    reference: str
    out: Path
    rows: LearnedSet | None = None
    keep: float = 0.5
    at_least: float | None = None


@dataclass(frozen=True, slots=True)
class RowScore:
    """What both models say of a row: mean log-probability of its learned tokens, nats."""

    row_id: str
    teacher: float
    reference: float

    @property
    def score(self) -> float:
        """By how much the teacher finds it likelier, nats per token."""
        return self.teacher - self.reference


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSelection:
    """scores: of all rows, in their order.  kept: ids.  path: the file of the rows kept.
    best, worst: a few scores with their examples."""

    scores: tuple[RowScore, ...]
    kept: frozenset[str]
    path: Path
    best: tuple[tuple[RowScore, Example], ...]
    worst: tuple[tuple[RowScore, Example], ...]


def select(request: SelectRequest) -> RowSelection:
    """Score what has not been scored, choose, and write the rows that are kept.

    Raises: DistillError with one message for the person; every worker is ended first, and what was
        scored is in the folder.
    """
    require_single_ranks(request.config, "select")
    name, out = _set_name(request), request.out.absolute()
    with opened(request.config, "select", pools=["teacher_scoring"]) as (config, run, tokenizer):
        reference = _resolve(request.reference)
        _check_reference(config, reference, tokenizer)
        teacher = sample_origin(config, run, tokenizer, Author.TEACHER).model
        ends = stop_token_ids(config, tokenizer)
        data = load_run_data(config, tokenizer, [name], stop_token_ids=ends)
        rows: Sequence[Trajectory] = getattr(data, name)
        stores = {path: _open_store(config, out, path) for path in (teacher, reference)}
    with LiveView(f"{config.name}: {out}") as view:
        view.note(f"{len(rows)} sequences of data.{name}, read by {teacher} and by {reference}")
        _fill(config, tokenizer, rows, stores, view)
    scores = score_rows(rows, stores[teacher], stores[reference])
    kept = choose(scores, keep=request.keep, at_least=request.at_least)
    if not kept:
        raise ConfigError(
            f"--at-least {request.at_least}: no row of data.{name} scores as much, the best has "
            f"{max(each.score for each in scores):.4f} nats per token; lower it"
        )
    by_score = sorted(scores, key=lambda each: each.score)
    best, worst = by_score[::-1][:EXTREMES], by_score[:EXTREMES]
    shown = {each.row_id: each for each in (*best, *worst)}
    path, examples = out / "kept.jsonl", dict[str, Example]()
    reader = SetReader(config, tokenizer, ends)
    batches = reader.row_batches(name, getattr(config.data, name), name != PLAIN_TEXT)
    said = {each.row_id: each for each in scores if each.row_id in kept}
    with _replaced(path) as file:
        for row in chain.from_iterable(batches):
            if row.row_id in shown:
                examples[row.row_id] = row.example
            if row.row_id in said:
                form = _form(row.example, said[row.row_id], is_text=name == PLAIN_TEXT)
                file.write(json.dumps(form, ensure_ascii=False) + "\n")
    return RowSelection(
        scores=tuple(scores),
        kept=kept,
        path=path,
        best=tuple((each, examples[each.row_id]) for each in best),
        worst=tuple((each, examples[each.row_id]) for each in worst),
    )


def score_rows(
    rows: Sequence[Trajectory], teacher: TargetStore, reference: TargetStore
) -> list[RowScore]:
    """A score a row, in order; all pieces of a long text are one row."""
    sums: dict[str, list[float]] = {}
    for start in range(0, len(rows), ROWS_READ_AT_ONCE):
        some = rows[start : start + ROWS_READ_AT_ONCE]
        keys, names = [_key(row) for row in some], [row.trajectory_id for row in some]
        read = zip(some, teacher.read(keys, names), reference.read(keys, names), strict=True)
        for row, *said in read:
            total = sums.setdefault(row.prompt_id, [0.0, 0.0, 0.0])
            for at, targets in enumerate(said):
                assert targets.logprobs is not None, "they were asked for"
                total[at] += float(targets.logprobs.sum(dtype=np.float64))
            total[2] += row.num_response_tokens
    return [RowScore(name, a / count, b / count) for name, (a, b, count) in sums.items()]


def choose(
    scores: Sequence[RowScore], *, keep: float, at_least: float | None = None
) -> frozenset[str]:
    """Ids of the best share of the rows, at least one, or of those with so high a score.

    Of equal ones the earlier row is the better.
    """
    if at_least is not None:
        return frozenset(each.row_id for each in scores if each.score >= at_least)
    best_first = sorted(scores, key=lambda each: -each.score)
    return frozenset(each.row_id for each in best_first[: max(1, round(keep * len(scores)))])


def describe(selection: RowSelection) -> str:
    """What was kept, a histogram of all scores, and the best and worst rows, as lines of text."""
    values = np.array([each.score for each in selection.scores])
    threshold = min(each.score for each in selection.scores if each.row_id in selection.kept)
    lines = [
        f"{len(selection.kept)} of {values.size} rows kept, with a score of {threshold:+.4f} nats "
        f"per token or more; mean of all {values.mean():+.4f}"
    ]
    counts, edges = np.histogram(values, bins=BINS)
    for count, low, high in zip(counts.tolist(), edges, edges[1:], strict=False):
        bar = "█" * round(BAR * count / counts.max())
        lines.append(f"  {low:+9.4f} to {high:+9.4f}  {bar} {count}")
    for title, some in (("best", selection.best), ("worst", selection.worst)):
        lines.append(f"{title}:")
        for each, example in some:
            text = json.dumps(example.prompt, ensure_ascii=False)[:MOST_SHOWN]
            answer = "" if example.answer is None else f" -> {example.answer[:MOST_SHOWN]!r}"
            lines.append(f"  {each.score:+9.4f}  {example.row}: {text}{answer}")
    return "\n".join(lines)


def _set_name(request: SelectRequest) -> LearnedSet:
    data = request.config.data
    default: LearnedSet = "student_sft" if data.plain_text is None else "plain_text"
    name = request.rows or default
    if getattr(data, name) is None:
        raise ConfigError(f"select: the configuration has no rows to choose from, give data.{name}")
    return name


def _resolve(model: str) -> str:
    """An absolute folder, since workers stand elsewhere; a hub name as it is."""
    folder = Path(model).expanduser()
    return str(folder.absolute()) if folder.is_dir() else model


def _check_reference(config: RunConfig, path: str, tokenizer: Any) -> None:
    """Refuse a reference that does not share the teacher's tokenizer or is no whole model."""
    model = ModelConfig(path=path, trust_remote_code=config.student.trust_remote_code)
    asked = config.model_copy(update={"student": model})
    try:
        check_folders(asked)
        check_models(asked, tokenizer)
    except ModelError as error:
        raise ModelError(str(error).replace("student.path", "--reference")) from error


def _open_store(config: RunConfig, out: Path, model: str) -> TargetStore:
    said_by = {"model": fingerprint_model(model), "dtype": config.scoring.dtype}
    return TargetStore(out, json.dumps(said_by | LOGPROBS.model_dump()))


def _key(row: Trajectory) -> str:
    return f"{row.num_prompt_tokens}:{fingerprint_prompt(row.token_ids)}"


def _fill(
    config: RunConfig,
    tokenizer: Any,
    rows: Sequence[Trajectory],
    stores: Mapping[str, TargetStore],
    view: LiveView,
) -> None:
    """Let each model read what it has not read, of rows with equal tokens one; stores by path."""
    places = {_key(row): at for at, row in enumerate(rows)}
    todo = {path: [k for k in places if k not in store] for path, store in stores.items()}
    if not any(todo.values()):
        return
    schema = pyarrow.schema([pyarrow.field("key", pyarrow.string()), *TRAJECTORY_SCHEMA])
    with ClusterSession(config, notify=view.note):
        for path, keys in todo.items():
            done = first = len(places) - len(keys)
            task = view.start(f"read by {Path(path).name}", len(places), first_step=first)
            columns = trajectory_columns([rows[places[key]] for key in keys])
            read = compute_targets(
                config,
                pyarrow.table({"key": keys, **columns}, schema=schema),
                arguments=scorer_arguments(config, tokenizer, path),
                needs=LOGPROBS,
                reading=stores[path].reading,
                most_rows=ROWS_PER_CALL,
            )
            for said in read if keys else ():
                stores[path].append(said)
                done += said.num_rows
                task.update(done, {"rows/s": (done - first) / task.elapsed_seconds})
            task.finish()


@contextmanager
def _replaced(path: Path) -> Iterator[TextIO]:
    """A file that takes the path once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        yield file
    partial.replace(path)


def _form(example: Example, said: RowScore, *, is_text: bool) -> dict[str, Any]:
    """A row with its scores, which a source without `fields` reads as this example."""
    if is_text:
        row: dict[str, Any] = {"text": example.prompt}
    elif isinstance(example.prompt, str):
        accepted = list(example.references)
        several = len(accepted) > 1 and accepted[0] == example.answer
        row = {"prompt": example.prompt, "response": accepted if several else example.answer}
    else:
        answer = example.reply or {"role": "assistant", "content": example.answer}
        tools = {"tools": list(example.tools)} if example.tools else {}
        row = {"messages": [*example.prompt, answer], **tools}
    logprobs = {"teacher_logprob": said.teacher, "reference_logprob": said.reference}
    return {**row, "score": said.score, **logprobs}

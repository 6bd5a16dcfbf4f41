"""Shows a run's data as its models will read it; no worker is started, nothing is written."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from distill_system.config import RunConfig
from distill_system.data import build_tokenizer, tokenizer_texts
from distill_system.data.inspection import SetInspection, inspect_sets
from distill_system.data.set_reader import SetReader
from distill_system.evaluation import check_evaluation
from distill_system.observe import RunDirectory
from distill_system.records import Prompt
from distill_system.run.preparation import with_chat_date
from distill_system.run.vocabulary import stop_token_ids


def show_data(
    config: RunConfig, *, names: Collection[str] = (), num_rows: int = 10
) -> list[SetInspection]:
    """Look at the sets of a run.

    names: only these, such as "prompts" or "evaluation.test"; none takes all.
    num_rows: rows of each that are kept for showing.
    Raises: ModelError if the tokenizer cannot be loaded; DataError for an unknown name.
    """
    run = RunDirectory(Path(config.runs_directory).absolute() / config.name)
    config = with_chat_date(config, run)
    tokenizer = build_tokenizer(config, tokenizer_texts(config))
    reader = SetReader(config, tokenizer, stop_token_ids(config, tokenizer))

    def check(name: str, prompts: Sequence[Prompt], places: Mapping[str, str]) -> None:
        check_evaluation(config.evaluation, {name: prompts}, places)

    return inspect_sets(config.data, reader, tokenizer, names=names, num_rows=num_rows, check=check)

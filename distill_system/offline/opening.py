"""A command that works ahead of a run opens the run's folder and tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from distill_system.cluster import require_room
from distill_system.config import RunConfig, require_one_run
from distill_system.errors import ConfigError
from distill_system.observe import RunDirectory
from distill_system.observe.run_lock import locked
from distill_system.run.model_checks import has_encoder
from distill_system.run.model_sources import with_folders
from distill_system.run.preparation import (
    open_run,
    prepare_tokenizer,
    record_start,
    refusal_leaves_nothing,
    run_directory,
    with_chat_date,
)


@contextmanager
def opened(
    config: RunConfig, command: str, *, pools: Collection[str]
) -> Iterator[tuple[RunConfig, RunDirectory, Any]]:
    """The configuration with the run's day and folders, the run's folder, and its tokenizer.

    The folder is locked while a block plans the work; a failure in it leaves no trace.
    command: for messages.  pools: the workers that it will start.
    Raises: DistillError for what the run could not be either, and for encoder-decoders.
    """
    require_one_run(config, command)
    require_room(config, pools)
    run = run_directory(config)
    with locked(run), refusal_leaves_nothing(run) as begin:
        config = with_chat_date(config, open_run(config))
        record_start(config, run)
        config = with_folders(config, run)
        tokenizer = prepare_tokenizer(config, run)
        if has_encoder(config):
            raise ConfigError(
                f"{command}: the store does not know the prompts of encoder-decoders yet"
            )
        yield config, run, tokenizer
        begin()

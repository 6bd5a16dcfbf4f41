"""A run's data as its models read it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from distill_system.config import RunConfig
from distill_system.data import RunData, SampleOrigin, end_prompts, load_run_data
from distill_system.data.run_data import SetName
from distill_system.run.model_checks import has_encoder


def load_model_data(
    config: RunConfig,
    tokenizer: Any,
    sets: Collection[SetName],
    *,
    stored_by: SampleOrigin | None = None,
    stop_token_ids: Collection[int] = (),
) -> RunData:
    """load_run_data; for encoder-decoders with prompts that end.

    Raises: as load_run_data does; DataError for a prompt that is too long with its end.
    """
    data = load_run_data(
        config, tokenizer, sets, stored_by=stored_by, stop_token_ids=stop_token_ids
    )
    if not has_encoder(config):
        return data
    return end_prompts(data, tokenizer, most_tokens=config.data.max_prompt_tokens)

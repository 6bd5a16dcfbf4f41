"""Exports a model in Hugging Face form: weights, configuration, tokenizer, model card."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from transformers import GenerationConfig

from distill_system.errors import RunStateError
from distill_system.learner import LearnerGroup
from distill_system.run.context import RunContext
from distill_system.run.vocabulary import stop_token_ids


def export_model(
    context: RunContext,
    learner: LearnerGroup,
    folder: Path,
    *,
    facts: Mapping[str, object],
    dtype: str = "float32",
) -> None:
    """Write the learner's model to `folder`, by a rename: the folder is complete or absent.

    facts: rows of the model card, on how the model was made.  dtype: of the weights written.
    Raises: RunStateError if the disk does not take it; what was written of it is removed.
    """
    # A stage whose folder exists is skipped, so a crash must not leave half a model under its name.
    partial = folder.with_name(f"{folder.name}.partial")
    writes = context.writes

    def clear() -> None:
        shutil.rmtree(partial, ignore_errors=True)

    def complete() -> None:
        context.tokenizer.save_pretrained(partial)
        _write_ends(context, partial)
        (partial / "README.md").write_text(_model_card(context, folder.name, facts))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)

    try:
        writes.require(partial, clear)
        learner.export(partial, dtype)
        writes.require(folder, complete)
    except (OSError, RunStateError) as error:
        writes.attempt(partial.name, clear)
        raise RunStateError(
            f"the model cannot be exported to {folder}: {error}. Make room on its disk: --resume "
            "goes on from the newest checkpoint"
        ) from error


def holds_model(folder: Path) -> bool:
    """Whether export_model has written a model to this folder; False where there is no folder.

    Raises: RunStateError if something else stands there: it is no output of a stage.
    """
    if not folder.exists():
        return False
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return True
    raise RunStateError(
        f"{folder}: expected a model that this run exported (config.json and *.safetensors), got "
        "something else. Move it elsewhere, or remove it: the stage that makes it is not skipped "
        "then"
    )


def _write_ends(context: RunContext, folder: Path) -> None:
    """Let whoever generates with the model stop where the run's responses ended."""
    ends = list(stop_token_ids(context.config, context.tokenizer))
    generation = GenerationConfig.from_pretrained(folder)
    generation.eos_token_id = ends if len(ends) > 1 else ends[0]
    generation.save_pretrained(folder)


def _model_card(context: RunContext, name: str, facts: Mapping[str, object]) -> str:
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [distillation]
---
# {context.config.name}/{name}

Made by distill_system, run `{context.config.name}`, seed {context.config.seed}.

| fact | value |
|---|---|
{rows}

Prompts were rendered as `{context.config.data.prompt_template}`{
        " through the chat template" if context.config.data.use_chat_template else ""
    }. The run's configuration and scores: `config.json` and `summary.json` of the run's folder.
"""

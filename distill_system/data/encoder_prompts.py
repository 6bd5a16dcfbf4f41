"""Prompts as an encoder reads them: with the end that the tokenizer puts behind a text.

A decoder goes on from a prompt, so none may end it; an encoder was trained on texts that end
(T5, BART). What stands before a text is put there for every model, see SetReader.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from distill_system.data.run_data import RunData
from distill_system.errors import DataError
from distill_system.records import Int32Array, Prompt, Trajectory


def end_prompts(data: RunData, tokenizer: Any, *, most_tokens: int) -> RunData:
    """The run's data with ended prompts; unchanged where the tokenizer ends no text.

    most_tokens: data.max_prompt_tokens, of prompts with their end.
    Raises: DataError, naming a prompt that is longer.
    """
    end = tokenizer.eos_token_id
    if end is None or tokenizer("a")["input_ids"][-1:] != [end]:
        return data

    def ended(name: str, token_ids: Int32Array) -> Int32Array:
        if token_ids.size >= most_tokens:
            raise DataError(
                f"prompt {name!r} has {token_ids.size} tokens, and the encoder reads one more, "
                f"{tokenizer.eos_token!r}: expected at most data.max_prompt_tokens={most_tokens} "
                "with it. Raise that key by 1, or leave the prompt out"
            )
        return np.append(token_ids, np.int32(end)).astype(np.int32)

    def with_end(token_ids: Int32Array | None) -> Int32Array | None:
        return None if token_ids is None else np.append(token_ids, np.int32(end))

    def end_prompt(prompt: Prompt) -> Prompt:
        token_ids = ended(prompt.prompt_id, prompt.token_ids)
        return replace(prompt, token_ids=token_ids, teacher_ids=with_end(prompt.teacher_ids))

    def end_row(row: Trajectory) -> Trajectory:
        count = row.num_prompt_tokens
        prompt = np.append(row.token_ids[:count], np.int32(end))
        token_ids = np.concatenate([prompt, row.response_ids]).astype(np.int32)
        return replace(
            row,
            token_ids=token_ids,
            num_prompt_tokens=count + 1,
            teacher_prompt_ids=with_end(row.teacher_prompt_ids),
        )

    return replace(
        data,
        teacher_sft=tuple(map(end_row, data.teacher_sft)),
        student_sft=tuple(map(end_row, data.student_sft)),
        prompts=tuple(map(end_prompt, data.prompts)),
        held_out=tuple(map(end_prompt, data.held_out)),
        evaluation={
            split: tuple(map(end_prompt, prompts)) for split, prompts in data.evaluation.items()
        },
        source_held_out={
            name: tuple(map(end_row, rows)) for name, rows in data.source_held_out.items()
        },
    )

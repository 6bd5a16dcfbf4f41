"""The student's step in TRL's SFTTrainer, a step at each message.

Prompt and completion as the trainer wants them, loss on the completion alone, the same model,
optimizer, clipping, precision and lengths as ours. padding_free and packing need flash attention,
which a CPU has not: the collator pads each microbatch to its longest.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from learner_case import (
    SEED,
    Case,
    Sequence,
    begin_memory,
    build_plain_model,
    draw_sequences,
    measure_peak_flops,
    synchronise,
)
from objective_forms import CLOCKS, STOP


def serve(case: Case, pipe: Connection, rank: int, rendezvous: tuple[str, int]) -> None:
    """Answer each STEP with (seconds, tokens, response tokens), STOP with the peak in bytes.

    It says first what a matrix product reaches here, as our learner's process does.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(case.threads)
    warnings.simplefilter("ignore")
    peak_flops = measure_peak_flops(case)
    with tempfile.TemporaryDirectory() as folder:
        _build_trainer(case.alone_and_tiny, folder, lambda: None, lambda step: None).train()
        memory = begin_memory(case)
        pipe.send(peak_flops)
        _serve(case, folder, pipe)
    pipe.send(memory.above_base())


class _StopError(Exception):
    """Leaves train() when no further step is wanted."""


def _serve(case: Case, folder: str, pipe: Connection) -> None:
    read_clock = CLOCKS[case.clock]
    counted: list[tuple[int, int]] = []
    began = [0.0]
    accumulated = case.sequences // case.rows_per_microbatch

    def begin() -> None:
        if pipe.recv() == STOP:
            raise _StopError
        began[0] = read_clock()

    def end(step: int) -> None:
        synchronise(case.device)
        seconds = read_clock() - began[0]
        batches = counted[accumulated * (step - 1) : accumulated * step]
        pipe.send((seconds, sum(b[0] for b in batches), sum(b[1] for b in batches)))

    trainer = _build_trainer(case, folder, begin, end)
    collate = trainer.data_collator

    def collate_counted(examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The trainer fetches batches ahead, but in the order in which it takes them."""
        batch = collate(examples)
        responses = int((batch["labels"] != -100).sum())
        counted.append((int(batch["attention_mask"].sum()), responses))
        return batch

    trainer.data_collator = collate_counted
    try:
        trainer.train()
        assert pipe.recv() == STOP
    except _StopError:
        return


def _build_trainer(
    case: Case, folder: str, begin: Callable[[], None], end: Callable[[int], None]
) -> Any:
    from datasets import Dataset, disable_progress_bars
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Turns(TrainerCallback):
        """Collating has happened before a step begins: it is not counted, which favours TRL."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            begin()

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            end(state.global_step)

    disable_progress_bars()
    arguments = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=case.rows_per_microbatch,
        gradient_accumulation_steps=case.sequences // case.rows_per_microbatch,
        max_steps=case.steps,
        max_length=None,
        completion_only_loss=True,
        gradient_checkpointing=case.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        train_sampling_strategy=case.sampler,
        optim="adamw_torch",
        learning_rate=1e-4,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        bf16=case.dtype == "bfloat16",
        use_cpu=case.device == "cpu",
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=SEED,
    )
    rows = [_to_row(sequence) for sequence in draw_sequences(case)]
    trainer = SFTTrainer(
        model=build_plain_model(case),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=_build_tokenizer(case.vocabulary),
        callbacks=[Turns()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _build_tokenizer(vocabulary: int) -> Any:
    """The trainer wants one; rows come as token ids, so it only names the padding."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    ids = {str(token): token for token in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="3"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="0", bos_token="1", eos_token="2", unk_token="3"
    )


def _to_row(sequence: Sequence) -> dict[str, list[int]]:
    prompt, response = sequence.num_prompt_tokens, sequence.num_response_tokens
    return {
        "input_ids": sequence.token_ids.tolist(),
        "completion_mask": [0] * prompt + [1] * response,
    }

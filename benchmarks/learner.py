"""The learner: tokens per second, utilisation and peak memory; and TRL's trainer beside it.

    python benchmarks/learner.py [--quick] [--device cuda] [--dtype bfloat16] [--clock cpu]

Two tables in one. First our step over sequence length, packed and padded, with activation
checkpointing and on two ranks. Then the headline: the same student's step on the same ragged
sequences in TRL's SFTTrainer, at its default and at other settings of its own, in turns with ours:
every form in processes of its own that make one step each, round after round, so that a neighbour
on the machine slows all of them; the first step does not count. `--clock cpu` counts the seconds
that the process had a processor. Tokens are those of sequences, never padding.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import learner_ours
import learner_trl
from learner_case import SEED, Case, count_flops, deal_steps
from objective_forms import CLOCKS, STEP, STOP
from record import write_result

from distill_system.learner.rendezvous import find_rendezvous

MIB = 2**20
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["learner_ours"])  # torch is imported once, in the server
SERVE = {"packed": learner_ours.serve, "padded": learner_ours.serve, "trl": learner_trl.serve}


@dataclass(frozen=True)
class Measured:
    """One form: sums over the counted steps, and the peak of its fullest process."""

    seconds: float
    tokens: int
    response_tokens: int
    peak_bytes: float
    peak_flops: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def main() -> None:
    arguments = _parse_arguments()
    base = _base_case(arguments)
    rows = []
    for length in arguments.lengths:
        cases = _our_cases(replace(base, longest=length))
        rows += _measure_rows(cases)
    compared = _compared_cases(base)
    if arguments.quick:  # two of TRL's settings: each takes a while to start
        compared = [*compared[:2], *compared[-2:]]
    rivals = _measure_rows(compared)
    headline = _headline(rivals)
    for row in rivals:
        row["tokens_vs_trl_default"] = row["tokens_per_s"] / rivals[1]["tokens_per_s"]
    write_result("learner", [*rows, *rivals], headline, seeds={"seed": SEED})


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: a try of the script")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--lengths", type=int, nargs="*", help="longest sequences of our own rows")
    parser.add_argument("--steps", type=int, help="steps of each form, the first not counted")
    arguments = parser.parse_args()
    if arguments.lengths is None:
        arguments.lengths = [64] if arguments.quick else [128, 512, 2048]
    return arguments


def _base_case(arguments: argparse.Namespace) -> Case:
    """A student that one CPU core trains; a GPU takes a larger one."""
    size = {"hidden_size": 384, "num_layers": 8, "vocabulary": 32_000, "longest": 512}
    if arguments.device == "cuda":
        size = {"hidden_size": 1536, "num_layers": 28, "vocabulary": 152_000, "longest": 2048}
    if arguments.quick:
        size = {"hidden_size": 128, "num_layers": 2, "vocabulary": 4_000, "longest": 64}
    return Case(
        form="packed",
        sequences=32,
        steps=arguments.steps or (3 if arguments.quick else 5),
        dtype=arguments.dtype,
        device=arguments.device,
        threads=1,
        clock=arguments.clock,
        **size,
    )


def _our_cases(case: Case) -> list[Case]:
    """Packing, checkpointing and ranks, one changed at a time; the sharded form needs two devices
    where there are GPUs."""
    padded = replace(case, form="padded")
    cases = [
        case,
        padded,
        replace(case, checkpointing=True),
        replace(padded, checkpointing=True),
    ]
    if case.device == "cpu":
        cases += [replace(case, ranks=2), replace(case, ranks=2, checkpointing=True)]
    return cases


def _compared_cases(base: Case) -> list[Case]:
    """Ours first, then TRL at its default of checkpointing, then what may make it faster.

    Its default batch of 8 rows, four times a step; a step's sequences are ours. batch_rebalance
    sorts the rows of a step into batches of like length; group_by_length sorts 50 steps' rows, so
    that a step's sequences are no longer drawn at random.
    """
    trl = replace(base, form="trl", checkpointing=True)
    fast = replace(trl, checkpointing=False)
    return [
        replace(base, microbatch_tokens=2 * base.longest),
        trl,
        fast,
        replace(fast, rows_per_microbatch=base.sequences),
        replace(fast, sampler="batch_rebalance"),
        replace(fast, sampler="group_by_length"),
    ]


def _measure_rows(cases: Sequence[Case]) -> list[dict[str, Any]]:
    rows = [_row(case, one) for case, one in zip(cases, _take_turns(cases), strict=True)]
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


def _row(case: Case, measured: Measured) -> dict[str, Any]:
    """Utilisation: of what a matrix product reaches in the same process."""
    sequences = [sequence for step in deal_steps(case) for sequence in step]
    tokens = sum(len(sequence.token_ids) for sequence in sequences)
    flops = count_flops(case, sequences) / tokens * measured.tokens
    used = flops / measured.seconds / (measured.peak_flops * case.ranks)
    return {
        "form": case.form,
        "sampler": case.sampler if case.form == "trl" else "random",
        "checkpointing": str(case.checkpointing),
        "ranks": case.ranks,
        "batch": _batch(case),
        "longest": case.longest,
        "tokens_per_s": measured.tokens_per_second,
        "utilisation": used,
        "peak_mib": measured.peak_bytes / MIB,
        "tokens": measured.tokens,
        "tokens_vs_trl_default": "",
    }


def _batch(case: Case) -> str:
    """What a form reads at once."""
    if case.form == "trl":
        return f"{case.rows_per_microbatch} rows"
    if case.form == "packed" and case.microbatch_tokens:
        return f"{case.microbatch_tokens} tokens"
    return "whole step"


def _headline(rivals: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Against TRL's fastest setting that draws its batches at random, as ours are; against its
    default; and against the setting that chooses sequences by length."""
    ours, default, *others = rivals
    grouped = others.pop()
    best = max([default, *others], key=lambda row: row["tokens_per_s"])

    def ratio(row: dict[str, Any], column: str) -> float:
        return float(ours[column] / row[column])

    return {
        "tokens_ratio_vs_trl": ratio(best, "tokens_per_s"),
        "memory_ratio_vs_trl": ratio(best, "peak_mib"),
        "tokens_ratio_vs_trl_default": ratio(default, "tokens_per_s"),
        "memory_ratio_vs_trl_default": ratio(default, "peak_mib"),
        "tokens_ratio_vs_trl_grouped_by_length": ratio(grouped, "tokens_per_s"),
        "memory_ratio_vs_trl_grouped_by_length": ratio(grouped, "peak_mib"),
    }


def _take_turns(cases: Sequence[Case]) -> list[Measured]:
    """A step of each form, round after round; only one form works at a time."""
    with ExitStack() as stack:
        forms = [stack.enter_context(_start(case)) for case in cases]
        flops = [pipes[0].recv() for pipes in forms]
        steps: list[list[list[tuple[float, int, int]]]] = [[] for _ in forms]
        for _ in range(cases[0].steps):
            for pipes, seen in zip(forms, steps, strict=True):
                for pipe in pipes:
                    pipe.send(STEP)
                seen.append([pipe.recv() for pipe in pipes])
        return [
            _finish(pipes, seen[1:], peak)
            for pipes, seen, peak in zip(forms, steps, flops, strict=True)
        ]


def _finish(
    pipes: Sequence[Connection],
    steps: Sequence[Sequence[tuple[float, int, int]]],
    peak_flops: float,
) -> Measured:
    for pipe in pipes:
        pipe.send(STOP)
    return Measured(
        seconds=sum(max(answer[0] for answer in answers) for answers in steps),
        tokens=sum(answers[0][1] for answers in steps),
        response_tokens=sum(answers[0][2] for answers in steps),
        peak_bytes=max(pipe.recv() for pipe in pipes),
        peak_flops=peak_flops,
    )


@contextmanager
def _start(case: Case) -> Iterator[list[Connection]]:
    """One process for each rank; where one fails, its traceback comes before our EOFError."""
    rendezvous = find_rendezvous()
    pipes, processes = [], []
    for rank in range(case.ranks):
        ours, theirs = PROCESSES.Pipe()
        arguments = (case, theirs, rank, rendezvous)
        processes.append(PROCESSES.Process(target=SERVE[case.form], args=arguments))
        processes[-1].start()
        theirs.close()  # theirs alone now, so that its end is the end of ours
        pipes.append(ours)
    try:
        yield pipes
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join()


if __name__ == "__main__":
    main()

"""Time and memory of every objective: ours, the dense form, and TRL's chunked divergence.

    python benchmarks/objectives.py [--quick] [--device cuda] [--clock cpu --threads 1]

Forward and backward on the same hidden states. Each form runs in a process of its own, one at a
time and in turns, so that a neighbour on the machine slows all of them: the median of the repeats
counts, after a first run that does not. On a machine that others use, `--clock cpu --threads 1`
counts the seconds of processor that the process itself had. Memory is the peak above what the
process held before. Then whole steps of the learner, AMMD on both streams against on-policy
reverse KL.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import get_args

import learner_steps
import objective_forms
from learner_steps import StepCase
from objective_forms import SEED, TRL_BETAS, Case
from record import write_result

from distill_system.config.objective.token_losses import TokenLossConfig

MIB = 2**20
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["objective_forms"])  # torch is imported once, in the server


@dataclass(frozen=True)
class Size:
    """vocabulary x tokens x student hidden x teacher features."""

    vocabulary: int
    tokens: int
    hidden: int
    features: int


@dataclass(frozen=True)
class Plan:
    """What is measured: every objective at the small size, what TRL has and AMMD at the large."""

    small: Size
    large: Size
    step: StepCase
    repeats: int


def main() -> None:
    arguments = _parse_arguments()
    plan = _make_plan(arguments)
    rows = []
    shared = [*TRL_BETAS, "ammd"]
    for size, objectives, repeats in (
        (plan.small, shared, plan.repeats),
        (plan.small, _other_objectives(shared), 1),
        (plan.large, shared, max(1, plan.repeats - 1)),
    ):
        for objective in objectives:
            rows.append(_measure_objective(objective, size, repeats, arguments))
            print(json.dumps(rows[-1]), flush=True)
    seconds = _run_steps(plan.step)
    rows += [_step_row(name, plan.step, value) for name, value in seconds.items()]
    compared = [row for row in rows if row["time_vs_trl"] != ""]
    headline = {
        "time_ratio_vs_trl": max(row["time_vs_trl"] for row in compared),
        "memory_ratio_vs_trl": max(row["memory_vs_trl"] for row in compared),
        "ammd_step_ratio_vs_reverse_kl": seconds["ammd"] / seconds["reverse_kl"],
    }
    write_result("objectives", rows, headline, seeds={"seed": SEED})


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: a try of the script")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--clock", choices=list(objective_forms.CLOCKS), default="wall")
    parser.add_argument("--chunk-tokens", type=int, default=512)
    return parser.parse_args()


def _make_plan(arguments: argparse.Namespace) -> Plan:
    """Sizes that two CPU cores and 24 GiB bear; a GPU takes larger ones."""
    if arguments.quick:
        small, large = Size(4_000, 256, 64, 96), Size(16_000, 256, 64, 96)
        sequences, repeats = 4, 1
    elif arguments.device == "cuda":
        small, large = Size(32_000, 4096, 2048, 4096), Size(152_000, 4096, 2048, 4096)
        sequences, repeats = 64, arguments.repeats
    else:
        small, large = Size(32_000, 1536, 256, 384), Size(152_000, 1024, 256, 384)
        sequences, repeats = 32, arguments.repeats
    step = StepCase(
        vocabulary=small.vocabulary,
        sequences=sequences,
        repeats=repeats,
        chunk_tokens=arguments.chunk_tokens,
        device=arguments.device,
        threads=arguments.threads,
        clock=arguments.clock,
    )
    return Plan(small, large, step, repeats)


def _other_objectives(shared: Sequence[str]) -> list[str]:
    """Every other token loss of the configuration, and MiniLLM."""
    models = get_args(get_args(TokenLossConfig)[0])
    losses = [get_args(model.model_fields["type"].annotation)[0] for model in models]
    return [name for name in [*losses, "minillm"] if name not in shared]


def _measure_objective(
    objective: str, size: Size, repeats: int, arguments: argparse.Namespace
) -> dict[str, object]:
    """One row of the table."""
    case = Case(
        form="ours",
        objective=objective,
        **vars(size),
        chunk_tokens=arguments.chunk_tokens,
        device=arguments.device,
        threads=arguments.threads,
        clock=arguments.clock,
    )
    forms = ["ours", "dense", "trl"] if objective in TRL_BETAS else ["ours", "dense"]
    measured = _take_turns([replace(case, form=form) for form in forms], repeats)
    seconds = {form: measured[form][0] for form in forms}
    peaks = {form: measured[form][1] / MIB for form in forms}
    return {
        "objective": objective,
        "vocabulary": size.vocabulary,
        "tokens": size.tokens,
        "ours_s": seconds["ours"],
        "dense_s": seconds["dense"],
        "trl_s": seconds.get("trl", ""),
        "ours_mib": peaks["ours"],
        "dense_mib": peaks["dense"],
        "trl_mib": peaks.get("trl", ""),
        "time_vs_trl": seconds["ours"] / seconds["trl"] if "trl" in forms else "",
        "memory_vs_trl": peaks["ours"] / peaks["trl"] if "trl" in forms else "",
    }


def _take_turns(cases: Sequence[Case], repeats: int) -> dict[str, tuple[float, float]]:
    """Median seconds and peak bytes of each form; only one of the processes works at a time."""
    with ExitStack() as stack:
        pipes = {
            case.form: stack.enter_context(_start(objective_forms.serve, case)) for case in cases
        }
        seconds: dict[str, list[float]] = {form: [] for form in pipes}
        for _ in range(repeats + 1):
            for form, pipe in pipes.items():
                pipe.send(objective_forms.STEP)
                seconds[form].append(pipe.recv())
        peaks = {}
        for form, pipe in pipes.items():
            pipe.send(objective_forms.STOP)
            peaks[form] = pipe.recv()
    return {form: (statistics.median(seconds[form][1:]), peaks[form]) for form in pipes}


@contextmanager
def _start(serve: Callable[..., None], case: Case | StepCase) -> Iterator[Connection]:
    """A process that serves the case; where it fails, its traceback comes before our EOFError."""
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=serve, args=(case, theirs))
    process.start()
    theirs.close()  # theirs alone now, so that its end is the end of ours
    try:
        yield ours
    finally:
        ours.close()
        process.join()


def _run_steps(case: StepCase) -> dict[str, float]:
    with _start(learner_steps.serve, case) as pipe:
        return pipe.recv()


def _step_row(name: str, case: StepCase, seconds: float) -> dict[str, object]:
    empty = dict.fromkeys(
        ("dense_s", "trl_s", "ours_mib", "dense_mib", "trl_mib", "time_vs_trl", "memory_vs_trl"), ""
    )
    return {
        "objective": f"learner step: {name}",
        "vocabulary": case.vocabulary,
        "tokens": case.tokens,
        "ours_s": seconds,
        **empty,
    }


if __name__ == "__main__":
    main()

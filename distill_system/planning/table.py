"""A plan in, tables and sentences for a rich console out."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from distill_system.planning.memory import GIB
from distill_system.planning.plan import Plan, WorkerPlan
from distill_system.planning.shapes import ModelShape

LINK_BYTES = 100e9 / 8
"""Of a second, over what is taken for the link between learner and engines."""
NUM_HINTS = 3
"""Parts named for a worker that does not fit, the largest first."""


def render_plan(plan: Plan) -> Group:
    """Every kind of worker, what travels, and what to change where something does not fit."""
    return Group(_workers(plan), *(Text(line) for line in [*_facts(plan), *_hints(plan)]))


def _workers(plan: Plan) -> Table:
    table = Table(title=f"plan of {plan.name}, predicted", title_justify="left")
    for heading in ("pool", "workers", "holds", "GiB each", "of it most", "fits"):
        right = heading in ("workers", "GiB each")
        table.add_column(
            heading,
            justify="right" if right else "left",
            overflow="fold",
            no_wrap=heading in ("pool", "workers"),
        )
    for worker in plan.workers:
        largest = worker.memory.by_size[0]
        share = f"{largest} {_gib(worker.memory.parts[largest])}"
        table.add_row(
            Text(worker.pool),
            f"{worker.count} x {_device(worker)}",
            Text(worker.what),
            _gib(worker.num_bytes),
            Text(share),
            _verdict(worker),
        )
    return table


def _verdict(worker: WorkerPlan) -> Text:
    if worker.fits is None:
        return Text("-")
    return Text("yes", style="green") if worker.fits else Text("no", style="red")


def _device(worker: WorkerPlan) -> str:
    return f"{worker.gpus:g} GPU" if worker.gpus else "CPU"


def _facts(plan: Plan) -> list[str]:
    """What travels, and how sure all this is."""
    longest, wire = plan.longest, plan.wire_bytes_per_token
    lines = [
        f"student: {_describe(plan.student)}",
        f"teacher: {_describe(plan.teacher)}",
        f"each step: at most {plan.step_tokens:,} response tokens; every sequence is taken at its "
        f"limit of {longest} tokens, so real steps hold less",
        f"wire: {wire:,} bytes a teacher token, {_gib(wire * plan.scored_tokens)} GiB a step at "
        "most (scoring.dtype, distill.action_dimension)",
        f"publish: {_gib(plan.publish_bytes)} GiB a weight version to each student worker, at least "
        f"{plan.publish_bytes / LINK_BYTES:.2g} s at 100 Gbit/s, and a copy of it in CPU memory of "
        "learner rank 0",
    ]
    lines += [f"{worker.pool}: {worker.note}" for worker in plan.at_once if worker.note]
    if plan.host_bytes:
        lines.append(
            f"CPU memory: {_gib(plan.host_bytes)} GiB for all workers of the distillation without "
            "a GPU and for what others offload, Ray and its object store apart"
        )
    if any(worker.gpus for worker in plan.workers):
        lines.append(
            f"fits: on GPUs of {plan.device_bytes / GIB:g} GiB (--device-gib), 1 GiB of it for "
            "CUDA and NCCL. Predictions were within 5 % where they were measured (docs/scaling.md)"
        )
    return lines


def _hints(plan: Plan) -> list[str]:
    """For each worker that does not fit: its largest parts and the keys that lower them."""
    lines = []
    for worker in plan.workers:
        if worker.fits is not False:
            continue
        memory = worker.memory
        named = "; ".join(
            f"{name} {_gib(memory.parts[name])} GiB"
            + (f" (lower it by {memory.lowered_by[name]})" if name in memory.lowered_by else "")
            for name in memory.by_size[:NUM_HINTS]
        )
        room = worker.room_bytes or 0.0
        lines.append(
            f"{worker.pool} does not fit: expected at most {_gib(room)} GiB, "
            f"got {_gib(worker.num_bytes)}; the largest parts (fullest moment: "
            f"{memory.moment}): {named}"
        )
    return lines


def _describe(shape: ModelShape) -> str:
    return (
        f"{shape.num_parameters / 1e6:,.1f} million parameters, {shape.num_blocks} blocks, "
        f"hidden size {shape.hidden_size}, vocabulary {shape.vocabulary:,} ({shape.family}, "
        f"{shape.name})"
    )


def _gib(num_bytes: float) -> str:
    gib = num_bytes / GIB
    return f"{gib:,.1f}" if gib >= 10 else f"{gib:.3g}"

"""What one GPU can prove without Ray and vLLM: eight proofs, each by itself, in ten minutes.

    python benchmarks/gpu_check.py [--device cpu] [--small] [--only steps scorer] [--output FILE]

It needs torch (2.11 or newer), transformers and what the learner imports; one GPU of 80 GB. Each
proof runs in a process of its own under a deadline of its own: one that fails, hangs or takes the
GPU down costs the others nothing, and what it had found by then is kept. The JSON
(benchmarks/results/gpu_check.json) is written anew after each. Exit status 1: a proof failed; aims
(speed, nearness of the plan) that are missed are told and fail nothing.

--small runs the same code on tiny models, on a CPU too: so the test suite keeps it whole.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import gpu_attention
import gpu_learner
import gpu_reading
import gpu_transfer
import torch
from gpu_findings import Findings, adapt_to_older_torch
from record import RESULTS

from distill_system.observe.environment import describe_environment

# torch then asks the driver for devices without CUDA, which could not be begun again in a fork.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


@dataclass(frozen=True)
class Proof:
    """seconds: after which it is ended; of its small form, on a busy machine, the same."""

    name: str
    prove: Callable[[Findings], None]
    seconds: float

    @property
    def title(self) -> str:
        return (self.prove.__doc__ or self.name).strip().splitlines()[0]


PROOFS = (
    Proof("attention", gpu_attention.prove_attention, 60.0),
    Proof("publisher", gpu_transfer.prove_publisher, 60.0),
    Proof("scorer", gpu_reading.prove_scorer, 60.0),
    Proof("chunks", gpu_reading.prove_chunks, 45.0),
    Proof("float32_attention", gpu_attention.prove_float32_attention, 30.0),
    Proof("equal_bits", gpu_learner.prove_equal_bits, 60.0),
    Proof("offload", gpu_learner.prove_offload, 75.0),
    Proof("steps", gpu_learner.prove_steps, 240.0),
)
"""The quick ones first: what is cut off by a machine's own limit is then the end of the last."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [proof.name for proof in PROOFS]
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models, as the test suite does")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PROOF")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu_check.json")
    parser.add_argument("--seconds", type=float, default=600.0, help="for all proofs together")
    parser.add_argument("--start-method", choices=["fork", "spawn"], default="fork")
    asked = parser.parse_args(arguments)
    if asked.device == "cpu" and not asked.small:
        parser.error("--device cpu: expected --small with it; full sizes take a CPU hours")
    ends = time.monotonic() + asked.seconds
    adapted = adapt_to_older_torch()
    report: dict[str, Any] = {
        "name": "gpu_check",
        "headline": {},
        "rows": [],
        "device": asked.device,
        "small": asked.small,
        "adapted": adapted,
        **describe_environment(seeds={"seed": gpu_learner.SEED}),
    }
    print(f"torch {torch.__version__}, Python {platform.python_version()}; {adapted or ''}")
    for proof in (proof for proof in PROOFS if proof.name in asked.only):
        seconds = min(proof.seconds, ends - time.monotonic())
        context = multiprocessing.get_context(asked.start_method)
        row = run_proof(proof, asked.device, small=asked.small, seconds=seconds, context=context)
        report["rows"].append(row)
        report["headline"] = count_demands(report["rows"])
        _write(asked.output, report)
        _print(row)
    print(json.dumps(report["headline"]), f"-> {asked.output}")
    return 1 if report["headline"]["failed"] else 0


def run_proof(
    proof: Proof, device: str, *, small: bool, seconds: float, context: Any
) -> dict[str, Any]:
    """The proof in a process of its own; its findings so far if it is ended at the deadline."""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(proof, device, small, theirs))
    started = time.monotonic()
    process.start()
    theirs.close()
    told: dict[str, Any] = {"numbers": {}, "demands": []}
    problem: str | None = None
    while True:
        left = started + seconds - time.monotonic()
        if left <= 0.0 or not ours.poll(left):
            problem = f"not done within its {seconds:.0f} s"
            break
        try:
            told |= ours.recv()
        except EOFError:
            break
    _end(process)
    if problem is None and not told.get("done"):
        problem = told.get("problem") or f"its process ended with {process.exitcode}"
    if problem is not None:
        told["demands"].append(
            {"what": "the proof runs to its end", "is_aim": False, "holds": False}
        )
    return {
        "proof": proof.name,
        "title": proof.title,
        "passed": all(each["holds"] for each in told["demands"] if not each["is_aim"]),
        "seconds": time.monotonic() - started,
        "problem": problem,
        "demands": told["demands"],
        "numbers": told["numbers"],
    }


def _serve(proof: Proof, device: str, small: bool, pipe: Connection) -> None:
    os.setpgid(0, 0)  # so that whoever it starts ends with it
    warnings.simplefilter("ignore")
    adapt_to_older_torch()
    findings = Findings(torch.device(device), small=small, tell=pipe.send)
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        proof.prove(findings)
        pipe.send({"done": True})
    except Exception:
        pipe.send({"problem": traceback.format_exc()[-3000:]})


def _end(process: Any) -> None:
    """Wait for it a moment; then end it and whatever it started."""
    process.join(timeout=5.0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


def count_demands(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How many proofs passed and failed, and how many aims were missed."""
    passed = sum(row["passed"] for row in rows)
    missed = sum(not d["holds"] for row in rows for d in row["demands"] if d["is_aim"])
    seconds = sum(row["seconds"] for row in rows)
    return {
        "passed": passed,
        "failed": len(rows) - passed,
        "aims_missed": missed,
        "seconds": seconds,
    }


def _write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")


def _print(row: dict[str, Any]) -> None:
    verdict = "passed" if row["passed"] else "FAILED"
    print(f"\n== {row['proof']}: {verdict} in {row['seconds']:.1f} s. {row['title']}")
    if row["problem"]:
        print(row["problem"])
    for demand in row["demands"]:
        if not demand["holds"]:
            print("  missed aim:" if demand["is_aim"] else "  FAILED:", demand)
    print(json.dumps(row["numbers"], default=_rounded), flush=True)


def _rounded(value: Any) -> str:
    return str(value)


if __name__ == "__main__":
    raise SystemExit(main())

"""The streaming pipeline: against TRL, with modelled pools, and its weight publish.

    python benchmarks/pipeline.py real [--quick] [--staleness 0 1 2 4] [--folder F]
    python benchmarks/pipeline.py modelled ...
    python benchmarks/pipeline.py publish ...

modelled and publish are pipeline_modelled.py and publish.py, with arguments of their own.

real: whole runs of the command line, synchronous and with bounded staleness, and TRL's
DistillationTrainer on the same models, prompts and lengths, the same optimizer and loss (reverse KL
on the student's text), in turns: a block of TRL's steps at each of its settings, then a run at each
of ours, round after round, so that a neighbour on the machine slows all of them. Both systems have
the whole machine. Tokens are those of responses, never padding.
"""

from __future__ import annotations

import argparse
import os
import runpy
import signal
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pipeline_ours
from pipeline_models import SEED, Lengths, Workload, make_models
from pipeline_ours import OurSetting, Steps
from pipeline_plot import draw_rates
from pipeline_trl import TrlProcess, TrlSetting
from record import RESULTS, write_result

TRL_WARM_UP = 3
SCRIPTS = {"modelled": "pipeline_modelled.py", "publish": "publish.py"}
Setting = TrlSetting | OurSetting


def main() -> None:
    part, *rest = sys.argv[1:] or ["--help"]
    if part in SCRIPTS:
        script = Path(__file__).with_name(SCRIPTS[part])
        sys.argv = [str(script), *rest]
        runpy.run_path(str(script), run_name="__main__")
    else:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        measure_real(_parse_arguments())


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["real", *SCRIPTS])
    parser.add_argument("--quick", action="store_true", help="few steps: a try of the script")
    parser.add_argument("--folder", type=Path, help="keeps models here; else a temporary folder")
    parser.add_argument("--lengths", nargs="+", choices=["ragged", "fixed"])
    parser.add_argument("--staleness", type=int, nargs="+", help="S of our runs on ragged lengths")
    parser.add_argument("--fixed-staleness", type=int, nargs="+", help="S on fixed lengths")
    parser.add_argument("--student-rollouts", type=int, default=1, help="our rollout workers")
    parser.add_argument("--rounds", type=int)
    arguments = parser.parse_args()
    quick = arguments.quick
    arguments.lengths = arguments.lengths or ["ragged", "fixed"]
    arguments.staleness = arguments.staleness or ([0, 1] if quick else [0, 1, 2, 4])
    arguments.fixed_staleness = arguments.fixed_staleness or ([1] if quick else [0, 2])
    arguments.rounds = arguments.rounds or (1 if quick else 2)
    return arguments


def measure_real(arguments: argparse.Namespace) -> None:
    """Both systems on both kinds of lengths; writes results/pipeline_real.json and a plot."""
    print(f"others keep {os.getloadavg()[0]:.1f} processors busy: 0 is wanted", flush=True)
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for lengths in arguments.lengths:
            workload = Workload(lengths, steps=14 if arguments.quick else 20)
            found = _take_turns(folder, workload, _settings(lengths, arguments), arguments)
            rows += [_row(workload, setting, rounds) for setting, rounds in found.items()]
    write_result("pipeline_real", rows, _headline(rows), seeds={"seed": SEED})
    draw_rates(rows, RESULTS / "pipeline_real.svg")


def _settings(lengths: Lengths, arguments: argparse.Namespace) -> list[Setting]:
    """TRL's at what may be its best, then ours.

    Where pools wait for one another, scorer and learner may take both cores in their turn; where
    they run beside the engine, one each.
    """
    trl = [TrlSetting(threads=2, rows=128)]
    if lengths == "ragged":  # where others keep the machine busy, two threads wait for each other
        trl.append(TrlSetting(threads=1, rows=128))
    if not arguments.quick:
        trl.append(TrlSetting(threads=2, rows=128, use_vllm=True))
    staleness = arguments.staleness if lengths == "ragged" else arguments.fixed_staleness
    ours = [
        OurSetting(most, threads=1 if most else 2, student_rollouts=arguments.student_rollouts)
        for most in staleness
    ]
    return [*trl, *ours]


def _take_turns(
    folder: Path, workload: Workload, settings: Sequence[Setting], arguments: argparse.Namespace
) -> dict[Setting, list[Steps]]:
    """A block of steps of each setting, round after round; only one works at a time."""
    models = make_models(folder, workload)
    found: dict[Setting, list[Steps]] = {setting: [] for setting in settings}
    with ExitStack() as stack:
        trainers = {
            setting: stack.enter_context(closing(TrlProcess(models, workload, setting)))
            for setting in settings
            if isinstance(setting, TrlSetting)
        }
        for trainer in trainers.values():
            trainer.wait_until_ready()
            trainer.make_steps(TRL_WARM_UP)
        for _ in range(arguments.rounds):
            for setting in settings:
                if isinstance(setting, TrlSetting):
                    steps = trainers[setting].make_steps(3 if arguments.quick else 6)
                else:
                    steps = pipeline_ours.run(folder, models, workload, setting)
                found[setting].append(steps)
                rate = steps.tokens_per_second
                print(f"{workload.lengths}: {setting.name}: {rate:,.0f} tokens/s", flush=True)
    return found


def _row(workload: Workload, setting: Setting, rounds: Sequence[Steps]) -> dict[str, Any]:
    """Medians over rounds, or over all steps; parts are what the system itself waited for."""
    rates = [steps.tokens_per_second for steps in rounds]
    tokens = [count for steps in rounds for count in steps.tokens]
    parts = [part for steps in rounds for part in steps.parts]
    return {
        "lengths": workload.lengths,
        "system": setting.name,
        "tokens_per_s": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "step_s": statistics.median(s for steps in rounds for s in steps.seconds),
        "mean_tokens": statistics.mean(tokens) / workload.sequences,
        "ended_share": statistics.mean(e for steps in rounds for e in steps.ended),
        "parts_s": _median_parts(parts),
    }


def _median_parts(parts: Sequence[Mapping[str, float]]) -> str:
    names = list(parts[0])
    middle = {name: statistics.median(part.get(name, 0.0) for part in parts) for name in names}
    return ", ".join(f"{name} {value:.3f}" for name, value in middle.items() if value >= 0.0005)


def _headline(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Our fastest of each kind over TRL's fastest that trains."""
    rates: dict[tuple[str, str], float] = {}
    for row in rows:
        if "old weights" not in row["system"]:
            kind = _kind(row["system"])
            key = (row["lengths"], kind)
            rates[key] = max(rates.get(key, 0.0), row["tokens_per_s"])
    headline = {}
    for lengths in dict.fromkeys(row["lengths"] for row in rows):
        trl = rates[lengths, "trl"]
        ours = {
            kind: rates[lengths, kind] for kind in ("sync", "async") if (lengths, kind) in rates
        }
        headline[f"tokens_ratio_vs_trl_{lengths}"] = max(ours.values()) / trl
        if "sync" in ours:
            headline[f"tokens_ratio_vs_trl_{lengths}_sync"] = ours["sync"] / trl
        if len(ours) == 2:
            name = "async_ratio_vs_sync" + ("" if lengths == "ragged" else f"_{lengths}")
            headline[name] = ours["async"] / ours["sync"]
    return headline


def _kind(system: str) -> str:
    if system.startswith("TRL"):
        return "trl"
    return "sync" if "S = 0" in system else "async"


if __name__ == "__main__":
    main()

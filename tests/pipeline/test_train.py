"""The main job with real Ray, real vLLM and real torch.distributed: all stages, wide, adapted.

test_kill.py has its crashes, test_failures.py what a second call of it does.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from faults import find_workers, newest_step
from pipeline.command_line import wait_until
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill_system.observe import RunDirectory
from distill_system.observe.fault_log import read_faults
from distill_system.rollout import engine_environment

ROOT = Path(__file__).parents[2]
DEADLINE_SECONDS = 300
CLOCKS = (
    *("seconds/", "tokens_per_second/", "busy_share/", "starved_share/", "blocked_share/"),
    *("queued/", "workers/", "learner/peak_memory_bytes"),
)
"""Metrics that no two runs have alike."""

TINY: dict[str, Any] = {
    "data": {
        "teacher_sft": {"num_examples": 1500},
        "student_sft": {"num_examples": 500},
        "prompts": {"num_examples": 100},
        "held_out": {"num_examples": 24},
        "evaluation": {
            split: {"num_examples": 12}
            for split in (
                "in_distribution",
                "paraphrase",
                "longer_input",
                "composition",
                "distractor",
            )
        },
    },
    "teacher": {"sft": {"steps": 60, "batch_size": 16}},
    "student": {"sft": {"steps": 40, "batch_size": 16}},
    "distill": {
        "steps": 6,
        "student_prompts_per_step": 8,
        "teacher_prompts_per_step": 8,
        "measure_every": 2,
        "evaluate_every": 4,
        "checkpoint_every": 2,
    },
    "cluster": {"dashboard": False},
}


def _command(folder, *overrides):
    return [
        *(sys.executable, "-m", "distill_system", "train"),
        *(str(ROOT / "configs/quickstart.yaml"), str(folder / "tiny.yaml")),
        *(f"runs_directory={folder}", *overrides),
    ]


def _train(folder, *overrides):
    done = subprocess.run(
        _command(folder, *overrides),
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def _rows(run, stage="distill"):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["stage"] == stage]


def _learned(run):
    """What a step computed, without what the clock and the process's memory say."""
    return {
        row["step"]: {
            name: value for name, value in row["metrics"].items() if not name.startswith(CLOCKS)
        }
        for row in _rows(run)
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    return folder


@pytest.fixture(scope="module")
def unbroken(folder):
    """The whole main job once; the other tests start from its fine-tuned models."""
    done = _train(folder, "name=unbroken")
    assert "report.html" in done.stdout
    return folder / "unbroken"


def _beside(unbroken, name, **distill):
    """A run of another name, and other distill settings, with its supervised stages behind it."""
    run = unbroken.parent / name
    run.mkdir()
    for made in ("tokenizer", "teacher", "student_sft"):
        shutil.copytree(unbroken / made, run / made)
    config = json.loads((unbroken / "config.json").read_text())
    changed = {"name": name, "distill": {**config["distill"], **distill}}
    (run / "config.json").write_text(json.dumps({**config, **changed}))
    return run


def test_the_run_leaves_everything_it_promises(unbroken):
    summary = json.loads((unbroken / "summary.json").read_text())
    for split in TINY["data"]["evaluation"]:
        score = summary["scores"][split]["exact_match_greedy"]
        assert {"before", "after", "teacher", "num_examples", "stderr"} <= score.keys()
        assert score["num_examples"] == 12
    for stream in ("on_policy", "off_policy"):
        assert summary["distances"][stream]["before"] > 0
        assert summary["distances"][stream]["after"] > 0
    assert {"sft_teacher", "sft_student", "distill"} <= summary["seconds"].keys()
    assert {"student_rollout", "teacher_rollout", "teacher_scoring", "learner"} <= summary[
        "tokens_per_second"
    ].keys()
    assert summary["seeds"] == {"seed": 0}
    assert "vllm" in " ".join(summary["versions"])
    assert "<svg" in (unbroken / "report.html").read_text()
    assert (unbroken / "evaluations" / "step_000004.json").exists()
    assert list((unbroken / "tensorboard").rglob("events*"))
    kept = sorted(path.name for path in (unbroken / "checkpoints" / "distill").iterdir())
    assert kept == ["step_000004", "step_000006"]
    assert not (unbroken / "checkpoints" / "sft_teacher").exists()


def test_every_step_is_recorded_once_and_sampler_equals_learner(unbroken):
    rows = _rows(unbroken)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    for row in rows[1:]:
        # Behaviour log-probabilities of vLLM under the published weights, against the learner's.
        assert row["metrics"]["learner/logprob_gap"] < 1e-4
        assert row["metrics"]["seconds/driver"] < row["metrics"]["seconds/step"]
    checked = [name for name in rows[0]["metrics"] if name.startswith("start_check/")]
    assert len(checked) == 4
    assert max(rows[0]["metrics"][name] for name in checked) < 1e-4
    sft = [row["metrics"]["learner/loss"] for row in _rows(unbroken, "sft_teacher")]
    assert len(sft) == 60
    assert sft[-1] < 0.8 * sft[0]


def test_more_workers_make_the_same_first_step_and_a_scorer_is_lost_with_its_rank(unbroken, launch):
    """Samples depend on the prompt, not on the worker; two sharded ranks make the update of one,
    and two that share a teacher say what one says."""
    run = _beside(unbroken, "wide", steps=4)
    counts = [f"pools.{pool}.count=2" for pool in ("student_rollout", "learner")]
    shared = ("learner.shard_ranks=all", "scoring.shard_ranks=2")
    command = _command(run.parent, "name=wide", "distill.steps=4", *counts, *shared)
    wide_run = launch(*command[command.index("train") :])
    wait_until(lambda: newest_step(RunDirectory(run)) >= 0, wide_run, DEADLINE_SECONDS)
    find_workers(wide_run)["teacher_scoring-0-rank-1"].kill()  # the one that answers nobody
    assert wide_run.finish(DEADLINE_SECONDS).code == 0, wide_run.stderr[-3000:]
    faults = read_faults(RunDirectory(run))
    assert [(row.worker, row.event) for row in faults] == [
        ("teacher_scoring-0", "lost"),
        ("teacher_scoring-0", "replaced"),
    ]
    wide, narrow = _learned(run)[1], _learned(unbroken)[1]
    # The learning-rate schedule knows the number of steps; the first loss does not.
    for name in ("learner/loss", "learner/on_policy_distance", "learner/off_policy_distance"):
        assert wide[name] == pytest.approx(narrow[name], rel=1e-4)
    assert wide["learner/mean_student_response_tokens"] == pytest.approx(
        narrow["learner/mean_student_response_tokens"]
    )
    _check_sampler_follows(run)


def test_adapters_in_little_memory_reach_the_engines_and_the_export(unbroken):
    """LoRA, microbatches and activation checkpointing at once; what is frozen stays as it was.

    No step reads the teacher's engines: they write first, what they would have written later.
    """
    update = {"type": "lora", "rank": 4, "save_adapter": True}
    objective = json.loads((unbroken / "config.json").read_text())["distill"]["objective"]
    alone = {**objective, "on_policy_weight": 1.0}
    run = _beside(unbroken, "adapted", steps=2, update=update, objective=alone)
    little = ("learner.max_tokens_per_microbatch=200", "learner.activation_checkpointing=true")
    update_key = "distill.update={type: lora, rank: 4, save_adapter: true}"
    alone_key = "distill.objective.on_policy_weight=1"
    _train(run.parent, "name=adapted", "distill.steps=2", update_key, alone_key, *little)
    _check_sampler_follows(run)
    assert "workers/teacher_rollout" not in _learned(run)[2]
    for name in ("teacher", "before"):
        answers, same = (
            json.loads((folder / "evaluations" / f"{name}.json").read_text())["splits"]
            for folder in (run, unbroken)
        )
        assert answers == same
    first, other = (_rows(folder)[0]["metrics"] for folder in (run, unbroken))
    for name in ("held_out/cross_entropy", "held_out/forward_kl", "held_out/off_policy_distance"):
        assert first[name] == pytest.approx(other[name], rel=1e-5)
    gap = "start_check/teacher_max_logprob_gap"
    assert first[gap] == pytest.approx(other[gap], abs=1e-6)
    assert _learned(run)[2]["learner/microbatches"] > 1
    before, after = (
        load_file(folder / "model.safetensors") for folder in (run / "student_sft", run / "student")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 2 * 7  # two blocks of seven linear layers
    assert all("proj" in name for name in changed)
    assert (run / "student" / "adapter" / "adapter_model.safetensors").exists()


def _check_sampler_follows(run):
    """The engines wrote step 2 with the weights that step 1 made."""
    rows = _learned(run)
    assert max(rows[step]["learner/logprob_gap"] for step in (1, 2)) < 1e-4
    assert rows[1]["learner/gradient_norm"] > 0


PLAIN_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=96,
          kv_cache_memory_bytes=32 << 20)
outs = llm.generate(json.loads(sys.argv[2]), SamplingParams(temperature=0, max_tokens=12),
                    use_tqdm=False)
print("OUT" + json.dumps([list(out.outputs[0].token_ids) for out in outs]))
"""


def test_the_final_student_loads_in_plain_transformers_and_plain_vllm(unbroken):
    folder = unbroken / "student"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    card = (folder / "README.md").read_text()
    assert "ammd" in card
    prompts = ["reverse the list: cat dog fox<sep>", "what is 3 plus 4?<sep>"]
    greedy = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=12, do_sample=False)
        greedy.append(out[0, ids.shape[1] :].tolist())
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_VLLM, str(folder), json.dumps(prompts)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
        env={**os.environ, **engine_environment(uses_gpu=False)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("OUT")]
    assert json.loads(line.removeprefix("OUT")) == greedy

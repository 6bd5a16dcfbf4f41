from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_families import save_family
from typer.testing import CliRunner

from distill_system.cli import app
from distill_system.cluster import machine_supply, require_room, supply
from distill_system.config import load_config
from distill_system.config.recipes import recipe_path
from distill_system.errors import ResourceError
from distill_system.planning import make_plan, read_shape
from distill_system.planning.plan import WorkerPlan
from distill_system.planning.plan import _scorer as plan_scorer
from distill_system.stages.plan import PlannedRun, plan_run

ROOT = Path(__file__).parents[3]
QUICKSTART = str(ROOT / "configs/quickstart.yaml")
FEW_ROWS = (
    "data.teacher_sft.num_examples=200",
    "data.student_sft.num_examples=200",
    "data.prompts.num_examples=200",
)
"""Of the quickstart's 96,000, which take seconds to read."""
PAPER = [str(ROOT / f"configs/paper/{n}.yaml") for n in ("ammd", "dolly", "openllama_7b_to_3b")]
POOLS = ("student_rollout", "teacher_rollout", "teacher_scoring", "learner")
GPUS = [f"pools.{pool}.gpus=1" for pool in ("student_rollout", "learner")]


def _run(*arguments: str):
    # Wide, so that no line is broken.
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["plan", *arguments])


def test_the_quickstart_is_planned() -> None:
    result = _run(QUICKSTART, *FEW_ROWS)
    assert result.exit_code == 0, result.output
    for pool in ("student_rollout", "teacher_rollout", "teacher_scoring", "learner"):
        assert pool in result.output
    assert "teacher fine-tuning" in result.output
    assert "0.8 million parameters" in result.output
    assert "1,024 bytes a teacher token" in result.output  # 128 features and 128 actions, float32


@pytest.fixture
def own(configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Plans a run of two tiny models on a machine of two CPUs."""
    monkeypatch.setattr(supply, "get_num_cpus", lambda: 2)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    shares = [f"pools.{name}.cpus=0.5" for name in POOLS]

    def plan(*overrides: str) -> PlannedRun:
        return plan_run(configure(*shares, *overrides), device_gib=80)

    return plan


def test_a_run_that_would_start_has_no_problem(own) -> None:
    assert own().problems == ()
    assert own().can_start


def test_every_problem_of_data_and_size_is_told_at_once(own, tmp_path: Path) -> None:
    """What stopped the first try of a person three times, one after the other."""
    (tmp_path / "long.jsonl").write_text('{"prompt": "' + "w5 " * 20 + '"}\n')
    planned = own(
        "data.held_out.num_examples=200",
        "data.prompts={type: jsonl, path: long.jsonl}",
        "data.evaluation.gone={type: jsonl, path: gone.jsonl}",
        "data.use_chat_template=true",
        *(f"pools.{name}.cpus=1" for name in POOLS),
    )
    assert not planned.can_start
    assert planned.plan is not None, "memory is planned all the same"
    said = "\n".join(planned.problems)
    assert "200" in said
    assert "data.held_out" in said
    assert "gone.jsonl" in said
    assert "a chat needs a chat template and the tokenizer has none" in said
    assert "the pools ask for 4 CPU of 2 that a local cluster on this machine has" in said
    plain = own("data.prompts={type: jsonl, path: long.jsonl, fields: {response: null}}")
    assert ["20 tokens, more than data.max_prompt_tokens=8" in line for line in plain.problems] == [
        True
    ]


def test_rows_that_are_all_held_out_show_only_side_by_side(own) -> None:
    [problem] = own("data.held_out={type: jsonl, path: rows.jsonl}").problems
    assert "data.prompts: each of its 12 prompts also stands in data.held_out" in problem


def test_gpus_that_are_elsewhere_are_a_note_and_a_cluster_is_asked_later(own, monkeypatch) -> None:
    gpus = [f"pools.{name}.gpus=1" for name in POOLS]
    planned = own(*gpus)
    assert planned.can_start
    assert planned.notes[0].startswith("not for this machine alone: the pools ask for 4 GPU of 0")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    planned = own(*gpus, "pools.learner.cpus=64")
    assert planned.can_start
    assert planned.notes == (
        "RAY_ADDRESS is set: the size of its cluster is looked at as the run starts",
    )


def test_a_method_is_planned_by_name(own) -> None:
    done = _run(QUICKSTART, *FEW_ROWS, "--objective", "gkd")
    assert done.exit_code == 0, done.output
    assert _run(QUICKSTART, *FEW_ROWS, "--objective", "GKD").exit_code == 1


def test_what_ray_gives_a_local_cluster_is_what_is_reckoned_with() -> None:
    """Ray's own count, which follows the limits of a container."""
    from ray._private.utils import get_num_cpus

    assert machine_supply()["CPU"] == get_num_cpus()


def test_a_run_too_large_for_a_local_cluster_is_refused_before_it_starts(
    configure, monkeypatch
) -> None:
    monkeypatch.setattr(supply, "get_num_cpus", lambda: 2)
    config = configure()
    with pytest.raises(ResourceError, match=r"4 CPU of 2 .* lower pools\.\*\.cpus .*0\.25"):
        require_room(config)
    require_room(config, ["learner"])
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    require_room(config)


def test_a_hub_model_that_is_not_here_is_named(monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = _run(*PAPER)
    assert result.exit_code == 1
    assert "teacher.path='openlm-research/open_llama_7b_v2'" in result.stderr
    assert "hf download openlm-research/open_llama_7b_v2 config.json" in result.stderr


def test_what_does_not_fit_names_the_keys_that_help() -> None:
    large = "student.architecture={hidden_size: 8192, intermediate_size: 28672, num_layers: 8, "
    large += "num_heads: 64, max_position_embeddings: 128}"
    result = _run(QUICKSTART, large, *FEW_ROWS, *GPUS, "--device-gib", "80")
    assert result.exit_code == 1
    assert "learner does not fit: expected at most 80.0 GiB" in result.output
    assert "learner.shard_ranks" in result.output


@pytest.fixture
def families(tmp_path: Path) -> list[str]:
    for role, family in (("teacher", "qwen2"), ("student", "gpt2")):
        save_family(tmp_path / role, family)
    models = [
        f"{role}={{path: {tmp_path / role}, architecture: null, sft: null}}"
        for role in ("teacher", "student")
    ]
    return [*models, "tokenizer={type: pretrained}"]


def test_models_of_other_families_are_planned_from_their_folders(families: list[str]) -> None:
    plan = plan_run(load_config([QUICKSTART], [*families, *FEW_ROWS]), device_gib=80).plan
    assert plan is not None
    assert (plan.teacher.family, plan.student.family) == ("qwen2", "gpt2")
    assert plan.before == ()  # nothing is fine-tuned
    assert plan.publish_bytes == 4 * plan.student.num_parameters


@pytest.mark.parametrize(("dtype", "number"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_weights_travel_in_the_engines_precision(dtype: str, number: int) -> None:
    config = load_config([QUICKSTART], [f"rollout.student_engine.dtype={dtype}"])
    plan = make_plan(config, vocabulary=300, device_gib=80)
    assert plan.publish_bytes == number * plan.student.num_parameters


def test_the_teacher_ships_what_the_objective_asks_for(families: list[str]) -> None:
    def wire(*settings: str) -> int:
        config = load_config([QUICKSTART], [*families, *settings])
        return make_plan(config, vocabulary=None, device_gib=80).wire_bytes_per_token

    assert wire() == 4 * (64 + 64)
    assert wire("distill.action_dimension=16") == 4 * (64 + 16)
    assert wire("distill.action_dimension=16", "scoring.dtype=bfloat16") == 2 * (64 + 16)
    kl = "distill.objective={type: token_matching, on_policy: {type: reverse_kl}, "
    assert wire(kl + "on_policy_weight: 1.0}") == 4 * 64


def test_an_engine_on_a_gpu_takes_its_share_of_it(families: list[str]) -> None:
    config = load_config(
        [QUICKSTART],
        [
            *families,
            *GPUS,
            "rollout.student_engine.kv_cache_mebibytes=null",
            "rollout.student_engine.gpu_memory_utilization=0.5",
        ],
    )
    plan = make_plan(config, vocabulary=None, device_gib=40)
    engine = next(worker for worker in plan.workers if worker.pool == "student_rollout")
    beside = engine.memory.parts["received weights"]
    assert engine.num_bytes == pytest.approx(20 * 2**30 + beside)
    assert engine.fits


def test_more_ranks_share_a_student_and_a_step(families: list[str]) -> None:
    def learner(*settings: str) -> float:
        plan = make_plan(
            load_config([QUICKSTART], [*families, *settings]), vocabulary=None, device_gib=80
        )
        return next(w for w in plan.workers if w.pool == "learner").memory.num_bytes

    four = ("pools.learner.count=4",)
    assert learner(*four) < learner()
    assert learner(*four, "learner.shard_ranks=all") < learner(*four)
    assert learner("learner.max_tokens_per_microbatch=500") < learner()


def test_bfloat16_halves_a_scorer_but_for_its_float32_rows(families: list[str]) -> None:
    def scorer(*settings: str) -> dict[str, float]:
        config = load_config([QUICKSTART], [*families, *settings])
        plan = make_plan(config, vocabulary=None, device_gib=80)
        return dict(next(w for w in plan.workers if w.pool == "teacher_scoring").memory.parts)

    full, half = scorer(), scorer("scoring.dtype=bfloat16")
    assert half["weights"] == pytest.approx(full["weights"] / 2, rel=0.01)
    assert sum(half.values()) < sum(full.values())


def test_a_student_that_receives_weights_on_a_cpu_holds_them_twice(families: list[str]) -> None:
    plan = make_plan(load_config([QUICKSTART], families), vocabulary=None, device_gib=80)
    parts = {worker.pool: worker.memory.parts for worker in plan.at_once}
    student, teacher = parts["student_rollout"], parts["teacher_rollout"]
    assert student["weights"] + student["received weights"] == 2 * 4 * plan.student.num_parameters
    assert "received weights" not in teacher, "its weights never change"


def test_a_student_on_a_gpu_of_its_own_loads_what_comes_and_holds_no_second_model(
    families: list[str], tmp_path: Path
) -> None:
    def engine(*settings: str) -> WorkerPlan:
        config = load_config([QUICKSTART], [*families, *GPUS, *settings])
        plan = make_plan(config, vocabulary=None, device_gib=80)
        return next(worker for worker in plan.at_once if worker.pool == "student_rollout")

    alone, two = engine(), engine("pools.student_rollout.gpus=2")
    saved = load_file(tmp_path / "student" / "model.safetensors").values()
    matrix = 4 * max(tensor.numel() for tensor in saved)
    assert alone.memory.parts["received weights"] == 2 * matrix
    assert two.memory.parts["received weights"] == 1.5 * matrix
    assert alone.fits
    everything = "rollout.student_engine={kv_cache_mebibytes: null, gpu_memory_utilization: %s}"
    assert engine(everything % 0.9).fits
    assert engine(everything % 1.0).fits is False, "nothing is left for what comes"
    share = engine("pools.student_rollout.gpus=0.5", "pools.learner.gpus=0.5")
    assert "received weights" not in share.memory.parts
    assert share.memory.host_bytes == share.memory.parts["weights"], "it comes through CPU memory"


def test_ranks_of_a_scorer_hold_a_part_each_and_a_plan_says_how_many_fit(
    families: list[str],
) -> None:
    def scorer(*settings: str, device_gib: float = 80) -> WorkerPlan:
        config = load_config([QUICKSTART], [*families, "pools.teacher_scoring.gpus=1", *settings])
        teacher = read_shape(str(config.teacher.path), key="teacher.path")
        return plan_scorer(config, teacher, device_gib * 2**30)

    whole, shared = scorer(), scorer("scoring.shard_ranks=4", "pools.teacher_scoring.count=2")
    assert (shared.count, shared.what) == (8, "a part of 4 of the teacher in torch")
    part = whole.memory.parts["weights"] / 4
    assert shared.memory.parts["weights"] == pytest.approx(part, rel=0.03)
    assert "gathered weights" in shared.memory.parts
    assert shared.num_bytes < whole.num_bytes
    room = (whole.num_bytes + scorer("scoring.shard_ranks=2").num_bytes) / 2 / 2**30
    tight = scorer(device_gib=room)
    assert (tight.fits, tight.note) == (
        False,
        "fits with scoring.shard_ranks=2, pools.teacher_scoring.gpus=1",
    )
    assert "fits with no scoring.shard_ranks up to 16" in scorer(device_gib=1.0001).note


def test_tensor_parallelism_divides_an_engines_weights(families: list[str]) -> None:
    def weights(gpus: int) -> float:
        config = load_config([QUICKSTART], [*families, *GPUS, f"pools.student_rollout.gpus={gpus}"])
        plan = make_plan(config, vocabulary=None, device_gib=80)
        engine = next(w for w in plan.workers if w.pool == "student_rollout")
        return engine.memory.parts["weights"]

    assert weights(1) == 2 * weights(2)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ammd_paper", ()),
        ("ammd_soft_advantage", ()),
        ("dac_kl", ()),
        ("minillm", ()),
        ("sinkd", ("distill.objective.off_policy.iterations=2",)),  # of 20, each a second to plan
        ("top_k", ()),
    ],
)
def test_methods_are_planned_by_their_own_code(
    families: list[str], name: str, settings: tuple[str, ...]
) -> None:
    config = load_config([QUICKSTART, recipe_path(name)], [*families, *FEW_ROWS, *settings])
    plan = plan_run(config, device_gib=80).plan
    assert plan is not None
    learner = next(worker for worker in plan.workers if worker.pool == "learner")
    parts, moment = learner.memory.parts, learner.memory.moment
    assert parts["weights"] == pytest.approx(4 * plan.student.num_parameters, rel=0.02)
    assert parts["weights"] <= parts["optimizer state"] <= 2 * parts["weights"]  # Muon
    assert moment in ("loss", "backward", "activations", "optimizer's workspace")

"""Settings by the names of other trainers: each hint names a key that exists."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill_system.config import RunConfig, load_config
from distill_system.config.foreign_keys import OURS, find_ours
from distill_system.config.recipes import recipe_path
from distill_system.config.schema import Slot, root_slot
from distill_system.errors import ConfigError

QUICKSTART = Path(__file__).parents[3] / "configs/quickstart.yaml"


def _exists(slot: Slot, names: list[str]) -> bool:
    """Whether a dotted key stands in the configuration, in any alternative of a union."""
    if not names:
        return True
    tags = list(slot.alternatives) or [None]
    children = [slot.child(names[0], tag) for tag in tags]
    return any(child.annotation is not object and _exists(child, names[1:]) for child in children)


def test_every_hint_names_keys_that_exist() -> None:
    root = root_slot(RunConfig)
    named = {ours for keys, _ in OURS.values() for ours in keys.split(", ")}
    assert [ours for ours in named if not _exists(root, ours.split("."))] == []


def _said(*overrides: str) -> str:
    with pytest.raises(ConfigError) as raised:
        load_config([QUICKSTART], overrides)
    return str(raised.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("distill.learning_rate=1e-5", "did you mean distill.optimizer.learning_rate?"),
        ("teacher.sft.learning_rate=1e-5", "did you mean teacher.sft.optimizer.learning_rate?"),
        ("warmup_ratio=0.1", "did you mean distill.optimizer.warmup_ratio?"),
        ("distill.warmup_ratio=0.1", "did you mean distill.optimizer.warmup_ratio?"),
        ("distill.shard_ranks=2", "did you mean learner.shard_ranks or scoring.shard_ranks?"),
        ("max_new_tokens=9", "it is rollout.sampling.max_response_tokens here"),
        ("rollout.max_new_tokens=9", "it is rollout.sampling.max_response_tokens here"),
        ("rollout.sampling.max_new_tokens=9", "it is rollout.sampling.max_response_tokens here"),
        ("distill.per_device_train_batch_size=8", "it is distill.student_prompts_per_step, dist"),
        ("num_train_epochs=3", "it is distill.steps here (steps = epochs x prompts / prompts per"),
        ("distill.num_train_epochs=3", "it is distill.steps here"),
        ("lr_scheduler_type=linear", "it is distill.optimizer.schedule here"),
        ("hub.token=hf_x", "HF_TOKEN"),
        ("distill.measure_evry=3", "did you mean 'measure_every'?"),
        ("zzz=1", "valid keys here: name, runs_directory"),
        ("distill.objective=gkd", "gkd is a recipe of several keys: give --objective gkd"),
        ("distill.objective=GKD", "gkd is a recipe of several keys: give --objective gkd"),
        ("distill.objective.type=gkd", "gkd is a recipe of several keys: give --objective gkd"),
        ("distill.objective.type=token-matching", "did you mean 'token_matching'?"),
    ],
)
def test_a_name_of_another_trainer_or_in_another_place_leads_to_ours(
    override: str, said: str
) -> None:
    assert said in _said(override)


def test_a_method_in_capitals_is_told_apart_from_one_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match=r"'GKD'; did you mean gkd\?"):
        recipe_path("GKD")
    with pytest.raises(ConfigError, match=r"'Reverse-KL-on-policy'; did you mean reverse_kl_on_po"):
        recipe_path("Reverse-KL-on-policy")
    with pytest.raises(ConfigError, match=r"'nothing' \(there are ammd"):
        recipe_path("nothing")


def test_a_recipe_on_prompts_alone_says_who_can_write_instead() -> None:
    gkd, alone = recipe_path("gkd"), ("data.student_sft=null", "student={sft: null, path: x}")
    pretrained = (*alone, "student.architecture=null", "tokenizer={type: pretrained, path: x}")
    with pytest.raises(ConfigError, match=r"dataset needs rows: .*source=teacher, which needs pro"):
        load_config([QUICKSTART, gkd], pretrained)
    teacher = (*pretrained, "distill.off_policy_source=teacher")
    assert load_config([QUICKSTART, gkd], teacher).distill.objective.type == "token_matching"


def test_a_key_of_nobody_has_no_hint() -> None:
    assert find_ours("zzz") is None

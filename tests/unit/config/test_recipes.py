"""The methods that are shipped: each loads over the quickstart and says what it says it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill_system.config import load_config
from distill_system.config.recipes import recipe_names, recipe_path
from distill_system.errors import ConfigError

QUICKSTART = Path(__file__).parents[3] / "configs/quickstart.yaml"

# What the name of a method says of its streams: off-policy, on-policy or both.
STREAMS = {
    "off_policy": ("off_policy",),
    "on_policy": ("on_policy",),
    "mixed": ("off_policy", "on_policy"),
}


def _distill(name, *overrides):
    return load_config([QUICKSTART, recipe_path(name)], overrides).distill


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_trains_on_the_whole_batch_of_the_configuration(name):
    distill = _distill(name)
    streams = [s for s in ("off_policy", "on_policy") if distill.objective.reads(s)]
    assert streams
    if distill.replay is None:
        assert sum(distill.sequences(stream) for stream in streams) == 128
    else:  # one stream a step
        assert [distill.sequences(stream) for stream in streams] == [128, 128]
    for suffix, expected in STREAMS.items():
        if name.endswith(f"_{suffix}") and not name.startswith("ammd"):
            assert tuple(streams) == expected


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_says_in_its_first_line_what_it_is(name):
    assert recipe_path(name).read_text().startswith("# ")


def test_the_model_that_teaches_itself_reads_more_as_the_teacher():
    configs = QUICKSTART.parent
    config = load_config(
        [configs / "smollm2.yaml", configs / "methods/on_policy_self_distillation.yaml"]
    )
    assert config.teacher.path == config.student.path
    assert config.student.sft is None
    assert config.teacher_model_length == config.max_model_length + 1024
    assert config.distill.sequences("off_policy") == 0
    told = load_config([QUICKSTART, configs / "methods/context_distillation.yaml"])
    assert told.data.teacher_context.fields == ("response",)


def test_a_baseline_without_a_teacher_asks_nothing_of_it():
    objective = _distill("sft").objective
    assert not objective.teacher_needs("off_policy").anything
    assert not objective.needs_teacher_distribution
    assert _distill("sft").off_policy_source == "dataset"


def test_a_mixture_needs_features_and_no_expected_embedding():
    needs = _distill("kl_mixture").objective.teacher_needs("on_policy")
    assert needs.features
    assert not needs.expected_embedding
    assert not needs.logprobs


def test_single_keys_win_over_a_recipe():
    assert (
        _distill("gkd", "distill.objective.on_policy_weight=0.25").objective.on_policy_weight
        == 0.25
    )


def test_an_unknown_method_is_refused_with_the_nearest_name():
    with pytest.raises(
        ConfigError, match=r"got 'kl_mixtur'; did you mean kl_mixture\? \(there are"
    ):
        recipe_path("kl_mixtur")


def test_a_file_of_ones_own_is_taken_as_it_is(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("distill: {objective: {type: token_matching, on_policy: {type: reverse_kl}}}")
    assert recipe_path(str(mine)) == mine
    assert load_config([QUICKSTART, mine]).distill.sequences("on_policy") == 128


def test_replay_needs_rows_and_both_streams():
    with pytest.raises(ConfigError, match="off_policy_source=dataset, got"):
        _distill("kl_mixture", "distill.replay={}")


def test_a_teacher_mixture_needs_the_teachers_text():
    with pytest.raises(ConfigError, match=r"\(0 mixes in none\): expected .*, got dataset"):
        _distill("minillm", "distill.off_policy_source=dataset")
    assert _distill("minillm", "distill.objective.teacher_mixture=0").sequences("off_policy") == 0

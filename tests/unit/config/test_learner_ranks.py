from __future__ import annotations

from pathlib import Path

import pytest

from distill_system.config import load_config
from distill_system.errors import ConfigError

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"


def _load(*overrides: str):
    return load_config([QUICKSTART], overrides)


@pytest.mark.parametrize(("written", "ranks"), [("1", 1), ("2", 2), ("4", 4), ("all", 4)])
def test_a_divisor_of_the_ranks_shares_one_copy_of_the_model(written, ranks):
    config = _load("pools.learner.count=4", f"learner.shard_ranks={written}")
    assert config.learner.shard_size(4) == ranks


def test_chunks_of_the_vocabulary_are_larger_on_a_gpu_unless_they_are_given():
    unset, given = _load().learner, _load("learner.vocabulary_chunk_tokens=77").learner
    assert [unset.chunk_tokens(on_gpu=on_gpu) for on_gpu in (False, True)] == [512, 4096]
    assert [given.chunk_tokens(on_gpu=on_gpu) for on_gpu in (False, True)] == [77, 77]


@pytest.mark.parametrize("written", ["3", "8"])
def test_other_numbers_of_ranks_cannot_share_a_copy(written):
    with pytest.raises(ConfigError, match=f"divisor of pools.learner.count=4 .*got {written}"):
        _load("pools.learner.count=4", f"learner.shard_ranks={written}")


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_fine_tuning_has_a_row_for_every_rank(role):
    with pytest.raises(ConfigError, match=rf"{role}\.sft\.batch_size .*count=4.* got 3"):
        _load("pools.learner.count=4", f"{role}.sft.batch_size=3")


def test_a_step_begins_with_a_sequence_of_the_student_for_every_rank():
    ahead = ["distill.staleness.max_staleness=2", "distill.staleness.too_old=reissue"]
    shared = [*ahead, "pools.learner.count=4", "distill.student_prompts_per_step=8"]
    _load(*shared, "distill.staleness.min_on_policy_share=0.5")
    with pytest.raises(ConfigError, match=r"begin with 2 of .* at least pools.learner.count=4"):
        _load(*shared, "distill.staleness.min_on_policy_share=0.25")


def test_a_part_of_a_sequence_counts_as_one_in_what_a_step_needs():
    """0.3 of 8 is 2.4: a step needs 3."""
    ahead = ["distill.staleness.max_staleness=2", "distill.staleness.too_old=reissue"]
    shared = [*ahead, "distill.student_prompts_per_step=8"]
    share = "distill.staleness.min_on_policy_share=0.3"
    _load(*shared, share, "pools.learner.count=3")
    with pytest.raises(ConfigError, match=r"begin with 3 of .* at least pools.learner.count=4"):
        _load(*shared, share, "pools.learner.count=4")

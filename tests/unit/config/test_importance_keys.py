from __future__ import annotations

from pathlib import Path

import pytest

from distill_system.config import load_config
from distill_system.errors import ConfigError

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
TRUNCATED = ("rollout.sampling.top_p=0.9", "distill.staleness.max_staleness=2")


@pytest.mark.parametrize("kind", ["token", "state"])
def test_ratios_of_truncated_sampling_are_refused(kind):
    importance = f"distill.staleness.importance={kind}"
    with pytest.raises(ConfigError, match=f"expected top_k too.*got top_p=0.9.*{kind}"):
        load_config([QUICKSTART], [*TRUNCATED, importance])
    smallest = ("rollout.sampling.min_p=0.1", TRUNCATED[1])
    with pytest.raises(ConfigError, match=r"got top_p=1.0, min_p=0.1"):
        load_config([QUICKSTART], [*smallest, importance])
    bounded = (*TRUNCATED, "rollout.sampling.min_p=0.1", "rollout.sampling.top_k=20", importance)
    assert load_config([QUICKSTART], bounded).rollout.sampling.can_be_read_again


def test_truncated_sampling_goes_with_text_that_is_not_weighed():
    staleness = load_config([QUICKSTART], TRUNCATED).distill.staleness
    assert (staleness.max_staleness, staleness.importance) == (2, "none")


def test_another_temperature_may_be_weighed():
    overrides = [
        "rollout.sampling.temperature=0.8",
        "distill.staleness.max_staleness=2",
        "distill.staleness.importance=state",
    ]
    assert load_config([QUICKSTART], overrides).distill.staleness.importance_cap == 2.0

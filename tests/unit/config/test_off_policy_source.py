"""Who writes the off-policy stream: one source by name, or several by weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill_system.config import dump_config, load_config
from distill_system.errors import ConfigError

QUICKSTART = Path(__file__).parents[3] / "configs/quickstart.yaml"
STORE = "data.trajectory_store=store"


def load(source, *overrides):
    return load_config([QUICKSTART], [f"distill.off_policy_source={source}", *overrides])


@pytest.mark.parametrize(
    ("source", "mixture"),
    [
        ("teacher", {"teacher": 1.0}),
        ("dataset", {"dataset": 1.0}),
        ("store", {"store": 1.0}),
        ("{store: 3, teacher: 1}", {"teacher": 0.25, "store": 0.75}),
        ("{dataset: 2, store: 5, teacher: 3}", {"teacher": 0.3, "store": 0.5, "dataset": 0.2}),
        ("{dataset: 7}", {"dataset": 1.0}),
    ],
)
def test_sources_become_shares_in_one_order(source, mixture):
    found = load(source, STORE).distill.off_policy_mixture
    assert list(found) == list(mixture)
    assert found == pytest.approx(mixture)


def test_a_mixture_survives_the_written_configuration_and_a_name_stays_a_name(tmp_path):
    for source, written in (("store", "store"), ("{store: 3}", {"store": 3.0})):
        config = load(source, STORE)
        path = tmp_path / "config.json"
        path.write_text(dump_config(config))
        assert json.loads(path.read_text())["distill"]["off_policy_source"] == written
        assert load_config([path]) == config


@pytest.mark.parametrize(
    "source", ["students", "{}", "[teacher]", "3", "null", "{teacher: 0}", "{teacher: -1}"]
)
def test_what_is_no_source_is_refused_once_with_what_is_expected(source):
    with pytest.raises(ConfigError) as told:
        load(source, STORE)
    said = str(told.value)
    assert "has 1 problem" in said
    assert "expected 'teacher', 'store', 'dataset' or 'preferences', or weights > 0 of" in said
    assert "distill.off_policy_source (override" in said


def test_the_store_has_to_be_given():
    with pytest.raises(ConfigError, match=r"source=store needs samples: give data\.trajectory"):
        load("{teacher: 1, store: 1}")


def test_replay_takes_rows_alone():
    losses = "on_policy: {type: reverse_kl}, off_policy: {type: forward_kl}"
    both = f"distill.objective={{type: token_matching, {losses}}}"
    assert load("dataset", both, "distill.replay={}").distill.replay is not None
    assert load("{dataset: 1}", both, "distill.replay={}").distill.replay is not None
    with pytest.raises(ConfigError, match="replay chooses between rows of data"):
        load("{dataset: 1, teacher: 1}", both, "distill.replay={}")


def test_a_teacher_mixture_takes_no_rows_and_any_text_of_the_teacher():
    minillm = "distill.objective={type: minillm}"
    assert load("{teacher: 1, store: 1}", STORE, minillm)
    told = r"teacher_mixture=0\.2 mixes in text that the teacher wrote.*got \{'teacher': 1"
    with pytest.raises(ConfigError, match=told):
        load("{teacher: 1, dataset: 1}", minillm)

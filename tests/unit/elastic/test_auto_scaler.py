"""The controller against a modelled pipeline: it finds what a search over all sizes finds."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_system.config.pools import PoolConfig, ScalingConfig
from distill_system.elastic.scaling import AutoScaler, ScalingObservation
from distill_system.records import PoolActivity

NAMES = ("student_rollout", "teacher_rollout", "teacher_scoring")
LOOKS = 200


@dataclass(frozen=True)
class Pipeline:
    """Pools in front of a learner, as fast as the slowest of them; a steady state, no queues.

    rates: batches a second of one worker.  learner_rate: batches a second.
    """

    rates: dict[str, float]
    learner_rate: float

    def throughput(self, sizes: dict[str, int]) -> float:
        return min(self.learner_rate, *(sizes[name] * self.rates[name] for name in self.rates))

    def best(self, bounds: dict[str, PoolConfig]) -> dict[str, int]:
        """The fewest workers that reach the most that any sizes within the bounds reach."""
        ranges = [range(bounds[name].fewest, bounds[name].most + 1) for name in self.rates]
        every = [dict(zip(self.rates, sizes, strict=True)) for sizes in itertools.product(*ranges)]
        most = max(self.throughput(sizes) for sizes in every)
        enough = [sizes for sizes in every if self.throughput(sizes) >= most * (1 - 1e-9)]
        return min(enough, key=lambda sizes: sum(sizes.values()))

    def look(
        self, sizes: dict[str, int], at: float, noise: random.Random, spread: float
    ) -> ScalingObservation:
        rate = self.throughput(sizes)
        starved = 1.0 - rate / self.learner_rate
        slowest = min(self.rates, key=lambda name: sizes[name] * self.rates[name])
        return ScalingObservation(
            at_seconds=at,
            pools={
                name: self._activity(name, sizes[name], rate, slowest, noise, spread)
                for name in self.rates
            },
            learner_starved_share=_within(starved + noise.uniform(-spread, spread)),
            waited_for=slowest if starved > 0 else None,
        )

    def _activity(
        self, name: str, size: int, rate: float, slowest: str, noise: random.Random, spread: float
    ) -> PoolActivity:
        """Idle time is starved behind the slowest pool, blocked before it or before the learner."""
        used = _within(rate / (size * self.rates[name]) + noise.uniform(-spread, spread))
        behind = name == "teacher_scoring" and rate < self.learner_rate and slowest != name
        idle = (1.0 - used) * size * 10.0
        return PoolActivity(
            num_workers=size,
            seconds=10.0,
            busy_seconds=used * size * 10.0,
            starved_seconds=idle if behind else 0.0,
            blocked_seconds=0.0 if behind else idle,
        )


def _within(share: float) -> float:
    return min(1.0, max(0.0, share))


def _run(
    pipeline: Pipeline,
    bounds: dict[str, PoolConfig],
    spread: float,
    seed: int,
    total_gpus: float | None = None,
) -> list[dict[str, int]]:
    """Sizes after each look."""
    how = {"automatic": True, "patience": 3, "cool_down_seconds": 25.0, "total_gpus": total_gpus}
    scaler = AutoScaler(ScalingConfig.model_validate(how), bounds)
    sizes = {name: pool.count for name, pool in bounds.items()}
    noise, history = random.Random(seed), [sizes]
    for index in range(LOOKS):
        look = pipeline.look(sizes, 10.0 * index, noise, spread)
        changed = scaler.decide(look, sizes)
        assert len(changed) <= (1 if total_gpus is None else 2)
        assert all(abs(changed[name] - sizes[name]) == 1 for name in changed)
        sizes = {**sizes, **changed}
        assert all(bounds[name].fewest <= sizes[name] <= bounds[name].most for name in sizes)
        history.append(sizes)
    return history


@st.composite
def _bounds(draw: st.DrawFn) -> PoolConfig:
    fewest, count, most = sorted(draw(st.integers(1, 8)) for _ in range(3))
    return PoolConfig(min_count=fewest, count=count, max_count=most)


@settings(max_examples=80)
@given(
    rates=st.fixed_dictionaries({name: st.floats(0.12, 3.0) for name in NAMES}),
    bounds=st.fixed_dictionaries({name: _bounds() for name in NAMES}),
    spread=st.sampled_from([0.0, 0.04]),
    seed=st.integers(0, 99),
)
def test_from_any_start_it_comes_within_one_worker_of_the_best_and_stays(
    rates: dict[str, float], bounds: dict[str, PoolConfig], spread: float, seed: int
) -> None:
    pipeline = Pipeline(rates=rates, learner_rate=1.0)
    history = _run(pipeline, bounds, spread, seed)
    best = pipeline.best(bounds)
    last = history[-1]
    # A learner that waits for up to a tenth of its time is let be, so are spare workers up to that.
    assert pipeline.throughput(last) >= (0.9 - spread) * pipeline.throughput(best) - 1e-9
    assert all(abs(last[name] - best[name]) <= 1 for name in NAMES), (last, best)
    for name in NAMES:
        moves = [after[name] - before[name] for before, after in itertools.pairwise(history)]
        turns = sum(a != b for a, b in itertools.pairwise(move for move in moves if move))
        assert turns == 0, f"{name} swings"


@settings(max_examples=80)
@given(
    rates=st.fixed_dictionaries({name: st.floats(0.05, 3.0) for name in NAMES}),
    counts=st.fixed_dictionaries({name: st.integers(1, 5) for name in NAMES}),
    spread=st.sampled_from([0.0, 0.04]),
    seed=st.integers(0, 99),
)
def test_gpus_move_until_the_split_is_near_the_best_and_then_stay(
    rates: dict[str, float], counts: dict[str, int], spread: float, seed: int
) -> None:
    """The best of all splits, by trying each; what is measured wrongly counts twice in a pair."""
    pipeline, total = Pipeline(rates=rates, learner_rate=1.0), sum(counts.values())
    bounds = {
        name: PoolConfig(min_count=1, count=count, max_count=total, gpus=1.0)
        for name, count in counts.items()
    }
    history = _run(pipeline, bounds, spread, seed, total_gpus=total)
    assert all(sum(sizes.values()) == total for sizes in history), "none is given up for nothing"
    every = itertools.product(range(1, total), repeat=len(NAMES))
    splits = [dict(zip(NAMES, sizes, strict=True)) for sizes in every if sum(sizes) == total]
    best = max(pipeline.throughput(sizes) for sizes in splits)
    assert pipeline.throughput(history[-1]) >= (0.9 - 2 * spread) * best
    for name in NAMES:
        moves = [after[name] - before[name] for before, after in itertools.pairwise(history)]
        assert not (any(move > 0 for move in moves) and any(move < 0 for move in moves)), history


def test_a_large_worker_is_paid_for_by_several_small_ones_and_room_costs_nobody() -> None:
    pools = {
        "student_rollout": PoolConfig(min_count=1, count=2, max_count=4, gpus=2.0),
        "teacher_scoring": PoolConfig(min_count=1, count=4, max_count=8, gpus=1.0),
    }
    look = _look(0.0, 0.5, "student_rollout", student_rollout=1.0, teacher_scoring=0.4)
    present = {"student_rollout": 2, "teacher_scoring": 4}

    def decide(**how: object) -> dict[str, int]:
        config = ScalingConfig.model_validate({"automatic": True, "patience": 1, **how})
        return AutoScaler(config, pools).decide(look, present)

    assert decide(total_gpus=8) == {"student_rollout": 3, "teacher_scoring": 2}
    assert decide(total_gpus=9) == {"student_rollout": 3, "teacher_scoring": 3}
    assert decide(total_gpus=10) == {"student_rollout": 3}
    assert decide(total_gpus=8, spare_share=0.3) == {}, "0.4 of four is 0.8 of two"


def _look(
    at: float, starved: float = 0.0, waited_for: str | None = None, **used: float
) -> ScalingObservation:
    return ScalingObservation(
        at_seconds=at,
        pools={
            name: PoolActivity(num_workers=4, seconds=1.0, blocked_seconds=4.0 * (1.0 - share))
            for name, share in used.items()
        },
        learner_starved_share=starved,
        waited_for=waited_for,
    )


def _scaler(**fields: object) -> AutoScaler:
    pool = PoolConfig(min_count=1, count=4, max_count=8)
    config = ScalingConfig.model_validate({"patience": 3, "cool_down_seconds": 100.0, **fields})
    return AutoScaler(config, dict.fromkeys(NAMES, pool))


PRESENT = dict.fromkeys(NAMES, 4)


def test_it_acts_only_when_looks_in_a_row_agree() -> None:
    scaler = _scaler()
    starving, fine = (0.5, "student_rollout"), (0.0, None)
    said = [
        scaler.decide(_look(float(at), *state, student_rollout=1.0), PRESENT)
        for at, state in enumerate([starving, starving, fine, starving, starving, starving])
    ]
    assert said == [{}, {}, {}, {}, {}, {"student_rollout": 5}]


@pytest.mark.parametrize("is_by_hand", [False, True])
def test_after_a_change_it_waits_until_the_effect_can_show(is_by_hand: bool) -> None:
    scaler = _scaler(patience=1)
    look = _look(0.0, 0.5, "student_rollout", student_rollout=1.0)
    if is_by_hand:
        scaler.start_cool_down(0.0)
    else:
        assert scaler.decide(look, PRESENT) == {"student_rollout": 5}
    later = [_look(at, 0.5, "student_rollout", student_rollout=1.0) for at in (50.0, 99.0, 100.0)]
    assert [bool(scaler.decide(look, PRESENT)) for look in later] == [False, False, True]


def test_nothing_shrinks_while_something_can_grow() -> None:
    look = _look(0.0, 0.5, "student_rollout", student_rollout=1.0, teacher_scoring=0.1)
    assert _scaler(patience=1).decide(look, PRESENT) == {"student_rollout": 5}


def test_the_pool_whose_output_waits_most_is_the_first_to_shrink() -> None:
    look = _look(0.0, student_rollout=0.5, teacher_rollout=0.2, teacher_scoring=0.9)
    assert _scaler(patience=1).decide(look, PRESENT) == {"teacher_rollout": 3}


def test_a_pool_that_the_learner_waits_for_never_shrinks() -> None:
    """It may look idle between two batches; at its most it stays as it is."""
    look = _look(0.0, 0.5, "student_rollout", student_rollout=0.3)
    assert _scaler(patience=1).decide(look, {**PRESENT, "student_rollout": 8}) == {}


def test_a_wait_for_a_pool_that_may_not_change_changes_nothing_else_for_it() -> None:
    look = _look(0.0, 0.5, "learner", student_rollout=0.95, teacher_scoring=0.9)
    assert _scaler(patience=1).decide(look, PRESENT) == {}

"""When an engine sleeps, on one that minds what it is asked in which state."""

from __future__ import annotations

import pytest

from distill_system.rollout.idle_sleep import IdleSleep


class Engine:
    """vLLM's part: it can be given work and step only when it is awake."""

    def __init__(self, *, can_sleep: bool = True) -> None:
        self.can_sleep = can_sleep
        self.is_asleep = False
        self.work = 0
        self.naps = 0

    def add(self) -> None:
        assert not self.is_asleep, "work for an engine that sleeps"
        self.work += 1

    def step(self) -> None:
        assert not self.is_asleep, "a step of an engine that sleeps"
        self.work -= 1

    def has_unfinished_requests(self) -> bool:
        return self.work > 0

    def sleep(self, level: int) -> None:
        assert self.can_sleep, "built without enable_sleep_mode"
        assert level == 1
        assert not self.is_asleep, "asleep already"
        self.is_asleep = True
        self.naps += 1

    def wake_up(self) -> None:
        assert self.is_asleep, "awake already"
        self.is_asleep = False


@pytest.mark.parametrize("rounds", [1, 3])
def test_it_sleeps_between_its_work_and_only_then(rounds: int) -> None:
    engine = Engine()
    sleep = IdleSleep(engine, is_on=True)
    sleep.rest()
    for _ in range(rounds):
        for _ in range(2):
            sleep.wake()
            engine.add()
        engine.step()
        sleep.rest()
        assert not engine.is_asleep, "one request is left"
        engine.step()
        sleep.rest()
        sleep.rest()
        assert engine.is_asleep
    assert engine.naps == rounds + 1


def test_an_engine_that_may_not_sleep_is_never_asked_to() -> None:
    engine = Engine(can_sleep=False)
    sleep = IdleSleep(engine, is_on=False)
    sleep.rest()
    sleep.wake()
    engine.add()
    engine.step()
    sleep.rest()
    assert not engine.is_asleep

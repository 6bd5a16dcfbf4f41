"""Calls that are made again when their worker is lost, over workers that die as a test says."""

from __future__ import annotations

from typing import Any

import pytest
from fakes.local_workers import LocalWorkers

from distill_system.cluster import SupervisedWorkers, supervised
from distill_system.errors import DeadlineError, ModelError, RepeatedLossError, WorkerLostError
from distill_system.workers import StartedWorker


class Scribe:
    """Answers with what it was asked, unless `death` says that it dies of it."""

    def __init__(self, number: int, death: Any) -> None:
        self.number, self.death = number, death

    def say(self, word: str) -> str:
        if self.death(self.number, word):
            raise WorkerLostError(f"scribes-{self.number} died", f"scribes-{self.number}")
        if word == "wrong":
            raise ModelError("the word is wrong")
        return f"{word} by {self.number}"

    def say_with_receipt(self, word: str) -> tuple[int, str]:
        return len(word), self.say(word)


class Scribes:
    """Two supervised scribes, and who replaces them: at once, or when a next one is waited for."""

    def __init__(self, death: Any = lambda number, word: False, *, replaces: bool = False) -> None:
        self.death, self.replaces = death, replaces
        self.group = LocalWorkers([Scribe(number, death) for number in range(2)])
        self.group.may_fetch_again = True
        self.workers = SupervisedWorkers("scribes", self.group)
        self.workers.supervision = self
        self.lost: list[str] = []
        self.places: list[str] = []

    def lose(self, lost: WorkerLostError) -> None:
        if lost.worker_id in self.group.members:
            self.lost.append(lost.worker)
            self.places.append(self.group.vacate(lost.worker_id))
            if self.replaces:
                self._replace()

    def notice(self) -> None:
        """Nobody dies unheard here."""

    def wait_for_worker(self, pool: str) -> None:
        assert pool == "scribes"
        self._replace()

    def _replace(self) -> None:
        number = self.group.take_id()
        started = StartedWorker(number, Scribe(number, self.death), self.places.pop())
        self.group.add(started)

    def finish(self, *references: Any) -> list[Any]:
        return self.workers.finish(references, what="words")


def test_without_a_loss_it_is_the_group_itself() -> None:
    scribes = Scribes()
    first, second = scribes.workers.start(0, "say", "a"), scribes.workers.start(1, "say", "b")
    assert scribes.finish(first, second) == ["a by 0", "b by 1"]
    receipt, result = scribes.workers.start_with_receipt(1, "say_with_receipt", "long")
    assert scribes.finish(receipt) == [4]
    assert scribes.workers.current(result) is result
    assert (scribes.workers.members, scribes.workers.count) == ((0, 1), 2)


def test_the_calls_of_a_lost_worker_are_made_again_by_another_in_their_places() -> None:
    scribes = Scribes(lambda number, word: number == 0)
    references = [scribes.workers.start(at % 2, "say", word) for at, word in enumerate("abcd")]
    assert scribes.finish(*references) == ["a by 1", "b by 1", "c by 1", "d by 1"]
    assert scribes.lost == ["scribes-0"]
    assert scribes.workers.members == (1,)
    assert scribes.workers.count == 2, "the place is kept, and work is dealt as before"


def test_the_result_behind_a_receipt_moves_with_its_call() -> None:
    scribes = Scribes(lambda number, word: number == 0)
    receipt, result = scribes.workers.start_with_receipt(0, "say_with_receipt", "long")
    assert scribes.finish(receipt) == [4]
    moved = scribes.workers.current(result)
    assert moved is not result
    assert scribes.group.finish([moved], what="a word") == ["long by 1"]


def test_where_all_are_lost_the_next_one_is_waited_for() -> None:
    scribes = Scribes(lambda number, word: number < 2)
    references = [scribes.workers.start(at, "say", word) for at, word in enumerate("ab")]
    # Both calls are first made again at the other, which dies of them too; then one is left.
    with pytest.raises(RepeatedLossError):
        scribes.finish(*references)
    scribes.workers.forget_all()
    assert scribes.finish(scribes.workers.start(scribes.workers.members[0], "say", "c")) == [
        "c by 2"
    ]


def test_a_call_that_costs_a_second_worker_is_told_by_its_reference() -> None:
    scribes = Scribes(lambda number, word: word == "poison", replaces=True)
    fine, fatal = scribes.workers.start(0, "say", "a"), scribes.workers.start(1, "say", "poison")
    with pytest.raises(RepeatedLossError, match="say has lost 2 workers") as caught:
        scribes.finish(fine, fatal)
    assert caught.value.call is fatal
    assert len(scribes.lost) == 2
    assert scribes.finish(fine) in (["a by 0"], ["a by 2"], ["a by 3"]), "the other goes on"


def test_a_fatal_call_is_told_to_who_waits_for_it_and_to_nobody_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Calls of others queue at the same worker: the teacher's next batch, and held-out prompts."""
    monkeypatch.setattr(supervised, "MOST_LOSSES", 1)
    scribes = Scribes(lambda number, word: number == 0)
    later, now = scribes.workers.start(0, "say", "a"), scribes.workers.start(0, "say", "b")
    assert scribes.finish(now) == ["b by 1"], "the one before it was blamed"
    with pytest.raises(RepeatedLossError) as caught:
        scribes.finish(later)
    assert caught.value.call is later
    assert scribes.lost == ["scribes-0"]


def test_a_workers_own_error_loses_nobody() -> None:
    scribes = Scribes()
    with pytest.raises(ModelError, match="the word is wrong"):
        scribes.finish(scribes.workers.start(0, "say", "wrong"))
    assert scribes.lost == []


def test_workers_that_miss_a_deadline_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    scribes, real = Scribes(), LocalWorkers.finish
    late = [DeadlineError("waited 3 s for words from scribes-0", ["scribes-0"])]

    def finish(self: LocalWorkers, *arguments: Any, **how: Any) -> list[Any]:
        if late:
            raise late.pop()
        return real(self, *arguments, **how)

    monkeypatch.setattr(LocalWorkers, "finish", finish)
    assert scribes.finish(scribes.workers.start(0, "say", "a")) == ["a by 1"]
    assert scribes.lost == ["scribes-0"]


@pytest.mark.parametrize(
    "error",
    [
        WorkerLostError("learner-0 died", "learner-0"),
        DeadlineError("nobody is named"),
        DeadlineError("two pools", ["scribes-0", "learner-0"]),
    ],
)
def test_losses_of_other_pools_are_not_its_business(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def finish(*_: Any, **__: Any) -> list[Any]:
        raise error

    monkeypatch.setattr(LocalWorkers, "finish", finish)
    scribes = Scribes()
    with pytest.raises(type(error)) as caught:
        scribes.finish(scribes.workers.start(0, "say", "a"))
    assert caught.value is error
    assert scribes.lost == []


def test_without_supervision_a_loss_is_the_callers() -> None:
    scribes = Scribes(lambda number, word: True)
    scribes.workers.supervision = None
    with pytest.raises(WorkerLostError, match="scribes-0 died"):
        scribes.finish(scribes.workers.start(0, "say", "a"))

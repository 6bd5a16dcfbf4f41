from collections.abc import Sequence

import numpy as np
import pytest
from fakes.local_workers import LocalWorkers
from hypothesis import given
from hypothesis import strategies as st

from distill_system.cluster import SupervisedWorkers
from distill_system.errors import WorkerLostError
from distill_system.records import Author, Finish, Prompt, Trajectory
from distill_system.rollout.pool import RolloutPool, deal_by_length
from distill_system.rollout.sampling import Sampling
from distill_system.rollout.worker import RolloutWorker
from distill_system.workers import StartedWorker

SAMPLING = Sampling(temperature=1.0, max_response_tokens=4)


class Writer:
    """Stands for RolloutWorker.generate: answers with the prompt's length."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, label: str
    ) -> list[Trajectory]:
        assert prompts, "a worker without prompts must not be called"
        assert (sampling, seed, label) == (SAMPLING, 3, "step-0")
        return [
            Trajectory(
                trajectory_id=f"{label}/teacher/{prompt.sample_id}",
                prompt_id=prompt.prompt_id,
                author=Author.TEACHER,
                token_ids=np.append(prompt.token_ids, np.int32(prompt.token_ids.size)),
                num_prompt_tokens=int(prompt.token_ids.size),
                behaviour_logprobs=np.zeros(1, np.float32),
                temperature=1.0,
                finish=Finish.STOP,
            )
            for prompt in prompts
        ]


def _writers(count: int) -> LocalWorkers:
    return LocalWorkers([Writer() for _ in range(count)], stands_for=RolloutWorker)


def _prompt(name: str, length: int) -> Prompt:
    return Prompt(prompt_id=name, token_ids=np.ones(length, np.int32), text="")


LENGTHS = st.lists(st.integers(1, 400), max_size=40)


@given(lengths=LENGTHS, num_workers=st.integers(1, 9))
def test_trajectories_come_back_in_the_prompts_order(lengths: list[int], num_workers: int) -> None:
    prompts = [_prompt(str(at), length) for at, length in enumerate(lengths)]
    workers = _writers(num_workers)
    trajectories = RolloutPool(workers).generate(prompts, SAMPLING, 3, "step-0")
    assert [trajectory.prompt_id for trajectory in trajectories] == [p.prompt_id for p in prompts]
    assert [int(trajectory.response_ids[0]) for trajectory in trajectories] == lengths
    assert workers.calls == [
        (worker, "generate") for worker in range(min(num_workers, len(lengths)))
    ]


@given(lengths=LENGTHS, num_workers=st.integers(1, 9))
def test_shards_are_a_partition_of_like_cost(lengths: list[int], num_workers: int) -> None:
    shards = deal_by_length(lengths, num_workers)
    assert sorted(at for shard in shards for at in shard) == list(range(len(lengths)))
    if not shards:
        return
    counts = [len(shard) for shard in shards]
    assert max(counts) - min(counts) <= 1
    totals = [sum(lengths[at] for at in shard) for shard in shards]
    assert max(totals) - min(totals) <= max(lengths)


def test_a_pool_finishes_rollouts_begun_earlier_in_any_order() -> None:
    pool = RolloutPool(_writers(2))
    first = pool.start([_prompt("a", 3), _prompt("b", 1)], SAMPLING, 3, "step-0")
    second = pool.start([_prompt("c", 2)], SAMPLING, 3, "step-0")
    assert [trajectory.prompt_id for trajectory in pool.finish(second)] == ["c"]
    assert [trajectory.prompt_id for trajectory in pool.finish(first)] == ["a", "b"]


def test_a_prompt_that_stands_in_a_call_again_is_asked_for_another_sample() -> None:
    prompts = [_prompt(name, length) for name, length in (("a", 3), ("b", 1), ("a", 3), ("a", 3))]
    trajectories = RolloutPool(_writers(2)).generate(prompts, SAMPLING, 3, "step-0")
    assert [trajectory.prompt_id for trajectory in trajectories] == ["a", "b", "a", "a"]
    names = [trajectory.trajectory_id.rpartition("/")[2] for trajectory in trajectories]
    assert names == ["a", "b", "a#2", "a#3"]


class Fatal(Writer):
    """Dies of one prompt, and with it whatever else is in the call."""

    def __init__(self, number: int, deaths: list[int]) -> None:
        self.number, self.deaths = number, deaths

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, label: str
    ) -> list[Trajectory]:
        if any(prompt.prompt_id == "p5" for prompt in prompts):
            self.deaths.append(self.number)
            raise WorkerLostError(f"pool-{self.number} died", f"pool-{self.number}")
        return super().generate(prompts, sampling, seed, label)


class Replacing:
    """Two such writers, each replaced as it dies."""

    def __init__(self) -> None:
        self.deaths: list[int] = []
        self.group = LocalWorkers([Fatal(at, self.deaths) for at in range(2)])
        self.group.may_fetch_again = True
        self.workers = SupervisedWorkers("pool", self.group)
        self.workers.supervision = self

    def lose(self, lost: WorkerLostError) -> None:
        if lost.worker_id in self.group.members:
            place, number = self.group.vacate(lost.worker_id), self.group.take_id()
            self.group.add(StartedWorker(number, Fatal(number, self.deaths), place))

    def notice(self) -> None:
        """Nobody dies unheard here."""

    def wait_for_worker(self, pool: str) -> None:
        raise AssertionError("there is one")


def test_a_prompt_that_costs_workers_is_found_among_the_others_and_named() -> None:
    prompts = [_prompt(f"p{at}", 4) for at in range(8)]
    replacing = Replacing()
    with pytest.raises(WorkerLostError, match=r"prompt 'p5' costs a worker .* pool-\d died"):
        RolloutPool(replacing.workers).generate(prompts, SAMPLING, 3, "step-0")
    assert len(replacing.deaths) == 4, "twice among others, twice alone"


def test_a_prompt_that_costs_workers_is_left_out_and_the_others_keep_their_order() -> None:
    prompts = [_prompt(f"p{at}", 4) for at in range(8)]
    told: list[str] = []
    pool = RolloutPool(
        Replacing().workers, leave_out=lambda prompt, lost: told.append(prompt.prompt_id)
    )
    pending = pool.start(prompts, SAMPLING, 3, "step-0")
    each = pool.finish_each(pending)
    assert told == ["p5"]
    assert each[5] is None
    assert [t.prompt_id for t in each if t is not None] == [f"p{at}" for at in range(8) if at != 5]

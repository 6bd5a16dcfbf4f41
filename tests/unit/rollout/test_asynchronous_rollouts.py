"""Which rollout worker is given a prompt while a weight version is on its way to all of them."""

from __future__ import annotations

from types import SimpleNamespace

from local_workers import LocalWorkers
from simulated_pools import make_prompts

from distill_system.observe import PoolClock
from distill_system.rollout import AsynchronousRollouts, GenerationRequest, Sampling

SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_response_tokens=4)


def writers(count, *, version=0):
    workers = LocalWorkers([SimpleNamespace() for _ in range(count)])
    return AsynchronousRollouts(
        workers,
        PoolClock(workers.members, 0.0),
        slice_seconds=0.1,
        version=version,
    )


def give_all(rollouts, prompts, needed):
    """Give prompts out until none may be given; returns the workers that got one, in order."""
    given = []
    for prompt in prompts:
        found = rollouts.find_free(lambda version: version >= needed)
        if found is None:
            break
        request = GenerationRequest(prompt=prompt, label="ticket", sampling=SAMPLING, seed=0)
        rollouts.give(found[0], prompt.prompt_id, request)
        given.append(found[0])
    return given


def test_the_first_worker_with_new_weights_does_not_get_what_is_meant_for_all():
    rollouts, prompts = writers(4), make_prompts(40)
    assert sorted(give_all(rollouts, prompts[:8], needed=0)) == [0, 0, 1, 1, 2, 2, 3, 3]
    rollouts.hold(2, 1)
    first = give_all(rollouts, prompts[8:], needed=1)
    assert first == [2]  # one more than the others, no more
    for worker in (0, 1, 3):
        rollouts.hold(worker, 1)
    rest = give_all(rollouts, prompts[8 + len(first) :], needed=1)
    assert {worker: (first + rest).count(worker) for worker in range(4)} == dict.fromkeys(
        range(4), 8
    )


def test_a_worker_that_joined_without_weights_holds_nobody_back():
    rollouts, prompts = writers(1), make_prompts(5)
    rollouts.take_in(1, 0.0, version=-(10**9))
    assert give_all(rollouts, prompts, needed=0) == [0] * 5

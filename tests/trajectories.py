"""Trajectories of chosen lengths for tests, with random tokens."""

from __future__ import annotations

import numpy as np

from distill_system.data import SampleOrigin
from distill_system.records import Author, Finish, Trajectory, VersionSpan


def make_trajectory(
    index: int, num_prompt: int, num_response: int, author: Author = Author.STUDENT
) -> Trajectory:
    generator = np.random.default_rng(index)
    spans = (VersionSpan(version=3, start=0, end=num_response),)
    known = author is not Author.DATASET
    return Trajectory(
        trajectory_id=f"t{index}",
        prompt_id=f"p{index}",
        author=author,
        token_ids=generator.integers(4, 64, num_prompt + num_response).astype(np.int32),
        num_prompt_tokens=num_prompt,
        behaviour_logprobs=np.full(num_response if known else 0, -1.5, dtype=np.float32),
        temperature=1.0,
        finish=Finish.STOP if index % 2 else Finish.LENGTH,
        weight_versions=spans if author is Author.STUDENT else (),
    )


def make_trajectories(
    count: int, author: Author = Author.STUDENT, first: int = 0
) -> list[Trajectory]:
    """Ragged: prompts of 2 to 8 tokens, responses of 1 to 11."""
    return [
        make_trajectory(i, 2 + (3 * i) % 7, 1 + (5 * i) % 11, author)
        for i in range(first, first + count)
    ]


SAMPLE_ORIGIN = SampleOrigin(
    author=Author.TEACHER,
    model="teacher",
    model_fingerprint="f",
    tokenizer_fingerprint="t",
    temperature=1.0,
    top_p=1.0,
    max_response_tokens=50,
    stop_token_ids=(1,),
    seed=0,
)
"""Of samples in a trajectory store, but for what a test replaces."""

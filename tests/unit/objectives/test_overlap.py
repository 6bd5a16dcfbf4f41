"""Tokens that student and teacher have in common, against whole distributions and Python's sets."""

import pytest
from two_policies import TwoPolicies

from distill_system.objectives import measure_overlap


def _alone(tensor):
    return tensor


@pytest.mark.parametrize("k", [1, 4, 23])
def test_the_overlap_is_that_of_the_sets_of_most_likely_tokens(k):
    both = TwoPolicies()
    found = measure_overlap(both.heads(), both.rows(k=k), _alone)
    student = (both.hidden @ both.unembedding.T).softmax(-1).argsort(-1, descending=True)
    teacher = (both.features @ both.teacher_unembedding.T).softmax(-1).argsort(-1, descending=True)
    shares = [
        len(set(own[:k].tolist()) & set(theirs[:k].tolist())) / k
        for own, theirs in zip(student, teacher, strict=True)
    ]
    assert found == pytest.approx(sum(shares) / len(shares))


def test_equal_policies_have_everything_in_common():
    both = TwoPolicies(equal=True)
    assert measure_overlap(both.heads(), both.rows(k=5), _alone) == 1.0

"""The performance-difference lemma, with our own terms on an enumerable language.

J(teacher) - J(student) must equal the on-policy cost of the teacher's action values, and the
off-policy gap of the student's action values (Kakade and Langford 2002; Swamy et al. 2021,
arXiv 2103.03236). Critics are the full tables: one-hot features and one-hot actions.
"""

from __future__ import annotations

import pytest
import torch
from enumerable_language import EnumerableLanguage
from fakes.fixed_critic import FixedCritic
from token_rows import make_token_rows

from distill_system.config.objective import AmmdConfig
from distill_system.objectives.ammd import Ammd
from distill_system.objectives.rows import PolicyHeads, TeacherRows

LANGUAGE = EnumerableLanguage(vocabulary=3, length=3)
STATES = LANGUAGE.states
DISCOUNT = 0.9


def _table(seed):
    return torch.randn(len(STATES), 3, generator=torch.Generator().manual_seed(seed))


def _action_values(policy_SV, rewards_SV):
    """Q by backward recursion over states, written without any of our code."""
    index = {state: row for row, state in enumerate(STATES)}
    values = torch.zeros_like(rewards_SV)
    for state in sorted(STATES, key=len, reverse=True):
        for token in range(3):
            following = (*state, token)
            later = 0.0
            if following in index:
                row = index[following]
                later = DISCOUNT * (policy_SV[row] * values[row]).sum()
            values[index[state], token] = rewards_SV[index[state], token] + later
    return values


def _performance(policy_SV, rewards_SV):
    start = STATES.index(())
    return float((policy_SV[start] * _action_values(policy_SV, rewards_SV)[start]).sum())


def _rows(response, teacher_SV):
    states = LANGUAGE.state_rows(response)
    one_hot = torch.eye(len(STATES))[states]
    return make_token_rows(
        one_hot,
        response,
        [3],
        num_global_tokens=1,
        teacher=TeacherRows(
            features_NF=one_hot,
            expected_embedding_NE=teacher_SV[states],
            logprobs_N=torch.zeros(3),
        ),
    )


def _expected(author_SV, student_table_SV, teacher_SV, critic_SV, *, stream):
    """Mean over every response the author can write of what the objective computes."""
    weight = 1.0 if stream == "on_policy" else 0.0
    objective = Ammd(
        AmmdConfig(on_policy_weight=weight, discount=DISCOUNT, moment_target="sampled"),
        max_response_tokens=3,
    )
    objective.on_critic = objective.off_critic = FixedCritic(critic_SV)
    head = PolicyHeads(
        unembedding_VH=student_table_SV.T, action_embeddings_VE=torch.eye(3), chunk_tokens=8
    )
    total = 0.0
    for response in LANGUAGE.responses:
        rows = _rows(response, teacher_SV)
        off, on = (None, rows) if stream == "on_policy" else (rows, None)
        output = objective.compute_loss(head, off, on, lambda tensor: tensor)
        value = (
            -output.metric_shares["reward_to_go"] if stream == "on_policy" else output.loss_share
        )
        total += float(LANGUAGE.probability(response, author_SV)) * float(value)
    return total


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_both_moment_gaps_of_the_true_action_values_are_the_imitation_gap(seed):
    rewards = _table(10 + seed)
    student_table, teacher = _table(20 + seed), _table(30 + seed).softmax(-1)
    student = student_table.softmax(-1)
    gap = _performance(teacher, rewards) - _performance(student, rewards)
    on_policy = _expected(
        student, student_table, teacher, _action_values(teacher, rewards), stream="on_policy"
    )
    off_policy = _expected(
        teacher, student_table, teacher, _action_values(student, rewards), stream="off_policy"
    )
    assert abs(gap) > 1e-2
    assert on_policy == pytest.approx(gap, abs=1e-5)
    assert off_policy == pytest.approx(gap, abs=1e-5)

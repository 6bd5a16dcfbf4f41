"""Weights of text that an older student wrote, from what student and writer say of each token.

    rho_t = pi_theta(y_t | s_t) / mu(y_t | s_t)

| kind | what depends on s_t alone | what depends on y_t too | what depends on the whole response |
|---|---|---|---|
| token | min(cap, rho_t) | min(cap, rho_t) | min(cap, rho_t), line by line |
| state | min(cap, prod_{k<t} rho_k) | min(cap, prod_{k<=t} rho_k) | min(cap, prod of all rho_k) |

Up to the cap, `state` turns every mean over text of mu into the mean over text of pi_theta:
E_mu[prod_{k<t} rho_k l(s_t)] = E_pi[l(s_t)] (docs/objectives.md, "Text of an older student").

| docs/objectives.md | here |
|---|---|
| mu | behaviour_logprobs_N: who wrote the token, when it was written |
| v_t, u_t, u_last | states_N, tokens_N, responses_N of ImportanceWeights |

Axes: N response tokens, b successive ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from distill_system.objectives.rows import TokenRows

ImportanceKind = Literal["none", "token", "state"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportanceWeights:
    """What each token counts, float32 [N], without graph.

    states_N: where a term depends on the state before the token alone. tokens_N: where it depends
    on the token as well. responses_N: where it depends on the whole response.
    """

    states_N: Float32[Tensor, " N"]
    tokens_N: Float32[Tensor, " N"]
    responses_N: Float32[Tensor, " N"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """How tokens are weighed; kind none weighs nothing."""

    kind: ImportanceKind = "none"
    cap: float = math.inf

    def start(self, rows: TokenRows) -> RunningWeights | None:
        """Weights to be read as the log-probabilities come in; None where nothing is weighed."""
        if self.kind == "none" or rows.behaviour_logprobs_N is None:
            return None
        return RunningWeights(rows, rows.behaviour_logprobs_N, kind=self.kind, cap=self.cap)

    def read(
        self, rows: TokenRows, student_logprobs_N: Float[Tensor, " N"]
    ) -> ImportanceWeights | None:
        """All weights at once; None where nothing is weighed.

        student_logprobs_N: log pi_theta(y_t | s_t) at rows.behaviour_temperature, nats.
        """
        running = self.start(rows)
        if running is None:
            return None
        running.take(slice(0, student_logprobs_N.shape[0]), student_logprobs_N)
        return ImportanceWeights(
            states_N=running.states(), tokens_N=running.tokens(), responses_N=running.responses()
        )


UNWEIGHTED = Importance()
"""Every token counts as 1: the text is the current student's own, or taken to be."""


def compute_log_ratios(
    student_logprobs_b: Float[Tensor, " b"], behaviour_logprobs_b: Float[Tensor, " b"]
) -> Float64[Tensor, " b"]:
    """log rho_t: the learner's log-probability of each token minus its writer's, nats.

    Shapes: two float32 [b]; returns float64 [b], without graph. Float64, because products of ratios
    are sums of hundreds of these.
    """
    return student_logprobs_b.detach().double() - behaviour_logprobs_b.double()


class RunningWeights:
    """The weights of a stream, while its tokens are read in order, a few at a time.

    sums: float64 [N + 1], the log ratios of all tokens before each one. A product over a response
    is a difference of two of them, so that a border between two readings leaves no trace.
    """

    def __init__(
        self, rows: TokenRows, behaviour_N: Float[Tensor, " N"], *, kind: ImportanceKind, cap: float
    ) -> None:
        places_N = torch.arange(behaviour_N.shape[0], device=behaviour_N.device)
        self.rows, self.behaviour_N, self.log_cap = rows, behaviour_N, math.log(cap)
        self.reaches_back = kind == "state"
        self.sums = behaviour_N.new_zeros(behaviour_N.shape[0] + 1, dtype=torch.float64)
        self.first_N = places_N - rows.positions_N if self.reaches_back else places_N

    def take(self, rows: slice, student_logprobs_b: Float[Tensor, " b"]) -> None:
        """Take in log pi_theta(y_t | s_t) of the next tokens; rows says which they are."""
        log_ratios_b = compute_log_ratios(student_logprobs_b, self.behaviour_N[rows])
        # A running sum over the whole stream: a response's product is a difference of two entries,
        # whatever the borders between readings. Float64 keeps 1e-12 of it after 1e4 nats.
        last = self.sums[rows.start]
        self.sums[rows.start + 1 : rows.stop + 1] = last + log_ratios_b.cumsum(dim=0)

    def states(self, rows: slice = slice(None)) -> Float32[Tensor, " b"]:
        """Weights of what depends on the states of these rows alone, float32 [b]."""
        return self._cap(self.log_state_ratios(rows))

    def tokens(self, rows: slice = slice(None)) -> Float32[Tensor, " b"]:
        """Weights of what depends on the tokens of these rows, float32 [b]."""
        return self._cap(self.sums[1:][rows] - self.sums[self.first_N[rows]])

    def responses(self) -> Float32[Tensor, " N"]:
        """Weights of what depends on whole responses, float32 [N]."""
        if not self.reaches_back:
            return self.tokens()
        _, lengths_S = torch.unique_consecutive(self.rows.sequence_ids_N, return_counts=True)
        ends_N = lengths_S.cumsum(dim=0).repeat_interleave(lengths_S)
        return self._cap(self.sums[ends_N] - self.sums[self.first_N])

    def log_state_ratios(self, rows: slice = slice(None)) -> Float64[Tensor, " b"]:
        """Logarithms of the states' weights before they are capped, float64 [b], nats."""
        # state: all tokens before t, without t itself; token: t's own ratio, which is a choice (its
        # exact weight on a state would be 1)
        end = self.sums[:-1] if self.reaches_back else self.sums[1:]
        return end[rows] - self.sums[self.first_N[rows]]

    def _cap(self, log_ratios_b: Tensor) -> Tensor:
        # capped before exp: a ratio of e^100 would be infinite in float32
        return log_ratios_b.clamp_max(self.log_cap).exp().float()

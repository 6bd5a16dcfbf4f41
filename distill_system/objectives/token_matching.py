"""A loss between the two policies at each token, on either stream or on both.

Most of the field is of this form, with another loss and another stream: word-level distillation,
SeqKD, ImitKD, GKD, DistiLLM, f-distill. The files of token_losses/ say which is whose, those of
terms/ what may be added on hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from distill_system.config.objective import StreamName, TokenMatchingConfig
from distill_system.config.objective.token_matching import STREAMS
from distill_system.objectives.importance import UNWEIGHTED, Importance
from distill_system.objectives.rows import (
    ObjectiveOutput,
    PolicyHeads,
    SumOverRanks,
    TokenRows,
    stream_mean,
    stream_weights,
)
from distill_system.objectives.terms import Term, build_term
from distill_system.objectives.token_losses import bind_token_loss
from distill_system.objectives.vocabulary import ChunkWeights, VocabularySum


class TokenMatching:
    """(1 - beta) L_off + beta L_on; L is a mean over the stream's response tokens, plus its terms.

    step: updates made so far; with total_steps it tells a loss how far the run has come.
    """

    def __init__(
        self,
        config: TokenMatchingConfig,
        *,
        total_steps: int,
        importance: Importance = UNWEIGHTED,
    ) -> None:
        self.config = config
        self.total_steps = total_steps
        self.importance = importance
        self.step = 0
        self.terms: dict[StreamName, list[Term]] = {
            stream: [build_term(term) for term in config.terms]
            for stream in STREAMS
            if config.reads(stream)
        }

    def compute_loss(
        self,
        heads: PolicyHeads,
        off_policy: TokenRows | None,
        on_policy: TokenRows | None,
        sum_over_ranks: SumOverRanks,
    ) -> ObjectiveOutput:
        """(1 - beta) L_off + beta L_on; a stream alone counts 1."""
        streams = stream_weights(self.config, off_policy, on_policy)
        self.step += 1
        sums = {name: self._sum(heads, name, rows) for name, (rows, _) in streams.items()}
        terms = {
            name: self._terms(name, rows, sums[name].logprobs_N, sum_over_ranks)
            for name, (rows, _) in streams.items()
        }
        losses = [
            weight * torch.stack([sums[name].total, *terms[name].values()]).sum()
            for name, (_, weight) in streams.items()
        ]
        return ObjectiveOutput(
            loss_share=torch.stack(losses).sum(),
            metric_shares={
                **{f"{name}_loss": part.total.detach() for name, part in sums.items()},
                **_cross_entropy(off_policy, sums.get("off_policy")),
                **{key: part.detach() for parts in terms.values() for key, part in parts.items()},
            },
            student_logprobs_N=sums["on_policy"].logprobs_N if "on_policy" in sums else None,
        )

    def _sum(self, heads: PolicyHeads, name: StreamName, rows: TokenRows) -> VocabularySum:
        config = self.config.loss_on(name)
        assert config is not None, "the stream was chosen because it has a loss"
        means_N = torch.full(
            rows.token_ids_N.shape, 1.0 / rows.num_global_tokens, device=rows.token_ids_N.device
        )
        return heads.sum(
            rows,
            bind_token_loss(config.at(min(1.0, self.step / self.total_steps)), rows),
            means_N,
            chunk_weights=self._chunk_weights(rows, reads_token=config.reads_written_token),
            temperature=self.config.temperature,
            tokens_together=config.tokens_together,
        )

    def _chunk_weights(self, rows: TokenRows, *, reads_token: bool) -> ChunkWeights | None:
        """Importance weights, made while the chunk's log-probabilities are there."""
        running = self.importance.start(rows)
        if running is None:
            return None

        def read(chunk: slice, logprobs_c: Tensor) -> Tensor:
            running.take(chunk, logprobs_c)
            return running.tokens(chunk) if reads_token else running.states(chunk)

        return read

    def _terms(
        self, name: StreamName, rows: TokenRows, logprobs_N: Tensor, sum_over_ranks: SumOverRanks
    ) -> dict[str, Tensor]:
        """The weighted terms of a stream; two of one type are summed under one name."""
        weights = self.importance.read(rows, logprobs_N) if self.config.terms else None
        parts: dict[str, Tensor] = {}
        for config, term in zip(self.config.terms, self.terms[name], strict=True):
            part = config.weight * term.compute_loss(rows, sum_over_ranks, weights)
            key = f"{name}_{config.type}"
            parts[key] = parts[key] + part if key in parts else part
        return parts

    def state_dict(self) -> dict[str, Tensor]:
        """The step, and what the terms keep."""
        state = {"step": torch.tensor(float(self.step))}
        for prefix, term in self._named_terms():
            state |= {f"{prefix}{name}": value for name, value in term.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what state_dict gave."""
        self.step = int(state["step"])
        for prefix, term in self._named_terms():
            mine = {key: value for key, value in state.items() if key.startswith(prefix)}
            term.load_state_dict({key.removeprefix(prefix): value for key, value in mine.items()})

    def _named_terms(self) -> Iterator[tuple[str, Term]]:
        for stream, terms in self.terms.items():
            for index, term in enumerate(terms):
                yield f"{stream}_term{index}_", term


def _cross_entropy(rows: TokenRows | None, read: VocabularySum | None) -> dict[str, Tensor]:
    """How likely the student finds the off-policy text, whatever its loss there is."""
    if rows is None or read is None:
        return {}
    return {"cross_entropy": -stream_mean(read.logprobs_N, rows)}

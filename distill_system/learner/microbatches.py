"""A batch read and learned from in parts, with the activations of one part at a time.

The objective needs the rows of the whole batch at once (a critic's moment is a sum over all of
them). So all parts but the last are read without activations; the objective's gradient with respect
to their rows is kept, and each of them is read again, with activations, to carry it back. The
gradient is that of the whole batch read at once.

Axes: n response tokens of one part, N of all parts in order, H student hidden size.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from distill_system.language_model import Part, SequenceBatch, read_part
from distill_system.learner.sharding import Policy


class Microbatches:
    """One batch's parts: read() once, then at most one backward()."""

    def __init__(self, policy: Policy, batch: SequenceBatch) -> None:
        self.policy = policy
        self.batch = batch
        self._rows_nH: list[Tensor] = []

    def read(self) -> Float[Tensor, "N H"]:
        """The final hidden state before each response token, [N, H]; with graph where it learns."""
        *first, last = self.batch.parts
        learns = torch.is_grad_enabled()
        with torch.no_grad():
            self._rows_nH = [self._read(part) for part in first]
        for rows_nH in self._rows_nH:
            rows_nH.requires_grad_(learns)
        # order_N undoes the packing: rows come back in the order of the sequences
        return torch.cat([*self._rows_nH, self._read(last)])[self.batch.order_N]

    def backward(self, loss: Float[Tensor, ""]) -> None:
        """Add the gradient of a loss of those rows to the parameters'."""
        # All parts but the last, which has its activations still and goes first; the others follow
        # from the end, each giving up its rows' gradient as it is used.
        waiting = list(zip(self.batch.parts, self._rows_nH, strict=False))
        self.policy.expect_backward(last=not waiting)
        loss.backward()
        while waiting:
            part, read_nH = waiting.pop()
            self.policy.expect_backward(last=not waiting)
            assert read_nH.grad is not None, "the rows of every part stand in the loss"
            self._read(part).backward(read_nH.grad)

    def _read(self, part: Part) -> Tensor:
        return self.policy(partial(read_part, part=part))

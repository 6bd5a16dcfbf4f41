"""A scorer of several ranks: a teacher too large for one device, shared by FSDP2.

Each rank holds a part of every block at rest and gathers a block when it reads it. The ranks read
different sequences, in the same number of forward passes: gathering is collective. The first rank
is the scorer to everyone else; it deals the sequences and joins what the others say.

Axes: N response tokens, H teacher hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distill_system.config.model import LearnerConfig
from distill_system.config.objective import TeacherNeeds
from distill_system.language_model import SequenceBatch, build_empty_model, count_parts, read_part
from distill_system.learner import ModelSource
from distill_system.learner.ranks import Ranks
from distill_system.learner.rendezvous import find_rendezvous
from distill_system.learner.sharding import Policy, build_mesh, gather, shard_policy, shard_rows
from distill_system.learner.student import fill_from_folder
from distill_system.records import TeacherTargets, Trajectory, deal_by_cost
from distill_system.scoring.scorer import TeacherScorer
from distill_system.workers import Peers, Reference


class RankedScorer(TeacherScorer):
    """One of num_ranks ranks that share a teacher.

    timeout_seconds: for a call, in which every rank takes part.
    peers: the other ranks, on the first; None on these.
    """

    def __init__(
        self,
        *,
        num_ranks: int,
        timeout_seconds: float,
        peers: Peers | None = None,
        rank: int = 0,
        **scorer: Any,
    ) -> None:
        self._peers, self._timeout_seconds = peers, timeout_seconds
        self._source = ModelSource(path=scorer["model_path"])
        self.ranks = Ranks(
            rank=rank,
            world_size=num_ranks,
            device=torch.device("cuda" if scorer["uses_gpu"] else "cpu"),
            timeout_seconds=timeout_seconds,
            alone=False,
            group="a scorer's ranks",
        )
        if peers is not None:
            peers.start()
        super().__init__(**scorer)

    def ready(self) -> None:
        """Return once the ranks have met and each has loaded its part of the teacher.

        On the first rank; on another once it may be connected.
        """
        if self._peers is None:
            return
        others = self.ranks.world_size - 1
        # What failed in one of them is told before any waits for it.
        self._finish(self._peers.call("ready", [()] * others))
        address = find_rendezvous()
        connecting = self._peers.call("connect", [address] * others)
        self.connect(*address)
        self._finish(connecting)

    def connect(self, address: str, port: int) -> None:
        """Meet the other ranks at the first one's address, and share the teacher with them."""
        self.ranks.connect(address, port)
        count = self.ranks.world_size
        mesh = build_mesh(self.device, num_ranks=count, shard_ranks=count)
        self.policy = Policy(self.model, device=self.device, compute_dtype="float32")
        shard_policy(self.policy, mesh, LearnerConfig())  # computes in the teacher's own precision
        fill_from_folder(self.policy, self._source, seed=0, device=self.device)
        with torch.no_grad():
            actions_VE = self.policy(self._make_actions)
        self.policy.release()
        self.action_embeddings_VE = shard_rows(actions_VE, self.device, mesh)

    @torch.no_grad()
    def read_share(
        self, trajectories: Sequence[Trajectory], needs: TeacherNeeds, num_parts: int
    ) -> list[TeacherTargets]:
        """This rank's share of a call, in num_parts forward passes; all ranks call it at once."""
        try:
            return self._read_batch(self._collate(trajectories, num_parts), trajectories, needs)
        finally:
            self.policy.release()

    def _load(self, path: str, *, trust_remote_code: bool) -> None:
        """An empty one: each rank reads its own part of the weights once all have met."""
        self.model = build_empty_model(
            path, dtype=getattr(torch, self.config.dtype), trust_remote_code=trust_remote_code
        ).requires_grad_(False)

    def _score(
        self, trajectories: Sequence[Trajectory], needs: TeacherNeeds
    ) -> list[TeacherTargets]:
        """What the teacher says now, every rank of a share."""
        lengths = [int(trajectory.token_ids.size) for trajectory in trajectories]
        hands = deal_by_cost(lengths, self.ranks.world_size)
        shares = [[trajectories[at] for at in hand] for hand in hands]
        num_parts = max(self._count_parts([lengths[at] for at in hand]) for hand in hands)
        assert self._peers is not None, "the first rank is asked"
        reading = self._peers.call("read_share", [(each, needs, num_parts) for each in shares[1:]])
        said = [self.read_share(shares[0], needs, num_parts), *self._finish(reading)]
        by_place = {
            at: target
            for hand, targets in zip(hands, said, strict=True)
            for at, target in zip(hand, targets, strict=True)
        }
        return [by_place[at] for at in range(len(trajectories))]

    def _count_parts(self, lengths: Sequence[int]) -> int:
        return count_parts(lengths, self.config.max_tokens_per_batch)

    def _read_hidden(self, batch: SequenceBatch) -> Tensor:
        parts_nH = [self.policy(partial(read_part, part=part)) for part in batch.parts]
        return torch.cat(parts_nH)[batch.order_N]

    def _actions(self) -> Tensor:
        return gather(self.action_embeddings_VE)

    def _is_finite(self, hidden_NH: Tensor) -> bool:
        """Of all ranks: all refuse a call or none, or some would wait for those that have."""
        return not self.ranks.max(int(not super()._is_finite(hidden_NH)))

    def _finish(self, references: Sequence[Reference]) -> list[Any]:
        assert self._peers is not None, "they are the first rank's"
        what = "the other ranks of a scorer"
        return self._peers.finish(references, what=what, seconds=self._timeout_seconds)

"""What a learner rank holds of the teacher: frozen matrices, never with a gradient.

Axes: V vocabulary, E action-embedding size, F teacher hidden size.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distill_system.config.objective import ObjectiveConfig
from distill_system.language_model import load_embedding, load_logit_cap
from distill_system.learner.sharding import gather, shard_rows
from distill_system.learner.student import ModelSource
from distill_system.objectives import PolicyHeads, make_action_embeddings


class TeacherMatrices:
    """Action embeddings, and the teacher's unembedding where the objective needs it.

    At rest the ranks that share a student share these too, each holding some of the rows.
    """

    def __init__(
        self,
        source: ModelSource,
        objective: ObjectiveConfig | None,
        *,
        vocabulary_size: int,
        device: torch.device,
        mesh: DeviceMesh | None,
    ) -> None:
        self.action_embeddings_VE = shard_rows(_load_actions(source, vocabulary_size), device, mesh)
        self.unembedding_VF: Tensor | None = None
        self.logit_cap: float | None = None
        if objective is not None and objective.needs_teacher_distribution:
            self.unembedding_VF = shard_rows(_load_unembedding(source), device, mesh)
            self.logit_cap = load_logit_cap(
                str(source.teacher_path), trust_remote_code=source.trust_remote_code
            )

    def build_heads(
        self,
        unembedding_VH: Float[Tensor, "V H"],
        *,
        chunk_tokens: int,
        logit_cap: float | None = None,
    ) -> PolicyHeads:
        """Both policies' matrices, whole; every rank calls it. Drop it when the loss is made.

        logit_cap: the student's.
        """
        unembedding_VF = None if self.unembedding_VF is None else gather(self.unembedding_VF)
        return PolicyHeads(
            unembedding_VH=unembedding_VH,
            action_embeddings_VE=gather(self.action_embeddings_VE),
            teacher_unembedding_VF=unembedding_VF,
            chunk_tokens=chunk_tokens,
            logit_cap=logit_cap,
            teacher_logit_cap=self.logit_cap,
        )


def _load_actions(source: ModelSource, vocabulary_size: int) -> Tensor:
    """The teacher's, as its scorers have them; no columns where there is no teacher."""
    if source.teacher_path is None:
        return torch.zeros(vocabulary_size, 0)
    embeddings_VE = load_embedding(
        source.teacher_path,
        which="input",
        vocabulary_size=source.vocabulary_size,
        trust_remote_code=source.trust_remote_code,
    )
    return make_action_embeddings(embeddings_VE, source.action_dimension)


def _load_unembedding(source: ModelSource) -> Tensor:
    assert source.teacher_path is not None, "an objective of a teacher's distribution has a teacher"
    unembedding_VF = load_embedding(
        source.teacher_path,
        which="output",
        vocabulary_size=source.vocabulary_size,
        trust_remote_code=source.trust_remote_code,
    )
    # The scorers' own precision, so that the rebuilt logits are rounded as theirs were.
    return unembedding_VF.to(getattr(torch, source.teacher_dtype))

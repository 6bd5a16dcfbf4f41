"""A run's workers in the form that batch inference calls: a table in, a table out.

Plain classes; each is made in its worker process, from arguments that can be pickled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow

from distill_system.config.objective import TeacherNeeds
from distill_system.data.stored_rows import SampleOrigin, make_rows, read_trajectory
from distill_system.data.target_store import make_target_rows
from distill_system.records import Prompt, Stream, TrajectoryChunk
from distill_system.rollout import RolloutWorker, Sampling
from distill_system.scoring import TeacherScorer

PROMPT_SCHEMA = pyarrow.schema(
    [
        ("key", pyarrow.string()),
        ("label", pyarrow.string()),
        ("prompt_id", pyarrow.string()),
        ("token_ids", pyarrow.list_(pyarrow.int32())),
        ("prompt_text", pyarrow.string()),
    ]
)
"""One row for each sample to generate."""


class SampleWriter:
    """Rows of PROMPT_SCHEMA in, samples of ROW_SCHEMA out.

    arguments: of RolloutWorker, without `name`.
    """

    def __init__(self, *, arguments: Mapping[str, Any], origin: SampleOrigin) -> None:
        self._worker = RolloutWorker(name=f"offline {origin.author} rollout", **arguments)
        self._origin = origin
        self._sampling = Sampling(
            temperature=origin.temperature,
            top_p=origin.top_p,
            top_k=origin.top_k,
            min_p=origin.min_p,
            max_response_tokens=origin.max_response_tokens,
        )

    def __call__(self, prompts: pyarrow.Table) -> pyarrow.Table:
        """One sample for each row, in the table's order."""
        rows = groupby(prompts.to_pylist(), key=lambda row: row["label"])
        return pyarrow.concat_tables(self._write(label, list(group)) for label, group in rows)

    def _write(self, label: str, rows: Sequence[Mapping[str, Any]]) -> pyarrow.Table:
        prompts = [
            Prompt(
                prompt_id=row["prompt_id"],
                token_ids=np.array(row["token_ids"], np.int32),
                text=row["prompt_text"],
            )
            for row in rows
        ]
        written = self._worker.generate(prompts, self._sampling, self._origin.seed, label)
        texts = [prompt.text for prompt in prompts]
        return make_rows(written, self._origin, label=label, prompt_texts=texts)


class TargetWriter:
    """Samples in (their keys and the columns of a trajectory), the teacher's targets out.

    arguments: of TeacherScorer.  reading: see TargetStore.
    """

    def __init__(self, *, arguments: Mapping[str, Any], needs: TeacherNeeds, reading: str) -> None:
        self._arguments = arguments
        self._needs = needs
        self._reading = reading

    @cached_property
    def _scorer(self) -> TeacherScorer:
        # Made at the first call: Ray Data loses the type of an error that a constructor raises.
        return TeacherScorer(**self._arguments)

    def __call__(self, samples: pyarrow.Table) -> pyarrow.Table:
        """One row of targets for each sample."""
        batch = samples.combine_chunks().to_batches()[0]
        trajectories = tuple(read_trajectory(batch, row) for row in range(batch.num_rows))
        chunk = TrajectoryChunk(stream=Stream.OFF_POLICY, trajectories=trajectories)
        targets = self._scorer.score(chunk, self._needs)
        return make_target_rows(samples["key"].to_pylist(), targets, self._reading)

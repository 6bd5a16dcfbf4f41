"""How a sample stands in the store: one row of plain columns, with who wrote it and how.

In: trajectories and their origin.  Out: an Arrow table of ROW_SCHEMA; and back, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow

from distill_system.data.fingerprints import digest, fingerprint_prompt
from distill_system.errors import RecordError
from distill_system.records import Author, Finish, Int32Array, Trajectory, VersionSpan

_SPAN = pyarrow.struct(
    [("version", pyarrow.int64()), ("start", pyarrow.int32()), ("end", pyarrow.int32())]
)
TRAJECTORY_SCHEMA = pyarrow.schema(
    [
        ("trajectory_id", pyarrow.string()),
        ("prompt_id", pyarrow.string()),
        ("author", pyarrow.string()),
        ("token_ids", pyarrow.list_(pyarrow.int32())),
        ("num_prompt_tokens", pyarrow.int32()),
        ("behaviour_logprobs", pyarrow.list_(pyarrow.float32())),
        ("temperature", pyarrow.float64()),
        ("finish", pyarrow.string()),
        ("weight_versions", pyarrow.list_(_SPAN)),
    ]
)
"""The columns that make a Trajectory."""
ORIGIN_SCHEMA = pyarrow.schema(
    [
        ("model", pyarrow.string()),
        ("model_fingerprint", pyarrow.string()),
        ("tokenizer_fingerprint", pyarrow.string()),
        ("top_p", pyarrow.float64()),
        ("max_response_tokens", pyarrow.int32()),
        ("stop_token_ids", pyarrow.list_(pyarrow.int32())),
        ("seed", pyarrow.int64()),
    ]
)
"""The columns that say who wrote it and how, beside author and temperature."""
ROW_SCHEMA = pyarrow.schema(
    [
        pyarrow.field("key", pyarrow.string()),
        pyarrow.field("prompt_key", pyarrow.string()),
        pyarrow.field("policy_key", pyarrow.string()),
        *TRAJECTORY_SCHEMA,
        *ORIGIN_SCHEMA,
        pyarrow.field("label", pyarrow.string()),
        pyarrow.field("prompt_text", pyarrow.string()),
        pyarrow.field("response_text", pyarrow.string()),
    ]
)
"""All columns. key: of the sample, unique in a store; prompt_key: of the prompt's tokens;
policy_key: of the model and the sampling, see SampleOrigin.policy_key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOrigin:
    """Who wrote samples, and how.

    model: path or hub name, for people; model_fingerprint says which weights it held.
    """

    author: Author
    model: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    temperature: float
    top_p: float
    max_response_tokens: int
    stop_token_ids: tuple[int, ...]
    seed: int

    @property
    def policy_key(self) -> str:
        """Equal for samples of one distribution; they may differ in seed and where they are cut."""
        who = [self.author, self.model_fingerprint, self.tokenizer_fingerprint]
        sampling = [self.temperature, self.top_p, self.stop_token_ids]
        return digest(json.dumps([*who, *sampling]).encode())

    def key(self, prompt_ids: Int32Array, label: str) -> str:
        """What one sample of one prompt is known by.  prompt_ids: int32 [P]."""
        parts = [self.policy_key, self.max_response_tokens, self.seed, label]
        return digest(json.dumps([fingerprint_prompt(prompt_ids), *parts]).encode())


def make_rows(
    trajectories: Sequence[Trajectory],
    origin: SampleOrigin,
    *,
    label: str,
    prompt_texts: Sequence[str] | None = None,
    response_texts: Sequence[str] | None = None,
) -> pyarrow.Table:
    """Samples of one origin and label as a table of ROW_SCHEMA.

    Raises: RecordError if a trajectory says that it came of another origin.
    """
    nothing = [None] * len(trajectories)
    columns = {
        "key": [origin.key(_prompt_ids(t), label) for t in trajectories],
        "prompt_key": [fingerprint_prompt(_prompt_ids(t)) for t in trajectories],
        "policy_key": [origin.policy_key] * len(trajectories),
        **{name: [_plain(t, name) for t in trajectories] for name in TRAJECTORY_SCHEMA.names},
        **{name: [getattr(origin, name)] * len(trajectories) for name in ORIGIN_SCHEMA.names},
        "label": [label] * len(trajectories),
        "prompt_text": prompt_texts or nothing,
        "response_text": response_texts or nothing,
    }
    for trajectory in trajectories:
        actual = (trajectory.author, trajectory.temperature)
        if actual != (origin.author, origin.temperature):
            raise RecordError(
                f"record {trajectory.trajectory_id!r}: expected author and temperature of its "
                f"origin, {(origin.author, origin.temperature)}, got {actual}"
            )
    return pyarrow.table(columns, schema=ROW_SCHEMA)


def read_trajectory(batch: pyarrow.RecordBatch, row: int) -> Trajectory:
    """One row of a batch that has the columns of TRAJECTORY_SCHEMA.

    Its arrays are views of the batch, which are read-only.
    """
    plain = {name: batch.column(name)[row] for name in TRAJECTORY_SCHEMA.names}
    return Trajectory(
        trajectory_id=plain["trajectory_id"].as_py(),
        prompt_id=plain["prompt_id"].as_py(),
        author=Author(plain["author"].as_py()),
        token_ids=plain["token_ids"].values.to_numpy(),
        num_prompt_tokens=plain["num_prompt_tokens"].as_py(),
        behaviour_logprobs=plain["behaviour_logprobs"].values.to_numpy(),
        temperature=plain["temperature"].as_py(),
        finish=Finish(plain["finish"].as_py()),
        weight_versions=tuple(VersionSpan(**span) for span in plain["weight_versions"].as_py()),
    )


def _plain(trajectory: Trajectory, name: str) -> object:
    value = getattr(trajectory, name)
    if name == "weight_versions":
        return [{"version": s.version, "start": s.start, "end": s.end} for s in value]
    return value


def _prompt_ids(trajectory: Trajectory) -> Int32Array:
    return trajectory.token_ids[: trajectory.num_prompt_tokens]

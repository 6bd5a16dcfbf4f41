"""The columns of a stored sample: the trajectory, the model that generated it, and how.

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
"""The columns of a SampleOrigin that a Trajectory does not have."""
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
"""All columns. key: the sample's, unique in a store; prompt_key: fingerprint of the prompt tokens;
policy_key: fingerprint of model and sampling settings, see SampleOrigin.policy_key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOrigin:
    """The model that generated samples, and its sampling settings.

    model: path or hub name, for people; model_fingerprint identifies the weights.
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
    top_k: int | None = None
    min_p: float = 0.0

    @property
    def policy_key(self) -> str:
        """Equal for samples of one distribution; seed and maximum length do not count."""
        model = [self.author, self.model_fingerprint, self.tokenizer_fingerprint]
        sampling: list[object] = [self.temperature, self.top_p, self.stop_token_ids]
        if self.top_k is not None or self.min_p > 0.0:  # or stores from before there was either
            sampling += [self.top_k, self.min_p]
        return digest(json.dumps([*model, *sampling]).encode())

    def key(self, prompt_ids: Int32Array, label: str) -> str:
        """The key of one sample.  prompt_ids: int32 [P].  label: which of the prompt's samples."""
        parts = [self.policy_key, self.max_response_tokens, self.seed, label]
        return digest(json.dumps([fingerprint_prompt(prompt_ids), *parts]).encode())


def make_rows(
    trajectories: Sequence[Trajectory],
    origin: SampleOrigin,
    *,
    label: str,
    prompt_texts: Sequence[str] | None = None,
) -> pyarrow.Table:
    """Samples of one origin and label as a table of ROW_SCHEMA; response_text is null.

    Raises: RecordError if a trajectory's author or temperature is not the origin's.
    """
    nulls = [None] * len(trajectories)
    columns = {
        "key": [origin.key(_prompt_ids(t), label) for t in trajectories],
        "prompt_key": [fingerprint_prompt(_prompt_ids(t)) for t in trajectories],
        "policy_key": [origin.policy_key] * len(trajectories),
        **trajectory_columns(trajectories),
        **{name: [getattr(origin, name)] * len(trajectories) for name in ORIGIN_SCHEMA.names},
        "label": [label] * len(trajectories),
        "prompt_text": prompt_texts or nulls,
        "response_text": nulls,
    }
    for trajectory in trajectories:
        actual = (trajectory.author, trajectory.temperature)
        if actual != (origin.author, origin.temperature):
            raise RecordError(
                f"record {trajectory.trajectory_id!r}: expected author and temperature of its "
                f"origin, {(origin.author, origin.temperature)}, got {actual}"
            )
    return pyarrow.table(columns, schema=ROW_SCHEMA)


def trajectory_columns(trajectories: Sequence[Trajectory]) -> dict[str, list[object]]:
    """The values of each column of TRAJECTORY_SCHEMA."""
    return {name: [_to_column(t, name) for t in trajectories] for name in TRAJECTORY_SCHEMA.names}


def read_trajectory(batch: pyarrow.RecordBatch, row: int) -> Trajectory:
    """The trajectory in one row of a batch that has the columns of TRAJECTORY_SCHEMA.

    Its arrays are read-only views of the batch.
    """
    scalars = {name: batch.column(name)[row] for name in TRAJECTORY_SCHEMA.names}
    # `values` of a list scalar is an Arrow array, which numpy views without a copy; as_py() would
    # make a Python object of every token.
    arrays = {n: scalars.pop(n).values.to_numpy() for n in ("token_ids", "behaviour_logprobs")}
    fields = {name: scalar.as_py() for name, scalar in scalars.items()}
    fields["author"] = Author(fields["author"])
    fields["finish"] = Finish(fields["finish"])
    fields["weight_versions"] = tuple(VersionSpan(**span) for span in fields["weight_versions"])
    return Trajectory(**arrays, **fields)


def _to_column(trajectory: Trajectory, name: str) -> object:
    value = getattr(trajectory, name)
    if name == "weight_versions":
        return [{"version": s.version, "start": s.start, "end": s.end} for s in value]
    return value


def _prompt_ids(trajectory: Trajectory) -> Int32Array:
    return trajectory.token_ids[: trajectory.num_prompt_tokens]

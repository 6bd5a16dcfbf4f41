"""When engines and learner do not say the same of the same tokens: the alarm."""

from __future__ import annotations

from distill_system.errors import TransferError

USUAL_LIMIT = 0.1
"""Mean nats; float32 engines and learners stay below 1e-5."""
USUAL_LIMIT_OF_LOWER_PRECISION = 0.5

_LOOK_AT = (
    "look at the last versions that the workers received, at the "
    "precisions of rollout.student_engine.dtype and learner.compute_dtype, and whether engine and "
    "learner read the model alike (export it and compare by hand)"
)


def check_logprob_gap(
    gap: float, largest: float, *, limit: float | None, lower_precision: bool
) -> str | None:
    """What to tell of the mean and the largest gap between sampler and learner, in nats.

    limit: rollout.max_logprob_gap.  lower_precision: engine or learner compute below float32.

    Returns: a note where no limit is set and the mean is above the usual; None if all is well.
    Raises: TransferError if the mean is above the limit that is set.
    """
    usual = USUAL_LIMIT_OF_LOWER_PRECISION if lower_precision else USUAL_LIMIT
    allowed = usual if limit is None else limit
    if gap <= allowed:  # false for NaN
        return None
    said = (
        f"rollout engines and learner disagree about the same tokens under the same weights: mean "
        f"{gap:.3g} nats, largest {largest:.3g}, "
    )
    if limit is None:
        return f"{said}usually below {allowed}: {_LOOK_AT}, and set rollout.max_logprob_gap"
    raise TransferError(f"{said}rollout.max_logprob_gap allows {limit}: {_LOOK_AT}")

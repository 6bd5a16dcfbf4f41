"""The alarm for rollout engines and learner that disagree about the same tokens and weights."""

from __future__ import annotations

from distill_system.errors import TransferError

USUAL_LIMIT = 0.1
"""Mean gap in nats above which a float32 run is warned; float32 usually stays below 1e-5."""
USUAL_LIMIT_OF_LOWER_PRECISION = 0.5
"""The same where engine or learner computes below float32."""

_REMEDY = (
    "look at the last versions that the workers received, at the "
    "precisions of rollout.student_engine.dtype and learner.compute_dtype, and whether engine and "
    "learner read the model alike (export it and compare by hand)"
)


def check_logprob_gap(
    gap: float, largest: float, *, limit: float | None, lower_precision: bool
) -> str | None:
    """Judge the gap between the log-probabilities of sampler and learner.

    gap, largest: mean and largest absolute difference over the tokens, nats.
    limit: rollout.max_logprob_gap.  lower_precision: engine or learner computes below float32.

    Returns: a warning if no limit is set and the mean is above the usual one; None if all is well.
    Raises: TransferError if the mean is above the limit.
    """
    usual = USUAL_LIMIT_OF_LOWER_PRECISION if lower_precision else USUAL_LIMIT
    allowed = usual if limit is None else limit
    if gap <= allowed:  # not `gap > allowed` with the branches swapped: a NaN gap must fail
        return None
    found = (
        f"rollout engines and learner disagree about the same tokens under the same weights: mean "
        f"{gap:.3g} nats, largest {largest:.3g}, "
    )
    if limit is None:
        return f"{found}usually below {allowed}: {_REMEDY}, and set rollout.max_logprob_gap"
    raise TransferError(f"{found}rollout.max_logprob_gap allows {limit}: {_REMEDY}")

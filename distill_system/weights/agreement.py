"""The alarm for rollout engines and learner that disagree about the same tokens and weights."""

from __future__ import annotations

from distill_system.errors import TransferError

USUAL_LIMIT = 0.1
"""Mean gap in nats above which a float32 run is warned; float32 usually stays below 1e-5."""
USUAL_LIMIT_OF_LOWER_PRECISION = 0.5
"""The same where engine or learner computes below float32."""
RISE = 3.0
"""A gap of lower precision that is so many times the run's first has another cause than precision:
what that costs depends on the model, and hardly changes while one is trained."""
NOTICEABLE = 0.05
"""Nats. A gap that has risen to less than this is too small to matter."""
LOUDER = 2.0
"""What was told of is told of again once it is so many times as large."""

_REMEDY = (
    "look at the last versions that the workers received, at the "
    "precisions of rollout.student_engine.dtype and learner.compute_dtype, and whether engine and "
    "learner read the model alike (export it and compare by hand)"
)


class GapAlarm:
    """Judges the gaps of one kind over a run: those of held-out text, or those of its steps.

    text: which text is compared, for messages.
    limit: rollout.max_logprob_gap; above it the run ends.
    lower_precision: engine or learner computes below float32.
    cause: what the run's precisions are known to do, for messages; see explain_gap.
    """

    def __init__(
        self, text: str, *, limit: float | None, lower_precision: bool, cause: str
    ) -> None:
        self._text = text
        self._limit = limit
        self._usual = USUAL_LIMIT_OF_LOWER_PRECISION if lower_precision else USUAL_LIMIT
        self._lower_precision = lower_precision
        self._cause = cause
        self._first: float | None = None
        self._told = 0.0

    def judge(self, gap: float, largest: float | None = None) -> str | None:
        """Judge the gap between the log-probabilities of sampler and learner.

        gap, largest: mean and largest absolute difference over the tokens, nats.

        Returns: a warning if no limit is set and the mean is above the usual one or, where
            precision is low, has risen to several times the run's first; None if all is well, or
            this was said before.
        Raises: TransferError if the mean is above the limit.
        """
        if self._first is None:
            self._first = gap
        allowed, why = self._allowed(self._first)
        if gap <= allowed:  # not `gap > allowed` with the branches swapped: a NaN gap must fail
            return None
        most = "" if largest is None else f", largest {largest:.3g}"
        found = (
            "rollout engines and learner disagree about the same tokens under the same weights: "
            f"mean {gap:.3g} nats{most} ({self._text}), {why}: {self._cause}{_REMEDY}"
        )
        if self._limit is not None:
            raise TransferError(found)
        if gap < LOUDER * self._told:
            return None
        self._told = gap
        return f"{found}, and set rollout.max_logprob_gap"

    def _allowed(self, first: float) -> tuple[float, str]:
        """The largest gap that is no cause for alarm, and what it is, for messages."""
        if self._limit is not None:
            return self._limit, f"rollout.max_logprob_gap allows {self._limit}"
        risen = max(RISE * first, NOTICEABLE)
        if self._lower_precision and risen < self._usual:
            return risen, f"{first:.3g} when it was first measured"
        return self._usual, f"usually below {self._usual}"


def explain_gap(*, engine: str, rounding: str, learner: str) -> str:
    """What is known to make these precisions disagree, as the beginning of advice; may be empty.

    engine: rollout.student_engine.dtype.  rounding: of the weights that it gets.
    learner: learner.compute_dtype.
    """
    if (engine == "bfloat16" and rounding == "nearest" and learner == "float32") or (
        engine == "float16" and learner == "float32"
    ):
        return (
            f"weights rounded to the nearest {engine} number do not follow small updates, so that "
            "engines write as an older student (docs/scaling.md); set "
            "rollout.student_engine.dtype=bfloat16 and rollout.weight_rounding=stochastic, or "
            "rollout.student_engine.dtype=float32. If that does not help, "
        )
    if learner == "bfloat16" and engine == "float32":
        return (
            "a learner that computes in bfloat16 rounds its weights to the nearest and does not "
            "see small updates, a float32 engine does; set learner.compute_dtype=float32 or "
            "rollout.student_engine.dtype=bfloat16. If that does not help, "
        )
    return ""

"""How a metric is called in Prometheus: its name in docs/metrics.md in, a series with labels out.

What a name of metrics.jsonl says in its last part (a pool, a phase, a split) is a label there, so
that one query reads all of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PREFIX = "ray_"
"""Ray puts this before the name of every gauge that its endpoint shows."""


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a metrics endpoint, without its value.

    name: without PREFIX.  labels: (name, value) pairs in the order of their names.
    """

    name: str
    labels: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, name: str, **labels: str) -> Series:
        """The series of this name and these labels."""
        return cls(name, tuple(sorted(labels.items())))

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the labels; every series of one name has the same."""
        return tuple(name for name, _ in self.labels)


_POOL = r"(?P<pool>\w+)"
_AUTHOR = r"(?P<author>student|teacher)"

_LABELLED: tuple[tuple[str, str], ...] = (
    (r"tokens_per_second/step", "step_tokens_per_second"),
    (rf"tokens_per_second/{_POOL}", "pool_tokens_per_second"),
    (rf"workers/{_POOL}", "pool_workers"),
    (rf"busy_share/{_POOL}", "pool_busy_share"),
    (rf"starved_share/{_POOL}", "pool_starved_share"),
    (rf"blocked_share/{_POOL}", "pool_blocked_share"),
    (rf"queued/{_POOL}", "pool_queued"),
    (rf"speedup/{_POOL}", "pool_speedup"),
    (r"seconds/step", "step_seconds"),
    (r"seconds/(?P<phase>\w+)", "phase_seconds"),
    (r"bytes_per_teacher_token/(?P<field>\w+)", "bytes_per_teacher_token"),
    (r"sampled_tokens/(?P<author>\w+)", "sampled_tokens"),
    (rf"{_AUTHOR}_text/entropy", "text_entropy"),
    (rf"{_AUTHOR}_text/distinct_trigrams", "text_distinct_trigrams"),
    (rf"{_AUTHOR}_text/mean_tokens", "text_mean_tokens"),
    (rf"{_AUTHOR}_text/ended_share", "text_ended_share"),
    (r"collapse/(?P<signal>\w+)", "collapse"),
    (r"staleness/share_(?P<age>\d+|older)", "staleness_share"),
    (r"start_check/(?P<role>[a-z]+)_logprob_gap", "start_check_logprob_gap"),
    (r"start_check/(?P<role>[a-z]+)_max_logprob_gap", "start_check_max_logprob_gap"),
    (
        r"evaluation/(?P<split>[^/]+)/(?P<score>\w+)_(?P<decoding>greedy|sampled)",
        "evaluation_score",
    ),
    (rf"faults/{_POOL}", "pool_faults"),
    (r"source_weight/(?P<source>[\w-]+)", "source_weight"),
    (r"source_perplexity_ratio/(?P<source>[\w-]+)", "source_perplexity_ratio"),
)
"""Patterns of metric names, the first that fits; the groups become labels."""


def to_series(metric: str) -> Series:
    """busy_share/learner -> distill_pool_busy_share{pool="learner"}.

    A name without such a part keeps it whole: learner/loss -> distill_learner_loss.
    """
    for pattern, name in _LABELLED:
        found = re.fullmatch(pattern, metric)
        if found is not None:
            return Series.of(f"distill_{name}", **found.groupdict())
    # Prometheus allows letters, digits and underscores.
    return Series.of("distill_" + re.sub(r"[^A-Za-z0-9]", "_", metric))

"""How much of the labels a self-distillation keeps: in closed form, from two students.

One student was fitted to the labels alone (A), one to the teacher alone (B). On held-out rows both
say how likely each token of the reference is; the weight that mixes A and B best is the weight of
the labels in the next student's target. No grid of runs is needed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from distill_system.cluster import ClusterSession
from distill_system.config import RunConfig
from distill_system.config.objective.token_losses import InterpolatedCrossEntropyConfig
from distill_system.data import build_tokenizer
from distill_system.observe import LiveView
from distill_system.run.model_data import load_model_data
from distill_system.run.pools import open_reading_pool

Vector = npt.NDArray[np.float64]


def best_label_weight(targets_N: Vector, labels_fit_N: Vector, teacher_fit_N: Vector) -> float:
    """The a in [0, 1] for which a A + (1 - a) B is nearest to the targets in squared error.

    a* = <y - B, A - B> / |A - B|^2, clipped; 1 where A and B are the same.
    Shapes: all float64 [N].  Source: Borup and Andersen, arXiv 2102.13088, re-derived.
    """
    difference_N = labels_fit_N - teacher_fit_N
    square = float(difference_N @ difference_N)
    if square == 0.0:
        return 1.0
    return float(np.clip((targets_N - teacher_fit_N) @ difference_N / square, 0.0, 1.0))


def measure_label_weight(
    config: RunConfig, labels: str, teacher: str, *, notify: Callable[[str], None]
) -> float:
    """a* of two models, by the probability of each reference token of data.held_out.

    labels, teacher: folders of the students fitted to labels alone and to the teacher alone.
    Raises: DistillError, as for a row without an answer; every worker is ended first.
    """
    # The rows are read with their answers, as rows to learn from are.
    data = config.data
    held_out = {"student_sft": data.held_out, "held_out": next(iter(data.evaluation.values()))}
    asking = config.model_copy(update={"data": data.model_copy(update=held_out)})
    tokenizer = build_tokenizer(config, None)
    rows = load_model_data(asking, tokenizer, ["student_sft"]).student_sft
    fits: list[Vector] = []
    with (
        LiveView(config.name) as view,
        ClusterSession(config, notify=view.note) as cluster,
    ):
        for path in (labels, teacher):
            pool = open_reading_pool(config, cluster, tokenizer, path=path)
            logprobs = pool.read_logprobs(list(rows))
            fits.append(np.exp(np.concatenate(logprobs).astype(np.float64)))
            cluster.stop_all()
    weight = best_label_weight(np.ones_like(fits[0]), *fits)
    notify(f"weight of the labels, from {fits[0].size} tokens of data.held_out: {weight:.4f}")
    return weight


def with_label_weight(config: RunConfig, weight: float) -> RunConfig:
    """The run whose interpolated cross-entropy gives this weight to the token written."""
    objective = config.distill.objective
    changes: dict[str, object] = {}
    for stream in ("off_policy", "on_policy"):
        loss = getattr(objective, stream, None)
        if isinstance(loss, InterpolatedCrossEntropyConfig):
            changes[stream] = loss.model_copy(update={"teacher_weight": 1.0 - weight})
    distill = config.distill.model_copy(update={"objective": objective.model_copy(update=changes)})
    return config.model_copy(update={"distill": distill})

"""Pools that hold a model as it is while it is evaluated: what they lose is replaced, as in a run.

There are no streams, and nobody learns: every call is made again elsewhere (cluster.supervised),
and a worker that has joined needs the weights that were published before, if any were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distill_system.cluster import ClusterSession, ElasticPool
from distill_system.config import RunConfig
from distill_system.config.evaluation import MetricName
from distill_system.driver.learner_restarts import LearnerRestarts
from distill_system.driver.measuring import Measuring, score_splits
from distill_system.elastic import ElasticPools
from distill_system.errors import DeadlineError, NonFiniteError, WorkerLostError
from distill_system.evaluation import SplitEvaluation
from distill_system.observe import FaultLog
from distill_system.records import Prompt, Trajectory
from distill_system.rollout import RolloutPool
from distill_system.run.context import RunContext
from distill_system.run.pools import open_evaluation_pool, open_pools, restart_learner
from distill_system.run.transfer_group import TransferGroup


def measure_standing(
    context: RunContext,
    make: Callable[[Measuring], None],
    *,
    student_path: str,
    step: int,
    metrics: Sequence[MetricName],
    teacher_text: Sequence[Trajectory] = (),
) -> None:
    """Open all pools of a run around a student that nobody trains, and make evaluations of it.

    make: called again, with another, where a rank of the learner was lost meanwhile.
    step: steps of distillation that made the student.
    teacher_text: what the teacher's engines have written of the held-out prompts, where they ended.
    """
    pools = open_pools(context, student_path=student_path)

    def start_anew() -> None:
        restart_learner(context, pools.ranks, pools.learner)
        pools.weights.break_up()

    lost_from = [*pools.placed, pools.ranks.name]
    with FaultLog(context.run, "evaluate", lost_from, writes=context.writes) as faults:
        restarts = LearnerRestarts(context, pools.ranks.name, faults, start_anew)
        supervision = supervise_standing(
            context.config,
            context.cluster,
            pools.placed,
            weights=pools.weights,
            fault_log=faults,
            notify=context.view.note,
        )
        pools.supervise(supervision)
        with supervision:
            while True:
                restarts.goes_on_after(step)
                try:
                    pools.weights.publish(step)
                    measuring = Measuring(
                        context, pools, context.data, metrics=metrics, teacher_text=teacher_text
                    )
                    return make(measuring)
                except (WorkerLostError, DeadlineError, NonFiniteError) as error:
                    restarts.lose(error)
                pools.forget_calls()
                restarts.restart()


def score_model(
    config: RunConfig,
    cluster: ClusterSession,
    tokenizer: Any,
    *,
    path: str,
    splits: Mapping[str, Sequence[Prompt]],
    notify: Callable[[str], None],
) -> dict[str, SplitEvaluation]:
    """Let the model in `path` answer every split's prompts, by workers of its own; score them."""
    workers, placed = open_evaluation_pool(config, cluster, tokenizer, path=path)
    pool, metrics = RolloutPool(workers), config.evaluation.metrics
    with supervise_standing(config, cluster, placed, notify=notify) as workers.supervision:
        return score_splits(pool, splits, config, tokenizer, metrics=metrics)


def supervise_standing(
    config: RunConfig,
    cluster: ClusterSession,
    placed: Mapping[str, ElasticPool],
    *,
    weights: TransferGroup | None = None,
    fault_log: FaultLog | None = None,
    notify: Callable[[str], None],
) -> ElasticPools:
    """Who replaces lost workers of these pools, for the length of a `with` block.

    weights: by which engines hold what is evaluated; None where each has loaded it from its files.
    fault_log: None where there is no run whose faults are kept.
    """
    none = _Nobody()
    cluster.monitor.supervise(placed)
    return ElasticPools(
        placed,
        cluster,
        config.scaling,
        None,
        crew=_StandingCrew(weights),
        weights=none if weights is None else weights,
        faults=config.faults,
        fault_log=none if fault_log is None else fault_log,
        notify=notify,
    )


class _StandingCrew:
    """Implements elastic.Crew where work is only ever waited for."""

    def __init__(self, weights: TransferGroup | None) -> None:
        self._weights = weights

    def release_worker(self, pool: str, worker: int) -> bool:
        """See Crew."""
        return True

    def forget_worker(self, pool: str, worker: int) -> None:
        """See Crew; its calls are made again where they are waited for."""

    def admit_workers(self) -> None:
        """See Crew."""

    def bring_weights(self) -> None:
        """See Crew."""
        if self._weights is not None:
            self._weights.publish(self._weights.version)


class _Nobody:
    """Implements elastic.Weights where none travel, and elastic.FaultRecord where none is kept."""

    pools: Sequence[str] = ()

    def break_up(self) -> None:
        """See Weights."""

    def lose(self, worker: str, cause: str) -> None:
        """See FaultRecord."""

    def replace(self, worker: str, successor: str, seconds: float) -> None:
        """See FaultRecord."""

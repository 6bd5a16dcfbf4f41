"""What a distillation writes down as it goes: metrics, timings, checkpoints, the final student."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import NoReturn

from distill_system.config import RunConfig
from distill_system.config.distill import DistillConfig
from distill_system.driver.collapse import CollapseWatch
from distill_system.driver.early_stopping import EarlyStopping
from distill_system.elastic.scaling import ScalingObservation
from distill_system.errors import CollapseError, ConfigError, RunStateError
from distill_system.observe import (
    FaultLog,
    RecentActivity,
    activity_metrics,
    find_bottleneck,
    join_stretches,
    shares_cores,
    wire_metrics,
)
from distill_system.records import PoolActivity, StepResult
from distill_system.run.checkpoints import CheckpointStore, resume_point
from distill_system.run.context import RunContext
from distill_system.run.export import export_model
from distill_system.run.pools import Pools
from distill_system.streams.streams import Streams

STAGE = "distill"

SHOWN = {
    "tokens_per_second/step": "tok/s",
    "held_out/cross_entropy": "cross-entropy",
    "held_out/on_policy_distance": "on-policy distance",
    "held_out/off_policy_distance": "off-policy distance",
}
"""Metrics of the live view and their names there; a distance stays until it is measured again."""


MEASURED = ("held_out/", "evaluation/")
"""Metrics that a checkpoint can be best by begin so."""

TIMINGS_SECONDS = 2.0
"""Between two saves of the run's clock."""


class RunRecorder:
    """Writes metrics, timings, checkpoints and the final student, so that the driver need not."""

    def __init__(
        self, context: RunContext, pools: Pools, streams: Streams, fault_log: FaultLog
    ) -> None:
        self.context = context
        self.pools = pools
        self.streams = streams
        self.fault_log = fault_log
        config = context.config.distill
        folder = context.run.checkpoints_directory / STAGE
        self.store = CheckpointStore(
            folder, keep=config.keep_checkpoints, best=config.keep_best, writes=context.writes
        )
        self._shares_cores = _shares_cores(context.config)
        self.stopping = EarlyStopping(config.early_stopping)
        self.collapse = CollapseWatch(config.collapse)
        self._last: dict[str, float | None] = {}
        self._shown: dict[str, float] = {}
        self._recent = RecentActivity()
        self._since_observed: dict[str, PoolActivity] = {}
        self._waited: dict[str, float] = {}
        self._timings_saved = 0.0

    def open(self) -> int:
        """Take back the newest checkpoint, if the run is resumed; returns the steps done."""
        steps = self.context.config.distill.steps
        checkpoint = resume_point(self.store, resume=self.context.resume, stage=STAGE, steps=steps)
        done = -1 if checkpoint is None else checkpoint.step
        self.context.log.truncate_after(STAGE, done)
        self.context.prompts.truncate_after(STAGE, done)
        if checkpoint is not None:
            self.store.load(checkpoint, self.pools.learner)
            self.streams.restore(checkpoint.state["streams"])
            self._last = dict(checkpoint.metrics)
            self.stopping.restore(checkpoint.state.get("early_stopping", {}))
            self.collapse.restore(checkpoint.state.get("collapse", {}))
            self.context.view.note(f"resuming {STAGE} after step {done}")
        elif not self.context.resume:
            self.context.timings.restart(STAGE)
        self.context.timings.save()
        done = max(done, 0)
        self.task = self.context.view.start(
            STAGE,
            self.context.config.distill.steps,
            first_step=done,
            earlier_seconds=self.context.timings.seconds.get(STAGE, 0.0),
        )
        return done

    def write(self, done: int, metrics: Mapping[str, float]) -> None:
        """Metrics of `done` steps, to every place where somebody looks; what they trained on."""
        self.fault_log.step = done
        self.context.log.log(STAGE, done, metrics)
        if prompt_ids := self.streams.pop_prompts():
            self.context.prompts.log(STAGE, done, prompt_ids)
        self._last |= metrics
        if done == 0:
            self.stopping.observe(metrics)  # what later measurements must beat
            self.collapse.observe(metrics)  # what they are held against
        self._require_best_metric()
        self._save_timings()
        self.context.writes.try_again()
        self.store.finish(self.pools.learner, wait=False)
        self._shown |= {SHOWN[name]: metrics[name] for name in SHOWN if name in metrics}
        self.task.update(done, self._shown)

    def describe_step(self, result: StepResult, seconds: float) -> dict[str, float]:
        """The step's metrics with where its time went; the driver's own part is what is left."""
        waited = self.context.timings.pop_step()
        for name, part in waited.items():
            self._waited[name] = self._waited.get(name, 0.0) + part
        clock = {**waited, "driver": seconds - sum(waited.values()), "step": seconds}
        return {
            **result.metrics,
            "learner/peak_memory_bytes": float(result.peak_memory_bytes),
            **self.streams.pop_counts(),
            **self._describe_pools(),
            "disk/failed_writes": float(self.context.writes.num_failed),
            **self.fault_log.metrics(),
            **{f"seconds/{name}": value for name, value in clock.items()},
            "tokens_per_second/step": result.num_response_tokens / seconds,
            "tokens_per_second/learner": result.num_response_tokens / result.seconds,
        }

    def describe_measured(self) -> dict[str, float]:
        """What is asked of the scorers themselves, and so only where a step is measured: bytes
        that they shipped for each response token since this was last asked."""
        since = self.pools.scorers.pop_shipped()
        return wire_metrics(since.num_bytes, since.num_response_tokens)

    def _describe_pools(self) -> dict[str, float]:
        """What every pool did since this was last asked."""
        activity = self.streams.pop_activity()
        self.context.timings.add_activity(activity)
        for pool, done in activity.items():
            earlier = self._since_observed.get(pool)
            self._since_observed[pool] = done if earlier is None else join_stretches(earlier, done)
        recent = self._recent.add(activity)
        found = find_bottleneck(
            recent,
            is_asynchronous=self.streams.is_asynchronous,
            shares_cores=self._shares_cores,
        )
        self.context.view.show_pools(recent, "" if found is None else found.line)
        speedups = {} if found is None else found.speedups
        gains = {f"speedup/{pool}": speedup for pool, speedup in speedups.items()}
        return activity_metrics(activity) | gains

    def observe_scaling(self) -> ScalingObservation:
        """What the automatic mode goes by: every pool, and whom the learner waited for, since the
        last look."""
        pools, self._since_observed = self._since_observed, {}
        waited, self._waited = self._waited, {}
        learner = pools.pop("learner", None)
        longest = max(pools.keys() & waited.keys(), key=waited.__getitem__, default=None)
        return ScalingObservation(
            at_seconds=time.monotonic(),
            pools=pools,
            learner_starved_share=0.0 if learner is None else learner.starved_share,
            waited_for=longest,
        )

    def checkpoint(self, done: int) -> None:
        """Begin to write everything that the steps to come depend on; they go on beside it."""
        state = {
            "streams": self.streams.state(),
            "weight_version": done,
            "early_stopping": self.stopping.state(),
            "collapse": self.collapse.state(),
        }
        self.store.start(done, state, self.pools.learner, metrics=self._last)

    def watch_text(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Judge whether the student's text collapses, and say so; returns it as metrics."""
        judged, lines = self.collapse.observe(metrics)
        for line in lines:
            self.context.view.note(line)
        return judged

    def leave(self, done: int) -> NoReturn:
        """End because a person asked for it, once the checkpoint of this step is whole.

        Raises: KeyboardInterrupt; RunStateError if the checkpoint could not be written;
            CollapseError where the student's text is the reason.
        """
        self.store.finish(self.pools.learner, wait=True)
        self.context.timings.save()
        if self.store.failure is not None:
            raise RunStateError(self.store.failure)
        self.context.view.note(f"{STAGE}: the checkpoint after step {done} is complete")
        if self.collapse.ends_run:
            raise CollapseError(
                f"{self.collapse.reason}. distill.collapse.action=stop ends such a run; the "
                f"checkpoint after step {done} is complete. Look at the texts in the report, then "
                "start again with a lower learning rate or more weight on the teacher's text, or "
                "go on with --resume distill.collapse.action=note"
            )
        raise KeyboardInterrupt

    def finished_on_failure(self) -> AbstractContextManager[None]:
        """A block whose failure leaves the checkpoint under way behind as a whole one."""
        return self.store.finished_on_failure(self.pools.learner)

    def stops_after(self, measured: Mapping[str, float]) -> bool:
        """Count what was measured after a step; whether the run ends before its last one."""
        self.stopping.observe(measured)
        if self.stopping.is_due:
            self.context.view.note(f"{self.stopping.reason}; this was the last step")
        return self.stopping.is_due

    @property
    def exports_other_weights(self) -> bool:
        """Whether the exported weights are others than those that the last step leaves."""
        config = self.context.config
        return config.export_dtype != "float32" or config.export.weights == "best"

    def take_exported_weights(self, done: int) -> int:
        """Let the learner hold what will be exported; returns the steps that made it.

        The last checkpoint is complete before: it keeps the weights as they were.
        """
        config, learner = self.context.config, self.pools.learner
        self.store.finish(learner, wait=True)
        if config.export.weights == "best":
            best = self.store.find_best()
            self.store.load(best, learner)
            done = best.step
        if config.export_dtype != "float32":
            learner.round_weights(config.export_dtype)
        return done

    def close(self, done: int) -> None:
        """Finish the last checkpoint and export the student that `done` steps made."""
        self.store.finish(self.pools.learner, wait=True)
        config, dtype = self.context.config.distill, self.context.config.export_dtype
        facts = {
            "teacher": self.context.teacher_path,
            "student before": self.context.student_path,
            "objective": config.objective.model_dump_json(),
            "steps": done,
            "precision of the weights": f"{dtype}, as they were evaluated",
            "on-policy sequences per step": config.sequences("on_policy"),
            "off-policy sequences per step": config.sequences("off_policy"),
            "off-policy source": _say_source(config),
        }
        if config.language_model is not None:
            facts["loss on plain text"] = config.language_model.model_dump_json()
        folder = self.context.run.student_directory
        export_model(self.context, self.pools.learner, folder, facts=facts, dtype=dtype)
        self.task.finish()

    def _save_timings(self) -> None:
        """Now and then, so that a run that is killed loses seconds of its clock and no more."""
        now = time.perf_counter()
        if now - self._timings_saved >= TIMINGS_SECONDS:
            self.context.timings.save()
            self._timings_saved = now

    def _require_best_metric(self) -> None:
        """At once, and not when the first checkpoint is chosen by it hours later."""
        config = self.context.config.distill
        for key, chosen in (
            ("keep_best", config.keep_best),
            ("early_stopping", config.early_stopping),
        ):
            if chosen is not None and chosen.metric not in self._last:
                known = sorted(name for name in self._last if name.startswith(MEASURED))
                raise ConfigError(
                    f"distill.{key}.metric: this run measures no {chosen.metric!r}; choose one of "
                    f"{', '.join(known)}"
                )


def _shares_cores(config: RunConfig) -> bool:
    """Whether a local run's workers have this machine's cores between them."""
    alone = not os.environ.get("RAY_ADDRESS")
    return alone and shares_cores(config.model_dump(mode="json"), os.cpu_count())


def _say_source(config: DistillConfig) -> str:
    """Who wrote the off-policy stream; several with their shares."""
    if isinstance(config.off_policy_source, str):
        return config.off_policy_source
    mixture = config.off_policy_mixture.items()
    return ", ".join(f"{source} {share:.3g}" for source, share in mixture)

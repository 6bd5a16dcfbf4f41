"""Who reads what each pool of a distillation makes; a pool that nobody reads is not started."""

from __future__ import annotations

from distill_system.config.distill import DistillConfig
from distill_system.config.objective import StreamName
from distill_system.config.pools import PoolsConfig

STEPS, EVALUATIONS, MEASURES = "steps", "evaluations", "measures on data.held_out"
SOURCES = "weights of sources that follow measures"


def find_readers(
    distill: DistillConfig, pools: PoolsConfig, *, follows_sources: bool
) -> dict[str, tuple[str, ...]]:
    """Each configured pool with those who read it while the steps go on, for people.

    follows_sources: whether data.prompts has a policy.
    The teacher's engines write text for steps alone here: what measures and evaluations want of
    them is the same all along, and is written before (RunConfig.teacher_writes_first).
    """
    streams: list[StreamName] = [s for s in ("on_policy", "off_policy") if distill.sequences(s)]
    is_scored = any(distill.objective.teacher_needs(stream).anything for stream in streams)
    teacher_writes = "off_policy" in streams and "teacher" in distill.off_policy_mixture
    measures = {MEASURES: distill.measure_every is not None}
    looked_at = {EVALUATIONS: True, **measures}
    has_evaluation = pools.evaluation is not None
    wanted: dict[str, dict[str, bool]] = {
        "student_rollout": {STEPS: "on_policy" in streams, **({} if has_evaluation else looked_at)},
        "teacher_rollout": {STEPS: teacher_writes},
        "teacher_scoring": {STEPS: is_scored, **measures, SOURCES: follows_sources},
        "learner": {STEPS: True},
        "evaluation": looked_at,
    }
    return {
        name: tuple(reader for reader, reads in wanted[name].items() if reads)
        for name in pools.by_name
    }

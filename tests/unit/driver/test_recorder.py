"""The books of a distillation over two lives, with a learner and streams that only count."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fakes.hand_clock import HandClock
from fakes.text_saver import TextSaver

from distill_system.driver.recorder import RunRecorder
from distill_system.errors import CollapseError, ConfigError, NonFiniteError
from distill_system.observe import LiveView, MetricLog, PromptLog, RunDirectory, RunWrites, Timings
from distill_system.observe.metrics import read_metrics, read_prompts
from distill_system.observe.run_directory import read_json, write_json
from distill_system.records import PoolActivity, StepResult

LENGTH = "learner/mean_student_response_tokens"
BEST = "distill.keep_best={metric: held_out/on_policy_distance, mode: min}"


class _Streams:
    """Feeds one prompt a step, by its number."""

    def __init__(self):
        self.position, self.fed = 0, {}

    def feed(self):
        self.fed = {"on_policy": [f"prompts:{self.position}"]}
        self.position += 1

    def pop_prompts(self):
        fed, self.fed = self.fed, {}
        return fed

    def state(self):
        return {"position": self.position}

    def restore(self, state):
        self.position = state["position"]


NO_FAULTS: Any = SimpleNamespace(step=0, metrics=dict)


@pytest.fixture
def live(configure, tmp_path):
    """One life: steps until `until`, checkpoints after `saves`; then it ends as if by signal 9."""

    def run(
        *, until, saves=(), resume=False, overrides=(), failure=None, leaves=False, lengths=None
    ):
        config = configure("distill.keep_checkpoints=1", "distill.steps=9", *overrides)
        run = RunDirectory(tmp_path / "books")
        learner = TextSaver("0", writing=True)
        streams: Any = _Streams()
        with MetricLog(run, run_name="books") as log, PromptLog(run) as prompts:
            context: Any = SimpleNamespace(
                config=config,
                run=run,
                log=log,
                prompts=prompts,
                timings=Timings(run),
                view=LiveView("test", console=None),
                resume=resume,
                writes=RunWrites(),
            )
            pools: Any = SimpleNamespace(learner=learner)
            recorder = RunRecorder(context, pools, streams, NO_FAULTS)
            first = recorder.open()
            assert (int(learner.text), streams.position) == (first, first)
            if first == 0:
                recorder.write(0, {"held_out/on_policy_distance": 9.0})
            with recorder.finished_on_failure():
                for done in range(first + 1, until + 1):
                    streams.feed()
                    learner.text = str(done)
                    recorder.write(done, {"learner/loss": 1.0 / done})
                    if lengths is not None:
                        recorder.watch_text({LENGTH: lengths[done - 1]})
                    if done in saves:
                        recorder.checkpoint(done)
                    if recorder.collapse.ends_run:
                        recorder.checkpoint(done)
                        recorder.leave(done)
                if failure is not None:
                    raise failure
                if leaves:
                    recorder.checkpoint(until)
                    recorder.leave(until)
        return first, run

    return run


def test_a_second_life_goes_on_after_the_last_whole_checkpoint_and_doubles_nothing(live):
    live(until=7, saves=(3, 5))  # the one of step 5 is still being written when it ends
    first, run = live(until=9, resume=True)
    assert first == 3
    assert [row.step for row in read_metrics(run)] == list(range(10))
    assert [row.step for row in read_prompts(run)] == list(range(1, 10))
    fed = [at for row in read_prompts(run) for at in row.prompt_ids["on_policy"]]
    assert fed == [f"prompts:{at}" for at in range(9)]


def test_a_failure_in_a_step_keeps_the_checkpoint_that_was_being_written(live):
    with pytest.raises(NonFiniteError):
        live(until=7, saves=(3, 5), failure=NonFiniteError())
    assert live(until=8, resume=True)[0] == 5


def test_a_life_without_any_checkpoint_begins_anew(live):
    live(until=2)
    first, run = live(until=1, resume=True)
    assert first == 0
    assert [row.step for row in read_metrics(run)] == [0, 1]


def test_the_clock_goes_on_over_lives_and_from_zero_for_who_begins_anew(live, tmp_path):
    def lived(seconds):
        form: Any = read_json(path)
        form["seconds"]["distill"] += seconds
        write_json(path, form)

    def total():
        form: Any = read_json(path)
        return form["seconds"]["distill"]

    path = RunDirectory(tmp_path / "books").timings_path

    live(until=3, saves=(1, 3))
    lived(100.0)
    live(until=3, resume=True)
    assert 100.0 <= total() < 200.0
    lived(100.0)
    live(until=5, saves=(), resume=True)
    assert 200.0 <= total() < 300.0


def test_a_checkpoint_is_best_by_what_was_measured_last_before_it(live):
    _first, run = live(until=5, saves=(1, 2, 3), overrides=(BEST,))
    folder = run.checkpoints_directory / "distill"
    kept = {path.name for path in folder.iterdir()}
    assert kept == {"step_000001", "step_000002", "step_000003.partial"}, "equals: the earlier"


def test_a_person_who_ends_the_run_finds_its_last_step_whole(live):
    with pytest.raises(KeyboardInterrupt):
        live(until=6, saves=(3,), leaves=True)
    assert live(until=8, resume=True)[0] == 6


def test_a_metric_that_is_never_measured_is_refused_as_training_begins(live):
    unmeasured = "evaluation/test/rouge_l_greedy"  # where the split has no references
    with pytest.raises(ConfigError, match=rf"no '{unmeasured}'; choose one of held_out/on_policy"):
        live(until=1, overrides=(f"distill.keep_best={{metric: {unmeasured}, mode: max}}",))


def test_the_best_may_be_asked_for_in_a_later_life(live):
    live(until=3, saves=(1, 3))
    assert live(until=4, resume=True, overrides=(BEST,))[0] == 1


def test_a_look_names_the_pool_that_was_waited_for_longest_or_none(configure, tmp_path):
    run, clock = RunDirectory(tmp_path / "look"), HandClock()
    context: Any = SimpleNamespace(
        config=configure(),
        run=run,
        timings=Timings(run, clock=clock),
        view=LiveView("test", console=None),
        writes=RunWrites(),
    )
    pools = {
        name: PoolActivity(num_workers=1, seconds=10.0, starved_seconds=starved)
        for name, starved in (("teacher_rollout", 0.0), ("student_rollout", 0.0), ("learner", 4.0))
    }
    no_pools: Any = SimpleNamespace()
    streams: Any = SimpleNamespace(
        is_asynchronous=True, pop_activity=lambda: pools, pop_counts=dict
    )
    recorder = RunRecorder(context, no_pools, streams, NO_FAULTS)
    assert recorder.observe_scaling().waited_for is None
    for phase, seconds in (
        ("student_rollout", 0.001),
        ("teacher_rollout", 0.03),
        ("learner", 0.06),
    ):
        with context.timings.phase(phase):
            clock.sleep(seconds)
    recorder.describe_step(StepResult(step=0, metrics={}, num_response_tokens=1, seconds=1.0), 1.0)
    look = recorder.observe_scaling()
    assert (look.waited_for, look.learner_starved_share) == ("teacher_rollout", 0.4)
    assert set(look.pools) == {"teacher_rollout", "student_rollout"}
    assert recorder.observe_scaling().waited_for is None


def test_a_second_look_forgets_the_waits_and_the_work_of_the_first(configure, tmp_path):
    run = RunDirectory(tmp_path / "look")
    waits = [{"student_rollout": 5.0, "teacher_rollout": 1.0}, {"teacher_rollout": 2.0}]
    waits.append({"teacher_rollout": 0.5, "student_rollout": 0.25})
    timings = SimpleNamespace(pop_step=lambda: waits.pop(0), add_activity=lambda _: None)
    context: Any = SimpleNamespace(
        config=configure(),
        run=run,
        timings=timings,
        view=LiveView("test", console=None),
        writes=RunWrites(),
    )
    no_pools: Any = SimpleNamespace()
    streams: Any = SimpleNamespace(
        is_asynchronous=True,
        pop_counts=dict,
        pop_activity=lambda: {
            name: PoolActivity(num_workers=1, seconds=10.0, starved_seconds=4.0)
            for name in ("student_rollout", "teacher_rollout", "learner")
        },
    )
    recorder = RunRecorder(context, no_pools, streams, NO_FAULTS)
    result = StepResult(step=0, metrics={}, num_response_tokens=1, seconds=1.0)
    recorder.describe_step(result, 6.0)
    first = recorder.observe_scaling()
    recorder.describe_step(result, 2.0)
    recorder.describe_step(result, 1.0)
    second = recorder.observe_scaling()
    assert (first.waited_for, second.waited_for) == ("student_rollout", "teacher_rollout")
    assert first.pools["student_rollout"].seconds == 10.0
    assert second.pools["student_rollout"].seconds == 20.0, "two steps, not all three"
    assert recorder.observe_scaling().pools == {}


def test_a_run_whose_text_collapses_ends_with_a_whole_checkpoint_and_may_go_on(live):
    lengths = [50.0, 50.0, 50.0, 50.0, 4.0, 4.0, 4.0, 4.0]
    window = "distill.collapse.window=2"
    with pytest.raises(CollapseError, match=r"mean length.*checkpoint after step 6 is complete"):
        live(until=8, lengths=lengths, overrides=(window, "distill.collapse.action=stop"))
    first, _run = live(until=8, lengths=lengths, resume=True, overrides=(window,))
    assert first == 6

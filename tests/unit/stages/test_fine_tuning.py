"""The fine-tuning loop with a real learner in this process: it learns, and resumes to the bit."""

from __future__ import annotations

import threading
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes.local_workers import LocalWorkers
from one_rank import one_rank
from trajectories import make_trajectories

from distill_system.config.model import OptimizerConfig, SupervisedConfig
from distill_system.errors import RunStateError
from distill_system.learner import LearnerGroup, ModelSource
from distill_system.observe import LiveView, MetricLog, PromptLog, RunDirectory, RunWrites, Timings
from distill_system.observe.metrics import read_metrics, read_prompts
from distill_system.records import Author
from distill_system.stages.supervised import FineTuning
from distill_system.stopping import StopRequest

ROWS = make_trajectories(20, Author.DATASET)
CONFIG = SupervisedConfig(
    steps=8,
    batch_size=6,
    optimizer=OptimizerConfig(type="muon", learning_rate=1e-2, warmup_steps=2),
    checkpoint_every=3,
)


class _StoppingView(LiveView):
    """Asks for the end once a step is done, as a failure elsewhere in the run or a person would."""

    def __init__(self, stop, after):
        super().__init__("test", console=None)
        self.stop, self.after = stop, after

    def start(self, stage, total_steps, **before):
        task: Any = super().start(stage, total_steps, **before)
        update = task.update

        def update_and_stop(step, values):
            update(step, values)
            if step == self.after:
                self.stop()

        task.update = update_and_stop
        return task


@pytest.fixture
def fine_tune(tiny_model_folder, tmp_path):
    def run(name, *, resume=False, stop_after=None, by_signal=False):
        source = ModelSource(path=str(tiny_model_folder(seed=5)))
        learner = one_rank(source, optimizer=CONFIG.optimizer, total_steps=CONFIG.steps)
        directory = RunDirectory(tmp_path / name)
        stop, request = threading.Event(), StopRequest()
        with (
            request.heard(seconds=60.0),
            MetricLog(directory, run_name=name) as log,
            PromptLog(directory) as prompts,
        ):
            context: Any = SimpleNamespace(
                config=SimpleNamespace(seed=3),
                run=directory,
                log=log,
                prompts=prompts,
                timings=Timings(directory),
                view=_StoppingView(request.make if by_signal else stop.set, stop_after),
                resume=resume,
                stop=request,
                writes=RunWrites(),
            )
            group = LearnerGroup(LocalWorkers([learner]))
            restarts: Any = SimpleNamespace(goes_on_after=lambda first: None)
            faults: Any = SimpleNamespace(step=0)
            fine_tuning = FineTuning(context, "sft_student", CONFIG, group, ROWS)
            finished = fine_tuning.run(stop, restarts, faults)
        losses = {row.step: row.metrics["learner/loss"] for row in read_metrics(directory)}
        weights = torch.cat([p.detach().reshape(-1) for p in learner.model.parameters()])
        return finished, losses, weights, read_prompts(directory)

    return run


@pytest.mark.parametrize("after", [1, 3, 5])
def test_a_person_who_ends_it_loses_no_step(fine_tune, tmp_path, after):
    """Updates in flight are finished, and a checkpoint of the last of them is left."""
    _, losses, weights, _ = fine_tune("unbroken")
    stopped, done, _, _ = fine_tune("stopped", stop_after=after, by_signal=True)
    assert not stopped
    assert after <= len(done) < CONFIG.steps
    [checkpoint] = (tmp_path / "stopped/checkpoints/sft_student").iterdir()
    assert checkpoint.name == f"step_{len(done):06d}"
    finished, resumed, again, _ = fine_tune("stopped", resume=True)
    assert finished
    assert resumed == losses
    assert torch.equal(again, weights)


def test_a_stopped_fine_tuning_resumes_to_the_bit(fine_tune):
    finished, losses, weights, prompts = fine_tune("unbroken")
    assert finished
    assert list(losses) == list(range(8))
    assert losses[7] < losses[0]
    trained = Counter(at for row in prompts for at in row.prompt_ids["off_policy"])
    assert sum(trained.values()) == 8 * 6
    assert trained.keys() == {row.prompt_id for row in ROWS}
    assert {*trained.values()} == {2, 3}, "48 rows of 20: two epochs and a part of the third"
    stopped, _, _, _ = fine_tune("stopped", stop_after=5)
    assert not stopped
    with pytest.raises(RunStateError, match="add --resume"):
        fine_tune("stopped")
    finished, resumed_losses, resumed_weights, resumed_prompts = fine_tune("stopped", resume=True)
    assert finished
    assert resumed_losses == losses
    assert resumed_prompts == prompts
    assert torch.equal(resumed_weights, weights)

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distill_system.config.rollout import EngineConfig
from distill_system.errors import ModelError, RecordError
from distill_system.records import Author, Finish, Prompt, VersionSpan
from distill_system.rollout.engine import Completion
from distill_system.rollout.sampling import Sampling
from distill_system.rollout.worker import RolloutWorker, make_trajectory

PROMPT = Prompt(prompt_id="p7", token_ids=np.array([5, 6], np.int32), text="a b")
SAMPLING = Sampling(temperature=0.5, max_response_tokens=3)
COMPLETION = Completion(
    token_ids=np.array([9, 8, 2], np.int32),
    logprobs=np.array([-1.0, -0.5, -0.25], np.float32),
    finish_reason="stop",
    version_spans=((3, 0, 1), (4, 1, 3)),
)


def _worker(model_path: str) -> RolloutWorker:
    return RolloutWorker(
        name="teacher_rollout-0",
        model_path=model_path,
        author=Author.TEACHER,
        engine=EngineConfig(),
        max_model_length=16,
        uses_gpu=False,
    )


def test_a_students_completion_becomes_a_trajectory_with_its_versions() -> None:
    trajectory = make_trajectory(
        PROMPT, COMPLETION, author=Author.STUDENT, sampling=SAMPLING, label="step-1"
    )
    assert trajectory.trajectory_id == "step-1/student/p7"
    assert trajectory.token_ids.tolist() == [5, 6, 9, 8, 2]
    assert trajectory.token_ids.dtype == np.int32
    assert trajectory.response_ids.tolist() == [9, 8, 2]
    assert trajectory.behaviour_logprobs.tolist() == [-1.0, -0.5, -0.25]
    assert (trajectory.finish, trajectory.temperature) == (Finish.STOP, 0.5)
    assert trajectory.weight_versions == (
        VersionSpan(version=3, start=0, end=1),
        VersionSpan(version=4, start=1, end=3),
    )


def test_a_teachers_trajectory_carries_no_weight_version() -> None:
    trajectory = make_trajectory(
        PROMPT, COMPLETION, author=Author.TEACHER, sampling=SAMPLING, label="step-1"
    )
    assert trajectory.weight_versions == ()


def test_an_empty_response_is_refused_with_its_id() -> None:
    empty = Completion(
        token_ids=np.zeros(0, np.int32),
        logprobs=np.zeros(0, np.float32),
        finish_reason="abort",
        version_spans=(),
    )
    with pytest.raises(RecordError, match="step-1/teacher/p7"):
        make_trajectory(PROMPT, empty, author=Author.TEACHER, sampling=SAMPLING, label="step-1")


def test_a_folder_that_holds_no_model_is_named_in_an_error_that_travels(tmp_path: Path) -> None:
    for path in (str(tmp_path), str(tmp_path / "missing")):
        with pytest.raises(ModelError) as caught:
            _worker(path).ready()
        copy = pickle.loads(pickle.dumps(caught.value))
        assert path in str(copy)
        assert "config.json" in str(copy)


def test_the_driver_can_name_workers_and_publishers_without_loading_vllm() -> None:
    program = (
        "import sys\n"
        "import distill_system.rollout.worker, distill_system.rollout.pool\n"
        "assert 'torch' not in sys.modules, 'rollout imports torch'\n"
        "import distill_system.weights.client, distill_system.weights.publisher\n"
        "assert 'vllm' not in sys.modules, 'weights imports vllm'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[3])

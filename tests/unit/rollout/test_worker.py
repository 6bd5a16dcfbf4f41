import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill_system.config.rollout import EngineConfig
from distill_system.errors import ModelError, RecordError, TransferError
from distill_system.records import Author, EngineLoad, Finish, Prompt, VersionSpan
from distill_system.rollout.engine import Completion
from distill_system.rollout.sampling import Sampling
from distill_system.rollout.worker import GenerationRequest, RolloutWorker, make_trajectory

PROMPT = Prompt(prompt_id="p7", token_ids=np.array([5, 6], np.int32), text="a b")
SAMPLING = Sampling(temperature=0.5, max_response_tokens=3)
REQUEST = GenerationRequest(prompt=PROMPT, label="step-1", sampling=SAMPLING, seed=4)
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
    trajectory = make_trajectory(REQUEST, COMPLETION, Author.STUDENT)
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
    assert make_trajectory(REQUEST, COMPLETION, Author.TEACHER).weight_versions == ()


def test_an_empty_response_is_refused_with_its_id() -> None:
    empty = Completion(
        token_ids=np.zeros(0, np.int32),
        logprobs=np.zeros(0, np.float32),
        finish_reason="abort",
        version_spans=(),
    )
    with pytest.raises(RecordError, match="step-1/teacher/p7"):
        make_trajectory(REQUEST, empty, Author.TEACHER)


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


class FakeEngine:
    """Answers everything with COMPLETION, and fails in one call of the weight transfer.

    is_whole: whether its weights are one version's after that.
    """

    vocabulary_size, version = 100, 3

    def __init__(self, failing_call: str = "", *, is_whole: bool = True) -> None:
        self.failing_call = failing_call
        self.is_whole = is_whole
        self.seeds: list[int] = []
        self.added: dict[str, int] = {}
        self.waiting: list[str] = []
        self.stepped = 0

    def complete(self, prompts: Any, sampling: Sampling, seeds: list[int]) -> list[Completion]:
        self.stepped += 1
        self.seeds += seeds
        return [COMPLETION for _ in prompts]

    def add(self, name: str, token_ids: Any, sampling: Sampling, seed: int) -> None:
        self.added[name] = seed
        self.waiting.append(name)

    def decode(self, seconds: float) -> dict[str, Completion]:
        self.stepped += 1
        finished, self.waiting = self.waiting, []
        return dict.fromkeys(finished, COMPLETION)

    def call_transfer(self, method: str, **arguments: object) -> list[Any]:
        if method == self.failing_call:
            raise RuntimeError("connection closed by peer")
        return [self.is_whole] if method == "holds_whole_weights" else [(8, 5)]

    def commit_version(self, version: int) -> None:
        self.version = version

    import_seconds = start_seconds = 1.0

    def load(self) -> EngineLoad:
        return EngineLoad(running=1, waiting=0, cache_use=None, written_tokens=9, version=3)


def test_who_shows_the_engines_load_is_told_once_and_only_where_the_engine_stands() -> None:
    shown: list[tuple[str, EngineLoad]] = []

    class Report:
        def start(self, worker: str, read_load: Callable[[], EngineLoad]) -> None:
            shown.append((worker, read_load()))

    engine = FakeEngine()
    worker = _working(engine)
    worker._load_report = Report()
    assert shown == []
    worker.ready()
    worker.ready()
    assert shown == [("teacher_rollout-0", engine.load())]


def _working(engine: FakeEngine) -> RolloutWorker:
    worker = _worker("no such folder")
    worker._engine = engine  # type: ignore[assignment]  # instead of one that loads a model
    return worker


@pytest.mark.parametrize("failing_call", ["start_weight_update", "update_weights"])
def test_weights_that_do_not_arrive_leave_the_worker_writing_with_those_it_had(
    failing_call: str,
) -> None:
    engine = FakeEngine(failing_call)
    worker = _working(engine)
    with pytest.raises(TransferError, match=f"{failing_call} failed"):
        worker.receive_weights(4, {})
    assert worker.weight_version() == 3
    assert len(worker.generate([PROMPT], SAMPLING, 4, "step-1")) == 1
    assert worker.advance([REQUEST], 1.0).version == 3


@pytest.mark.parametrize(
    ("failing_call", "is_whole"),
    [
        ("update_weights", False),
        ("finish_weight_update", False),
        ("received_seal", True),  # whole, but of a version that nobody has confirmed
    ],
)
def test_nothing_is_written_with_half_loaded_weights_until_whole_ones_arrive(
    failing_call: str, is_whole: bool
) -> None:
    engine = FakeEngine(failing_call, is_whole=is_whole)
    worker = _working(engine)
    with pytest.raises(TransferError, match=rf"{failing_call} failed in teacher_rollout-0.*peer"):
        worker.receive_weights(4, {})
    assert worker.weight_version() == 3
    with pytest.raises(TransferError, match="holds no whole set of weights"):
        worker.generate([PROMPT], SAMPLING, 4, "step-1")
    for requests in ([REQUEST], []):
        idle = worker.advance(requests, 0.01)
        assert (idle.trajectories, idle.version, idle.busy_seconds) == ((), 3, 0.0)
    assert engine.stepped == 0
    engine.failing_call = ""
    received = worker.receive_weights(5, {})
    assert len(worker.advance([], 1.0).trajectories) == 1, "what was asked for has waited"
    assert (received.version, received.num_bytes, received.digest) == (5, 8, 5)
    assert worker.weight_version() == 5
    assert len(worker.generate([PROMPT], SAMPLING, 4, "step-1")) == 1
    assert len(worker.advance([REQUEST], 1.0).trajectories) == 1


def test_seed_label_and_prompt_each_change_the_sample_and_both_ways_of_asking_agree() -> None:
    other = Prompt(prompt_id="p8", token_ids=PROMPT.token_ids, text=PROMPT.text)
    asked = [
        (PROMPT, 4, "step-1"),
        (PROMPT, 5, "step-1"),
        (PROMPT, 4, "step-2"),
        (other, 4, "step-1"),
        (PROMPT, 4, "step-1"),
    ]
    written, sliced = [], []
    for prompt, seed, label in asked:
        engine = FakeEngine()
        _working(engine).generate([prompt], SAMPLING, seed, label)
        written += engine.seeds
        request = GenerationRequest(prompt=prompt, label=label, sampling=SAMPLING, seed=seed)
        _working(engine).advance([request], 1.0)
        sliced += engine.added.values()
    assert len(set(written)) == 4
    assert written[4] == written[0], "the same question, the same sample"
    assert sliced == written

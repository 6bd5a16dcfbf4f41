"""What a rollout worker asks of its engine and says of itself, on an engine that notes it down."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from distill_system.config.rollout import EngineConfig
from distill_system.errors import DataError, ModelError, TransferError
from distill_system.records import Author, EngineLoad, Prompt
from distill_system.rollout import GenerationRequest, Sampling
from distill_system.rollout.engine import Completion
from distill_system.rollout.worker import RolloutWorker

SAMPLING = Sampling(temperature=0.5, max_response_tokens=3)


class Engine:
    """Answers a prompt with its own tokens again; `failing`: transfer methods that raise."""

    def __init__(self, specification):
        self.specification = specification
        self.import_seconds, self.start_seconds = 1.5, 2.5
        self.vocabulary_size = 64
        self.version = 0
        self.asked, self.under_way, self.transfers = [], {}, []
        self.failing: dict[str, Exception] = {}
        self.is_whole = True
        self.written_tokens = 0

    def load(self):
        counts = {"running": 0, "waiting": len(self.under_way), "cache_use": None}
        written, version = self.written_tokens, self.version
        return EngineLoad(**counts, written_tokens=written, version=version)

    def complete(self, prompts, sampling, seeds):
        self.asked += zip(
            [p.tolist() for p in prompts], [sampling] * len(prompts), seeds, strict=True
        )
        return [self._complete(prompt) for prompt in prompts]

    def add(self, name, prompt, sampling, seed):
        self.asked.append((prompt.tolist(), sampling, seed))
        self.under_way[name] = prompt

    def decode(self, seconds):
        """One request a slice, the oldest first."""
        time.sleep(seconds)
        name = next(iter(self.under_way), None)
        return {} if name is None else {name: self._complete(self.under_way.pop(name))}

    def _complete(self, prompt):
        self.written_tokens += prompt.size
        return Completion(
            token_ids=prompt.copy(),
            logprobs=np.zeros(prompt.size, np.float32),
            finish_reason="stop",
            version_spans=((self.version, 0, prompt.size),),
        )

    def call_transfer(self, method, **arguments):
        self.transfers.append((method, arguments))
        if method in self.failing:
            raise self.failing[method]
        return [self.is_whole] if method == "holds_whole_weights" else [(96, 1234)]

    def commit_version(self, version):
        self.version = version


@pytest.fixture
def make_worker(monkeypatch):
    def make(author=Author.STUDENT, **changes):
        monkeypatch.setattr("distill_system.rollout.worker.build_engine", Engine)
        settings = {
            "name": "student_rollout-0",
            "model_path": "/models/student",
            "author": author,
            "engine": EngineConfig(),
            "max_model_length": 8,
            "uses_gpu": False,
        }
        worker = RolloutWorker(**{**settings, **changes})
        return SimpleNamespace(worker=worker, engine=worker._engine)

    return make


def _prompt(name, *token_ids):
    return Prompt(prompt_id=name, token_ids=np.array(token_ids, np.int32), text="")


TWO = [_prompt("a", 5, 6), _prompt("b", 7)]


def _seeds(made):
    return [seed for _, _, seed in made.engine.asked]


def test_an_answer_carries_its_prompt_and_its_label(make_worker):
    made = make_worker()
    made.engine.version = 4
    first, second = made.worker.generate(TWO, SAMPLING, 3, "step_9")
    assert [t.trajectory_id for t in (first, second)] == ["step_9/student/a", "step_9/student/b"]
    assert (first.token_ids.tolist(), first.num_prompt_tokens) == ([5, 6, 5, 6], 2)
    assert (second.prompt_id, second.oldest_version, second.temperature) == ("b", 4, 0.5)
    assert [asked[:2] for asked in made.engine.asked] == [([5, 6], SAMPLING), ([7], SAMPLING)]


@pytest.mark.parametrize("way", ["generate", "advance"])
@pytest.mark.parametrize(("author", "read"), [("teacher", [9, 9, 5, 6]), ("student", [5, 6])])
def test_a_teacher_writes_after_its_own_prompt_and_the_student_after_its_own(
    make_worker, way, author, read
):
    made = make_worker(Author(author))
    prompt = replace(TWO[0], teacher_ids=np.array([9, 9, 5, 6], np.int32))
    if way == "generate":
        [written] = made.worker.generate([prompt], SAMPLING, 3, "t")
    else:
        request = GenerationRequest(prompt=prompt, label="t", sampling=SAMPLING, seed=3)
        [written] = made.worker.advance([request], 0.0).trajectories
    assert made.engine.asked[0][0] == read
    # The engine answers with what it was asked; the student is taught after its own prompt.
    assert written.token_ids.tolist() == [5, 6, *read]
    assert written.num_prompt_tokens == 2
    assert written.as_teacher_reads.token_ids.tolist() == [9, 9, 5, 6, *read]


def test_seed_label_and_prompt_each_change_a_sample_and_nothing_else_does(make_worker):
    made, other = make_worker(), make_worker()
    made.worker.generate(TWO, SAMPLING, 3, "step_9")
    other.worker.generate(TWO[1:], SAMPLING, 3, "step_9")
    [first, second] = _seeds(made)
    assert _seeds(other) == [second]
    other.worker.generate(TWO, SAMPLING, 3, "step_10")
    other.worker.generate(TWO, SAMPLING, 4, "step_9")
    assert len({first, second, *_seeds(other)[1:]}) == 6


@pytest.mark.parametrize("way", ["generate", "advance"])
def test_another_sample_of_a_prompt_has_a_name_and_a_seed_of_its_own(make_worker, way):
    made, alone = make_worker(), make_worker()
    _ask(made, way, [replace(TWO[0], occurrence=occurrence) for occurrence in range(3)])
    _ask(alone, way, TWO[:1])
    first, second, third = _seeds(made)
    assert _seeds(alone) == [first]
    assert len({first, second, third}) == 3
    if way == "generate":  # which counts what it is asked at once
        _ask(again := make_worker(), way, [TWO[0]] * 3)
        assert _seeds(again) == [first, second, third]
    names = [
        GenerationRequest(
            prompt=replace(TWO[0], occurrence=k), label="t", sampling=SAMPLING, seed=3
        ).name("student")
        for k in range(2)
    ]
    assert names == ["t/student/a", "t/student/a#2"]


def test_a_request_is_sampled_as_a_call_of_the_same_label_is(make_worker):
    made, other = make_worker(), make_worker()
    made.worker.generate(TWO, SAMPLING, 3, "step_9")
    requests = [
        GenerationRequest(prompt=prompt, label="step_9", sampling=SAMPLING, seed=3)
        for prompt in TWO
    ]
    other.worker.advance(requests, 0.0)
    assert other.engine.asked == made.engine.asked


def test_requests_go_on_over_slices_and_are_handed_out_once(make_worker):
    made = make_worker()
    made.engine.version = 2
    requests = [
        GenerationRequest(prompt=prompt, label="t7", sampling=SAMPLING, seed=3) for prompt in TWO
    ]
    said = [made.worker.advance(requests, 0.02)]
    said += [made.worker.advance([], 0.02) for _ in range(2)]
    ids = [[t.trajectory_id for t in each.trajectories] for each in said]
    assert ids == [["t7/student/a"], ["t7/student/b"], []]
    [first] = said[0].trajectories
    assert (first.prompt_id, first.token_ids.tolist()) == ("a", [5, 6, 5, 6])
    assert (first.author, first.temperature) == (Author.STUDENT, 0.5)
    assert [each.version for each in said] == [2, 2, 2]
    assert all(each.busy_seconds >= 0.02 for each in said)


def test_a_worker_says_how_long_its_engine_took(make_worker):
    assert make_worker().worker.ready() == {"import_seconds": 1.5, "start_seconds": 2.5}


def test_the_engine_is_built_of_what_the_worker_was_given(make_worker):
    config = EngineConfig(kv_cache_mebibytes=8)
    built = make_worker(
        engine=config,
        uses_gpu=True,
        tensor_parallel_size=2,
        weight_transfer_backend="nccl",
        trust_remote_code=True,
        vocabulary_size=60,
        stop_token_ids=[2, 7],
        keep_stale_cache=True,
    ).engine.specification
    assert (built.model_path, built.config, built.config_key) == (
        "/models/student",
        config,
        "rollout.student_engine",
    )
    assert (built.max_model_length, built.uses_gpu, built.tensor_parallel_size) == (8, True, 2)
    assert (built.weight_transfer_backend, built.trust_remote_code) == ("nccl", True)
    assert (built.vocabulary_size, built.stop_token_ids, built.keep_stale_cache) == (
        60,
        (2, 7),
        True,
    )
    plain = make_worker(Author.TEACHER).engine.specification
    assert plain.config_key == "rollout.teacher_engine"
    assert (plain.weight_transfer_backend, plain.vocabulary_size) == (None, None)
    assert (plain.tensor_parallel_size, plain.trust_remote_code) == (1, False)
    assert (plain.stop_token_ids, plain.keep_stale_cache) == ((), False)


def _ask(made, way, prompts):
    if way == "generate":
        return made.worker.generate(prompts, SAMPLING, 3, "step_9")
    requests = [
        GenerationRequest(prompt=prompt, label="t", sampling=SAMPLING, seed=3) for prompt in prompts
    ]
    return made.worker.advance(requests, 0.0)


@pytest.mark.parametrize("way", ["generate", "advance"])
def test_a_prompt_that_leaves_no_room_for_its_response_is_refused(make_worker, way):
    made = make_worker()
    assert _ask(made, way, [_prompt("fits", 1, 2, 3, 4, 5)])  # 5 + 3 of 8
    with pytest.raises(DataError, match=r"'long' does not fit student_rollout-0: 6 .* at most 8"):
        _ask(made, way, [TWO[0], _prompt("long", 1, 2, 3, 4, 5, 6)])
    assert len(made.engine.asked) == 1, "nothing of that call was begun"


@pytest.mark.parametrize("way", ["generate", "advance"])
def test_a_token_that_the_model_does_not_know_is_refused(make_worker, way):
    made = make_worker()
    assert _ask(made, way, [_prompt("edge", 0, 63)])
    for name, ids in (("above", (5, 64)), ("below", (5, -1))):
        with pytest.raises(ModelError, match=rf"'{name}' holds .* knows 0 to 63"):
            _ask(made, way, [_prompt(name, *ids)])
    assert len(made.engine.asked) == 1


def test_weights_that_arrived_are_committed_under_their_version(make_worker):
    made = make_worker()
    received = made.worker.receive_weights(7, {"names": ["w"]})
    assert (received.version, received.num_bytes, received.digest) == (7, 96, 1234)
    assert 0 <= received.seconds < 60
    assert made.worker.weight_version() == made.engine.version == 7
    assert made.engine.transfers == [
        ("start_weight_update", {}),
        ("update_weights", {"update_info": {"names": ["w"]}}),
        ("finish_weight_update", {}),
        ("received_seal", {}),
    ]


@pytest.mark.parametrize("way", ["generate", "advance"])
@pytest.mark.parametrize("method", ["start_weight_update", "update_weights"])
def test_an_update_that_does_not_arrive_leaves_the_version_before(make_worker, way, method):
    made = make_worker()
    made.worker.receive_weights(3, {})
    made.engine.failing = {method: TransferError("the peer is gone")}
    with pytest.raises(TransferError, match=f"{method} failed .* version 3: the peer is gone"):
        made.worker.receive_weights(4, {})
    assert _ask(made, way, TWO)
    assert made.worker.weight_version() == 3


@pytest.mark.parametrize("way", ["generate", "advance"])
@pytest.mark.parametrize("method", ["update_weights", "received_seal"])
def test_a_broken_update_is_told_and_nothing_is_written_until_a_whole_one(make_worker, way, method):
    made = make_worker()
    made.worker.receive_weights(3, {})
    made.engine.failing = {method: ValueError("half of it")}
    made.engine.is_whole = method == "received_seal"  # then no version was confirmed
    with pytest.raises(TransferError) as caught:
        made.worker.receive_weights(4, {})
    assert str(caught.value) == (
        f"{method} failed in student_rollout-0, which carries version 3: ValueError('half of it')"
    )
    if way == "generate":
        with pytest.raises(TransferError, match=r"no whole set of weights: .* version 3 is broken"):
            _ask(made, way, TWO)
    else:
        assert not _ask(made, way, TWO).trajectories
        assert len(made.engine.under_way) == len(TWO), "they wait"
    made.engine.failing = {}
    made.worker.receive_weights(5, {})
    assert _ask(made, way, TWO)
    assert made.worker.weight_version() == 5


def test_an_error_of_our_own_is_told_in_its_own_words(make_worker):
    made = make_worker()
    made.engine.failing = {"update_weights": TransferError("the digest differs")}
    with pytest.raises(TransferError, match=r"version 0: the digest differs$"):
        made.worker.receive_weights(1, {})


def test_a_worker_leaves_the_group_before_it_joins_another(make_worker):
    made = make_worker()
    made.worker.init_weight_transfer_engine({"master_port": 5})
    assert made.engine.transfers == [
        ("shutdown_weight_transfer_engine", {}),
        ("init_weight_transfer_engine", {"init_info": {"master_port": 5}}),
    ]

"""Real vLLM engines in two Ray processes, fed by a torch model in a third, over gloo.

Its input and output matrices are one; test_families.py publishes models in which they are two.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from distill_system.cluster.liveness import LivenessMonitor
from distill_system.cluster.weight_sync import EveryWorker
from distill_system.cluster.workers import RayWorkers
from distill_system.config.rollout import EngineConfig
from distill_system.errors import (
    DataError,
    DeadlineError,
    DistillError,
    ModelError,
    ResourceError,
    TransferError,
    WorkerError,
)
from distill_system.learner.group import LearnerGroup
from distill_system.learner.rendezvous import find_rendezvous
from distill_system.records import Author, Finish, Prompt, Trajectory, VersionSpan
from distill_system.rollout.environment import engine_environment
from distill_system.rollout.pool import RolloutPool
from distill_system.rollout.sampling import Sampling
from distill_system.rollout.worker import RolloutWorker
from distill_system.weights.client import FanOutClient
from distill_system.weights.publisher import WeightPublisher
from distill_system.weights.rounding import AS_THEY_ARE, WireFormat

EOS = 2
VOCABULARY = 61  # vLLM pads it to 64: the padding must never be sampled
MAX_MODEL_LENGTH = 64
MAX_RESPONSE = 40
GREEDY = Sampling(temperature=0.0, max_response_tokens=MAX_RESPONSE)
WARM = Sampling(temperature=0.7, max_response_tokens=MAX_RESPONSE)
ENGINE = EngineConfig(max_num_sequences=16, kv_cache_mebibytes=16)
REPOSITORY = Path(__file__).parents[2]


def _prompts(count: int = 12) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [
        Prompt(
            prompt_id=f"p{index}",
            token_ids=rng.integers(4, VOCABULARY, rng.integers(2, 20)).astype(np.int32),
            text="",
        )
        for index in range(count)
    ]


class Learner:
    """A torch model that publishes itself, and answers what a rollout worker should have said."""

    def __init__(self, model_folder: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.publisher: Any = None
        self.wire = AS_THEY_ARE
        self.gather_seconds = 0.0
        self.model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
        self.first_weights = [p.detach().clone() for p in self.model.parameters()]

    def address(self) -> tuple[str, int]:
        return find_rendezvous()

    def connect_rollouts(
        self, backend: Any, client: Any, address: str, port: int, count: int, seconds: float
    ) -> None:
        if self.publisher is not None:
            self.publisher.close()
            self.publisher = None
        self.publisher = WeightPublisher(
            self.model,
            backend=backend,
            client=client,
            master_address=address,
            master_port=port,
            num_receivers=count,
            rank=0,
            timeout_seconds=seconds,
            wire=self.wire,
            bucket_bytes=50_000,  # several buckets even for this model
        )

    def perturb(self, seed: int) -> None:
        import torch

        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter, first in zip(self.model.parameters(), self.first_weights, strict=True):
                parameter.copy_(first + torch.randn_like(first) * 0.15)

    def gather_slowly(self, seconds: float) -> None:
        self.gather_seconds = seconds

    def start_publish(self, version: int) -> list[Any]:
        time.sleep(self.gather_seconds)
        return list(self.publisher.start(version))

    def round_from_now_on(self, wire: WireFormat) -> None:
        self.wire = wire

    def embedding(self) -> np.ndarray:
        return np.asarray(self.model.get_input_embeddings().weight.detach())

    def flip_a_bit_of_the_next_version(self) -> None:
        communicator = self.publisher._engine.model_update_group
        honest, calls = communicator.broadcast, []

        def corrupting(tensor: Any, src: int) -> Any:
            calls.append(tensor.clone())
            if len(calls) == 2:
                calls[-1][7] ^= 1
                communicator.broadcast = honest
            return honest(calls[-1], src)

        communicator.broadcast = corrupting

    def break_off_in_the_next_version(self) -> None:
        communicator, calls = self.publisher._engine.model_update_group, []
        honest = communicator.broadcast

        def breaking(tensor: Any, src: int) -> Any:
            calls.append(src)
            if len(calls) == 3:
                raise RuntimeError("the cable is pulled")
            return honest(tensor, src)

        communicator.broadcast = breaking

    def decode_greedily(self, prompts: list[Prompt]) -> list[list[int]]:
        import torch

        answers = []
        for prompt in prompts:
            ids = prompt.token_ids.tolist()
            while len(ids) < prompt.token_ids.size + MAX_RESPONSE and (
                len(ids) == prompt.token_ids.size or ids[-1] != EOS
            ):
                with torch.no_grad():
                    ids.append(int(self.model(torch.tensor([ids])).logits[0, -1].argmax()))
            answers.append(ids[prompt.token_ids.size :])
        return answers

    def logprobs(self, trajectory: Trajectory, temperature: float) -> np.ndarray:
        import torch

        ids = torch.tensor(trajectory.token_ids.tolist())
        with torch.no_grad():
            logits = self.model(ids[None]).logits[0, trajectory.num_prompt_tokens - 1 : -1]
        rows = (logits / temperature).log_softmax(-1)
        response = ids[trajectory.num_prompt_tokens :, None]
        return np.asarray(rows.gather(-1, response)[:, 0])


class SleepingWorker(RolloutWorker):
    def load_as_on_a_gpu(self, *, wanted: bool) -> None:
        """Bucket by bucket, without room for a second model; vLLM's loading is as it is."""
        from distill_system.weights.gloo import GlooWeightTransferEngine

        if wanted:
            setattr(GlooWeightTransferEngine, "is_staged", False)  # noqa: B010  (a property)
        else:
            delattr(GlooWeightTransferEngine, "is_staged")

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def embedding(self) -> np.ndarray:
        """What the engine's own memory holds, without the rows that vLLM pads it with."""
        [model] = self._engine.call_transfer("get_model")
        weights = dict(model.named_parameters())["model.embed_tokens.weight"]
        return np.asarray(weights[:VOCABULARY].detach().float())


def _pool(handles: Sequence[Any]) -> RolloutPool:
    return RolloutPool(RayWorkers("student_rollout", handles, [], call_seconds=60.0))


def _start_worker(folder: Path, *, index: int = 0, engine: EngineConfig = ENGINE) -> Any:
    remote_class = ray.remote(SleepingWorker).options(num_cpus=0)
    return remote_class.remote(
        name=f"student_rollout-{index}",
        model_path=str(folder),
        author=Author.STUDENT,
        engine=engine,
        max_model_length=MAX_MODEL_LENGTH,
        uses_gpu=False,
        weight_transfer_backend="gloo",
    )


class Setting:
    """One learner and two rollout workers of one student."""

    def __init__(self, folder: Path) -> None:
        self.learner = ray.remote(Learner).options(num_cpus=0).remote(str(folder))
        self.workers = [_start_worker(folder, index=index) for index in range(2)]
        ray.get([worker.ready.remote() for worker in self.workers])
        self.monitor = LivenessMonitor(
            {f"student_rollout-{at}": w for at, w in enumerate(self.workers)}
        )
        ranks = RayWorkers("learner", [self.learner], [], call_seconds=60.0, monitor=self.monitor)
        self.group = LearnerGroup(ranks)
        self.connect(self.workers)

    def connect(self, workers: Sequence[Any], *, seconds: float = 20.0) -> None:
        named = {f"student_rollout-{self.workers.index(w)}": w for w in workers}
        client = FanOutClient(EveryWorker(named, seconds=seconds), [1] * len(workers))
        self.group.connect_rollouts("gloo", client, client.num_receivers, seconds)

    def publish(self, version: int) -> Any:
        ray.get(self.learner.perturb.remote(version))
        return self.group.publish(version)

    def versions(self) -> list[int]:
        return list(ray.get([worker.weight_version.remote() for worker in self.workers]))

    def generate_everywhere(self, sampling: Sampling) -> list[list[Trajectory]]:
        calls = [worker.generate.remote(_prompts(), sampling, 0, "x") for worker in self.workers]
        return list(ray.get(calls))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    environment = {**engine_environment(uses_gpu=False), "PYTHONPATH": str(REPOSITORY)}
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": environment},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def setting(cluster: None, tiny_model_folder: Any) -> Any:
    folder = tiny_model_folder(tie_word_embeddings=True, vocab_size=VOCABULARY)
    setting = Setting(folder)
    yield setting
    for handle in [setting.learner, *setting.workers]:
        ray.kill(handle)


def _assert_equals_the_learner(setting: Setting, version: int) -> None:
    prompts = _prompts()
    expected = ray.get(setting.learner.decode_greedily.remote(prompts))
    for trajectories in setting.generate_everywhere(GREEDY):
        assert [trajectory.response_ids.tolist() for trajectory in trajectories] == expected
    for trajectories in setting.generate_everywhere(WARM):
        for trajectory in trajectories:
            span = VersionSpan(version=version, start=0, end=trajectory.num_response_tokens)
            assert trajectory.weight_versions == (span,)
            truth = ray.get(setting.learner.logprobs.remote(trajectory, WARM.temperature))
            np.testing.assert_allclose(trajectory.behaviour_logprobs, truth, atol=1e-4)


def test_every_worker_writes_what_the_learner_would_after_each_publish(setting: Setting) -> None:
    _assert_equals_the_learner(setting, version=0)
    before = ray.get(setting.learner.decode_greedily.remote(_prompts()))
    for version in (1, 2):
        published = setting.publish(version)
        assert (published.version, published.num_bytes > 0) == (version, True)
        _assert_equals_the_learner(setting, version)
    after = ray.get(setting.learner.decode_greedily.remote(_prompts()))
    assert sum(old != new for old, new in zip(before, after, strict=True)) > 6


def test_a_flipped_bit_is_caught_and_the_next_publish_heals(setting: Setting) -> None:
    [version, _] = setting.versions()
    ray.get(setting.learner.flip_a_bit_of_the_next_version.remote())
    with pytest.raises(TransferError, match="digest"):
        setting.publish(version + 1)
    assert setting.versions() == [version, version]
    ray.get(setting.learner.perturb.remote(version))
    _assert_equals_the_learner(setting, version)  # nothing of what came was taken in
    setting.publish(version + 2)
    _assert_equals_the_learner(setting, version + 2)


def test_loaded_bucket_by_bucket_nothing_is_written_after_a_failure_until_a_version_came_whole(
    setting: Setting,
) -> None:
    """Buckets of 50,000 bytes end within vLLM's fused layers, which are loaded in two parts."""
    version, _ = setting.versions()
    workers = setting.workers
    ray.get([worker.load_as_on_a_gpu.remote(wanted=True) for worker in workers])
    setting.publish(version + 1)
    _assert_equals_the_learner(setting, version + 1)
    ray.get(setting.learner.flip_a_bit_of_the_next_version.remote())
    with pytest.raises(TransferError, match="digest"):
        setting.publish(version + 2)
    for worker in workers:
        with pytest.raises(TransferError, match="no whole set of weights"):
            ray.get(worker.generate.remote(_prompts(2), GREEDY, 0, "x"))
    setting.publish(version + 3)
    _assert_equals_the_learner(setting, version + 3)
    ray.get(setting.learner.break_off_in_the_next_version.remote())
    with pytest.raises(TransferError):
        setting.publish(version + 4)
    setting.connect(workers)
    for worker in workers:
        with pytest.raises(TransferError, match="no whole set of weights"):
            ray.get(worker.generate.remote(_prompts(2), GREEDY, 0, "x"))
    setting.publish(version + 5)
    _assert_equals_the_learner(setting, version + 5)
    ray.get([worker.load_as_on_a_gpu.remote(wanted=False) for worker in workers])


def test_an_update_that_failed_in_one_worker_alone_is_replaced_by_the_next(
    setting: Setting,
) -> None:
    version, _ = setting.versions()
    unknown = {"names": ["w"], "dtype_names": [], "shapes": []}
    with pytest.raises(TransferError, match="update_weights failed in student_rollout-0"):
        ray.get(setting.workers[0].receive_weights.remote(version + 1, unknown))
    _assert_equals_the_learner(setting, version)
    setting.publish(version + 1)
    _assert_equals_the_learner(setting, version + 1)


def test_a_step_that_begins_once_the_weights_are_packed_does_not_change_what_arrives(
    setting: Setting,
) -> None:
    version, _ = setting.versions()
    ray.get(setting.learner.perturb.remote(version))
    expected = setting.learner.decode_greedily.remote(_prompts())
    setting.group.start_publish(version + 1)
    step = setting.learner.perturb.remote(99)
    published = setting.group.finish_publish()
    ray.get(step)
    assert published.version == version + 1
    assert setting.versions() == [version + 1] * 2
    for trajectories in setting.generate_everywhere(GREEDY):
        assert [t.response_ids.tolist() for t in trajectories] == ray.get(expected)


def test_workers_come_and_go_between_two_publishes(setting: Setting) -> None:
    version, _ = setting.versions()
    setting.connect(setting.workers[:1])
    alone = setting.publish(version + 1)
    assert setting.versions() == [version + 1, version]
    began = time.perf_counter()
    setting.connect(setting.workers)
    assert time.perf_counter() - began < 15.0
    together = setting.publish(version + 2)
    assert setting.versions() == [version + 2] * 2
    assert (alone.num_bytes, alone.digest) != (together.num_bytes, together.digest)
    _assert_equals_the_learner(setting, version + 2)


def test_a_bfloat16_engine_holds_the_learners_weights_on_average(
    setting: Setting, tiny_model_folder: Any
) -> None:
    import torch

    bfloat16 = ENGINE.model_copy(update={"dtype": "bfloat16"})
    folder = tiny_model_folder(tie_word_embeddings=True, vocab_size=VOCABULARY)
    worker = _start_worker(folder, index=2, engine=bfloat16)
    ray.get(worker.ready.remote())
    wire = WireFormat(dtype=torch.bfloat16, seed=1)
    [version, _] = setting.versions()
    whole = setting.publish(version + 1).num_bytes
    ray.get(setting.learner.round_from_now_on.remote(wire))
    setting.workers.append(worker)
    try:
        setting.connect([worker])
        held = []
        for later in (version + 2, version + 3):
            assert setting.group.publish(later).num_bytes == whole / 2
            held.append(ray.get(worker.embedding.remote()))
        master = ray.get(setting.learner.embedding.remote())
        written = ray.get(worker.generate.remote(_prompts(), WARM, 0, "x"))
    finally:
        setting.workers.remove(worker)
        ray.kill(worker)
        ray.get(setting.learner.round_from_now_on.remote(AS_THEY_ARE))
        setting.connect(setting.workers)
    for weights in held:
        assert (np.abs(weights - master) <= np.abs(master) * 2**-7).all()
        # the sum of as many errors of either sign: about a third of a bfloat16 step each
        assert abs((weights - master).sum()) < 4 * 0.6 * np.abs(master).mean() * 2**-7 * 44.0
    assert (held[0] != held[1]).mean() > 0.2
    truths = [ray.get(setting.learner.logprobs.remote(t, WARM.temperature)) for t in written]
    said = np.concatenate([trajectory.behaviour_logprobs for trajectory in written])
    assert 1e-4 < np.abs(said - np.concatenate(truths)).mean() < 0.1


def test_a_transfer_that_an_engine_holds_up_fails_in_time_and_a_late_rank_is_named(
    setting: Setting,
) -> None:
    version, _ = setting.versions()
    setting.connect(setting.workers, seconds=2.0)
    asleep = setting.workers[1].sleep.remote(4.0)
    with pytest.raises(TransferError, match="student_rollout-"):
        setting.publish(version + 1)
    ray.get(asleep)
    setting.connect(setting.workers, seconds=2.0)
    setting.publish(version + 2)
    assert setting.versions() == [version + 2] * 2
    ray.get(setting.learner.gather_slowly.remote(3.0))
    with pytest.raises(DeadlineError, match=r"gather weight version .* from learner-0:"):
        setting.publish(version + 3)
    ray.get(setting.learner.gather_slowly.remote(0.0))
    setting.publish(version + 4)
    assert setting.versions() == [version + 4] * 2


def test_samples_depend_on_the_seed_and_not_on_who_writes_them(setting: Setting) -> None:
    prompts = _prompts()
    one = _pool(setting.workers[:1]).generate(prompts, WARM, 5, "step-1")
    two = _pool(setting.workers).generate(prompts, WARM, 5, "step-1")
    other = _pool(setting.workers).generate(prompts, WARM, 6, "step-1")
    responses = [[t.response_ids.tolist() for t in many] for many in (one, two, other)]
    assert responses[0] == responses[1]
    assert responses[0] != responses[2]
    assert [t.trajectory_id for t in two] == [f"step-1/student/{p.prompt_id}" for p in prompts]


def test_a_response_keeps_its_end_of_sequence_token_and_nothing_after_it(setting: Setting) -> None:
    trajectories = _pool(setting.workers).generate(_prompts(40), WARM, 1, "eos")
    by_finish = {Finish.STOP: 0, Finish.LENGTH: 0}
    for trajectory in trajectories:
        by_finish[trajectory.finish] += 1
        response = trajectory.response_ids.tolist()
        stopped = trajectory.finish is Finish.STOP
        assert response.count(EOS) == int(stopped)
        assert response[-1] == EOS if stopped else len(response) == MAX_RESPONSE
    assert min(by_finish.values()) > 0


def test_a_prompt_that_does_not_fit_is_refused_with_its_id(setting: Setting) -> None:
    length = MAX_MODEL_LENGTH - MAX_RESPONSE + 1
    long = Prompt(prompt_id="long", token_ids=np.full(length, 5, np.int32), text="")
    with pytest.raises(DataError, match=r"'long'.*25 prompt tokens.*max_response_tokens=40.*64"):
        ray.get(setting.workers[0].generate.remote([*_prompts(2), long], GREEDY, 0, "x"))
    foreign = Prompt(prompt_id="foreign", token_ids=np.array([VOCABULARY], np.int32), text="")
    with pytest.raises(ModelError, match=r"'foreign'.*knows 0 to 60"):
        ray.get(setting.workers[0].generate.remote([foreign], GREEDY, 0, "x"))
    assert len(ray.get(setting.workers[0].generate.remote(_prompts(2), GREEDY, 0, "x"))) == 2


def test_a_dead_worker_ends_a_publish_and_the_others_can_be_connected_anew(
    setting: Setting,
) -> None:
    version, _ = setting.versions()
    dead = setting.workers[1]
    ray.kill(dead)
    with pytest.raises(DistillError, match="student_rollout-1") as caught:
        setting.group.publish(version + 1)
    assert isinstance(caught.value, (WorkerError, TransferError))
    del setting.workers[1]
    setting.monitor.remove(["student_rollout-1"])
    began = time.perf_counter()
    setting.connect(setting.workers)
    assert time.perf_counter() - began < 15.0
    setting.publish(version + 2)
    _assert_equals_the_learner(setting, version + 2)


def test_a_cache_too_small_for_one_sequence_is_named_by_its_key(
    cluster: None, tiny_model_folder: Any
) -> None:
    folder = tiny_model_folder(num_layers=8, hidden_size=256)  # 2 MiB for a block of 128 tokens
    cramped = _start_worker(folder, engine=EngineConfig(kv_cache_mebibytes=1))
    with pytest.raises(ResourceError, match=r"rollout\.student_engine\.kv_cache_mebibytes, now 1"):
        ray.get(cramped.ready.remote())


def test_more_prompt_tokens_than_one_step_reads_are_all_answered(
    cluster: None, tiny_model_folder: Any
) -> None:
    """vLLM 0.32 dies on a CPU where it reads a prompt of a seeded request in two parts."""
    wide = _start_worker(
        tiny_model_folder(), engine=EngineConfig(max_num_sequences=300, kv_cache_mebibytes=64)
    )
    prompts = [
        Prompt(prompt_id=f"p{i}", token_ids=np.full(60, 4 + i % 50, np.int32), text="")
        for i in range(300)
    ]
    sampling = Sampling(temperature=1.0, max_response_tokens=2)
    trajectories = _pool([wide]).generate(prompts, sampling, 0, "wide")
    assert [t.prompt_id for t in trajectories] == [p.prompt_id for p in prompts]

"""The engine's own part, on a stand-in for vLLM that notes down what it is asked and told.

What vLLM itself does with it is tested in tests/pipeline.
"""

from __future__ import annotations

import gc
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from distill_system.config.rollout import EngineConfig
from distill_system.errors import ModelError, ResourceError
from distill_system.rollout import Sampling
from distill_system.rollout.engine import EngineSpecification, build_engine

SAMPLING = Sampling(temperature=0.5, top_p=0.75, max_response_tokens=9)


class Vllm:
    """LLMEngine: a request whose prompt is [n] is done after n steps.

    log: what was asked, in order. seconds: what the clock says; a step takes one.
    """

    def __init__(self):
        self.log, self.seconds, self.failing = [], 100.0, None
        self.requests, self.weight_version = {}, None
        self.num_rows = 80
        self.model_config = SimpleNamespace(get_vocab_size=lambda: self.num_rows)
        self.is_asleep = False

    def from_engine_args(self, arguments, context):
        assert context == "LLM_CLASS"
        if self.failing is not None:
            raise self.failing
        self.seconds += 4.0
        self.arguments, self.collects = arguments, gc.isenabled()
        return self

    def add_request(self, name, prompt, params):
        assert not self.is_asleep, "work for an engine that sleeps"
        self.log.append(("add", name))
        [steps] = prompt["prompt_token_ids"]
        self.requests[name] = SimpleNamespace(left=steps, params=params, versions=[])
        return f"{name}-of-vllm"

    def step(self):
        self.log.append(("step",))
        self.seconds += 1.0
        if self.failing is not None:
            raise self.failing
        for request in self.requests.values():
            request.left -= 1
            request.versions.append(self.weight_version)
        done = [name for name, request in self.requests.items() if request.left == 0]
        return [self._output(name, self.requests.pop(name)) for name in done]

    def _output(self, name, request):
        count = len(request.versions)
        spans = [
            SimpleNamespace(version=version, start=at, end=at + 1)
            for at, version in enumerate(request.versions)
        ]
        # Two log-probabilities a position, as where the sampled token is not the likeliest.
        flat = SimpleNamespace(
            logprobs=[-0.5 * at for at in range(2 * count)],
            start_indices=[2 * at for at in range(count)],
            token_ids=[count, 7] * count,
        )
        completion = SimpleNamespace(
            token_ids=[count] * count, logprobs=flat, finish_reason="stop", weight_versions=spans
        )
        return SimpleNamespace(request_id=name, outputs=[completion])

    def abort_request(self, names, internal):
        assert internal, "by vLLM's own names"
        self.log.append(("abort", list(names)))
        for name in names:
            del self.requests[name.removesuffix("-of-vllm")]

    def has_unfinished_requests(self):
        return bool(self.requests)

    def set_weight_version(self, version):
        self.weight_version = version

    def get_weight_version(self):
        return self.weight_version

    def reset_prefix_cache(self, reset_running_requests):
        self.log.append(("reset", reset_running_requests))

    def collective_rpc(self, method, kwargs):
        return [(method, kwargs)]

    def sleep(self, level):
        self.is_asleep = True

    def wake_up(self):
        self.is_asleep = False


@pytest.fixture
def vllm(monkeypatch):
    """Stands where vLLM is imported from; its clock is the engine's."""
    made = Vllm()
    contents: dict[str, dict[str, object]] = {
        "vllm": {"SamplingParams": SimpleNamespace},
        "vllm.sampling_params": {"RequestOutputKind": SimpleNamespace(FINAL_ONLY="final")},
        "vllm.config": {"WeightTransferConfig": SimpleNamespace},
        "vllm.engine": {},
        "vllm.engine.arg_utils": {"EngineArgs": SimpleNamespace},
        "vllm.transformers_utils": {},
        "vllm.transformers_utils.config": {
            "get_config": lambda path, trust: SimpleNamespace(
                get_text_config=lambda: SimpleNamespace(vocab_size=made.num_rows)
            )
        },
        "vllm.usage": {},
        "vllm.usage.usage_lib": {"UsageContext": SimpleNamespace(LLM_CLASS="LLM_CLASS")},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.llm_engine": {"LLMEngine": made},
    }
    for name, members in contents.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    clock = SimpleNamespace(perf_counter=lambda: made.seconds)
    for name in ("engine", "vllm_engine"):
        monkeypatch.setattr(f"distill_system.rollout.{name}.time", clock)
    yield made
    gc.unfreeze()  # an engine freezes what it imported


@pytest.fixture
def build(vllm):
    def make(*, engine=None, **changes):
        settings = {
            "model_path": "an-organisation/a-model",
            "config": engine or EngineConfig(),
            "config_key": "rollout.student_engine",
            "max_model_length": 16,
            "uses_gpu": False,
            "tensor_parallel_size": 1,
            "weight_transfer_backend": "gloo",
            "trust_remote_code": False,
        }
        return build_engine(EngineSpecification(**{**settings, **changes}))

    return make


def _prompts(*steps):
    return [np.array([count], np.int32) for count in steps]


def _lengths(completions):
    return [completion.token_ids.size for completion in completions]


def test_a_batch_is_queued_whole_and_comes_back_in_its_order(vllm, build):
    engine = build(stop_token_ids=(2, 7))
    vllm.log.clear()
    assert _lengths(engine.complete(_prompts(3, 1, 2), SAMPLING, [11, 12, 13])) == [3, 1, 2]
    assert vllm.log == [("add", "0"), ("add", "1"), ("add", "2")] + [("step",)] * 3
    assert vllm.requests == {}


def test_a_request_is_sampled_as_it_was_asked(vllm, build):
    engine = build(stop_token_ids=(2, 7))
    engine.add("a", *_prompts(5), SAMPLING, 11)
    assert vars(vllm.requests["a"].params) == {
        "temperature": 0.5,
        "top_p": 0.75,
        "top_k": 0,
        "min_p": 0.0,
        "max_tokens": 9,
        "stop_token_ids": [2, 7],
        "seed": 11,
        "logprobs": 0,
        "flat_logprobs": True,
        "detokenize": False,
        "output_kind": "final",
    }


def test_a_response_is_told_in_plain_arrays(build):
    engine = build()
    engine.commit_version(4)
    engine.add("a", *_prompts(3), SAMPLING, 11)
    engine.decode(1.0)
    engine.commit_version(5)
    completion = engine.decode(9.0)["a"]
    assert (completion.token_ids.dtype, completion.token_ids.tolist()) == (np.int32, [3, 3, 3])
    assert completion.logprobs.dtype == np.float32
    assert completion.logprobs.tolist() == [0.0, -1.0, -2.0], "of the sampled tokens alone"
    assert completion.finish_reason == "stop"
    assert completion.version_spans == ((4, 0, 1), (4, 1, 2), (5, 2, 3))


def test_with_top_k_the_tokens_that_were_left_are_told(vllm, build):
    """Each position's sampled token first, then the likeliest, it among them; none is cut: -inf."""
    engine = build()
    narrow = Sampling(temperature=1.0, top_k=3, min_p=0.1, max_response_tokens=9)
    engine.add("a", *_prompts(2), narrow, 11)
    asked = vllm.requests["a"].params
    assert (asked.top_k, asked.min_p, asked.logprobs) == (3, 0.1, 3)
    inf = float("inf")
    flat = SimpleNamespace(
        token_ids=[5, 4, 5, 6, 8, 8, 1, 2],
        logprobs=[-0.9, -0.5, -0.9, -inf, -0.1, -0.1, -2.0, -3.0],
        start_indices=[0, 4],
    )
    vllm._output = lambda name, request: SimpleNamespace(
        request_id=name,
        outputs=[
            SimpleNamespace(
                token_ids=[5, 8], logprobs=flat, finish_reason="stop", weight_versions=[]
            )
        ],
    )
    completion = engine.decode(9.0)["a"]
    assert completion.kept_ids.tolist() == [[5, 4, -1, -1], [8, -1, 1, 2]]
    assert completion.logprobs.tolist() == pytest.approx([-0.9, -0.1])


def test_what_was_added_before_goes_on_beside_a_batch(vllm, build):
    engine = build()
    engine.add("early", *_prompts(2), SAMPLING, 1)
    engine.add("late", *_prompts(9), SAMPLING, 1)
    assert _lengths(engine.complete(_prompts(3), SAMPLING, [2])) == [3]
    finished = engine.decode(1.0)
    assert list(finished) == ["early"]
    assert list(engine.decode(9.0)) == ["late"]
    assert engine.decode(9.0) == {}, "handed out once"


def test_what_is_left_of_a_batch_that_failed_does_not_run_within_the_next(vllm, build):
    engine = build()
    engine.add("other", *_prompts(4), SAMPLING, 1)
    vllm.failing = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.complete(_prompts(3, 1), SAMPLING, [11, 12])
    assert vllm.log[-1] == ("abort", ["0-of-vllm", "1-of-vllm"])
    assert list(vllm.requests) == ["other"]
    vllm.failing = None
    assert _lengths(engine.complete(_prompts(2), SAMPLING, [11])) == [2]
    assert list(engine.decode(9.0)) == ["other"]


def test_dropped_requests_are_forgotten_wherever_they_are(vllm, build):
    engine = build()
    engine.add("under_way", *_prompts(9), SAMPLING, 1)
    engine.add("kept", *_prompts(4), SAMPLING, 1)
    engine.add("finished", *_prompts(1), SAMPLING, 1)
    engine.complete(_prompts(2), SAMPLING, [3])
    engine.drop(["under_way", "finished", "never_there"])
    assert vllm.log[-1] == ("abort", ["under_way-of-vllm"])
    assert list(engine.decode(99.0)) == ["kept"]


@pytest.mark.parametrize(
    ("lengths", "slices"),
    [
        # A step takes a second, a slice three: something is done at 2, so it ends at 3.
        ([2, 9], [["r2"], ["r9"]]),
        # Nothing is done at 3: it goes on until there is something.
        ([5, 9], [["r5"], ["r9"]]),
        # But not beyond twice its time.
        ([7, 9], [[], ["r7", "r9"]]),
    ],
)
def test_a_slice_goes_on_until_something_is_done_but_not_for_ever(vllm, build, lengths, slices):
    engine = build()
    for length in lengths:
        engine.add(f"r{length}", *_prompts(length), SAMPLING, 1)
    began, ends = vllm.seconds, []
    for names in slices:
        assert list(engine.decode(3.0)) == names
        ends.append(vllm.seconds - began)
    assert ends == {2: [3, 9], 5: [5, 9], 7: [6, 9]}[lengths[0]]
    assert engine.decode(3.0) == {}
    assert vllm.seconds - began == 9, "without work no step is taken"


@pytest.mark.parametrize("keeps", [False, True])
def test_new_weights_read_again_what_is_under_way_unless_its_cache_may_be_stale(vllm, build, keeps):
    engine = build(keep_stale_cache=keeps)
    assert engine.version == 0
    engine.commit_version(3)
    assert vllm.log == [("reset", False)] * 2, "nothing was under way"
    engine.add("a", *_prompts(4), SAMPLING, 1)
    engine.commit_version(4)
    assert vllm.log[-1] == ("reset", not keeps)
    assert engine.version == 4


def test_a_transfer_call_goes_to_every_process_of_the_model(build):
    told = build().call_transfer("update_weights", update_info={"names": []})
    assert told == [("update_weights", {"update_info": {"names": []}})]


def test_an_engine_that_may_sleep_sleeps_while_it_has_no_work(vllm, build):
    engine = build(engine=EngineConfig(sleep_when_idle=True), uses_gpu=True)
    assert vllm.arguments.enable_sleep_mode
    assert vllm.is_asleep
    engine.complete(_prompts(2), SAMPLING, [1])
    assert vllm.is_asleep
    engine.add("a", *_prompts(4), SAMPLING, 1)
    assert not vllm.is_asleep
    engine.decode(1.0)
    assert not vllm.is_asleep, "one request is left"
    engine.decode(9.0)
    assert vllm.is_asleep


def test_an_engine_without_a_gpu_gets_a_cache_of_a_size_and_no_compiler(vllm, build):
    build()
    arguments = vllm.arguments
    assert arguments.kv_cache_memory_bytes == 256 * 2**20
    assert arguments.enforce_eager
    assert arguments.enable_chunked_prefill is False
    assert arguments.distributed_executor_backend == "uni"
    assert arguments.weight_transfer_config.backend == "gloo"
    assert arguments.worker_extension_cls == "distill_system.weights.backends.ReceivesWeights"
    assert arguments.logits_processors is None
    assert (arguments.seed, arguments.logprobs_mode) == (0, "processed_logprobs")
    assert (arguments.max_model_len, arguments.model) == (16, "an-organisation/a-model")
    assert (arguments.trust_remote_code, arguments.enable_sleep_mode) == (False, False)
    assert (arguments.disable_log_stats, arguments.use_tqdm_on_load) == (True, False)


def test_an_engine_on_gpus_is_as_its_configuration_says(vllm, build):
    config = EngineConfig(
        dtype="bfloat16",
        max_num_sequences=7,
        gpu_memory_utilization=0.25,
        enable_prefix_caching=False,
    )
    build(
        engine=config,
        uses_gpu=True,
        tensor_parallel_size=2,
        weight_transfer_backend="nccl",
        trust_remote_code=True,
    )
    arguments = vllm.arguments
    assert arguments.kv_cache_memory_bytes is None
    assert not arguments.enforce_eager
    assert arguments.enable_chunked_prefill is None
    assert (arguments.tensor_parallel_size, arguments.distributed_executor_backend) == (2, "mp")
    assert arguments.weight_transfer_config.backend == "sealed_nccl"
    assert (arguments.dtype, arguments.max_num_seqs) == ("bfloat16", 7)
    assert arguments.gpu_memory_utilization == 0.25
    assert (arguments.enable_prefix_caching, arguments.trust_remote_code) == (False, True)
    build(engine=EngineConfig(kv_cache_mebibytes=3, enforce_eager=True), uses_gpu=True)
    assert vllm.arguments.kv_cache_memory_bytes == 3 * 2**20
    assert vllm.arguments.enforce_eager


def test_an_engine_says_how_long_it_took_to_build(build):
    engine = build()
    assert (engine.import_seconds, engine.start_seconds) == (0.0, 4.0)


def test_a_model_that_never_changes_receives_no_weights(vllm, build):
    build(weight_transfer_backend=None)
    assert vllm.arguments.weight_transfer_config is None
    assert vllm.arguments.worker_extension_cls == ""


@pytest.mark.parametrize(("tokens", "is_padded"), [(None, False), (80, False), (64, True)])
def test_rows_behind_the_tokens_are_masked_where_there_are_any(vllm, build, tokens, is_padded):
    engine = build(vocabulary_size=tokens)
    assert engine.vocabulary_size == (tokens or 80)
    masks = ["distill_system.rollout.padding_mask:PaddingMask"] if is_padded else None
    assert vllm.arguments.logits_processors == masks
    assert vllm.arguments.additional_config == {"vocabulary_size": tokens}


@pytest.mark.parametrize("collects", [True, False])
@pytest.mark.parametrize("failing", [None, RuntimeError("no weights")])
def test_garbage_is_collected_again_once_the_engine_stands_or_has_failed(
    vllm, build, collects, failing
):
    was_enabled = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    vllm.failing = failing
    try:
        if failing is None:
            build()
            assert not vllm.collects, "not while it is built"
        else:
            with pytest.raises(ModelError, match=r"an-organisation/a-model.*no weights"):
                build()
        assert gc.isenabled() == collects
    finally:
        (gc.enable if was_enabled else gc.disable)()


def test_a_cache_that_is_too_small_is_told_with_its_size(vllm, build):
    vllm.failing = ValueError("No available memory for the cache blocks")
    with pytest.raises(ResourceError, match=r"raise rollout\.student_engine\.kv_cache_meb.* now 5"):
        build(engine=EngineConfig(kv_cache_mebibytes=5))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("{here}", r"which it does not hold"),
        ("{here}/missing", r"found no such folder"),
        ("./missing", r"found no such folder"),
    ],
)
def test_a_path_without_a_model_is_told_before_vllm_is_asked(vllm, build, tmp_path, path, said):
    vllm.failing = AssertionError("vLLM was asked")
    with pytest.raises(ModelError, match=rf"config\.json, {said}"):
        build(model_path=path.format(here=tmp_path))


def test_a_folder_that_holds_a_model_is_loaded(vllm, build, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    build(model_path=str(tmp_path))
    assert vllm.arguments.model == str(tmp_path)

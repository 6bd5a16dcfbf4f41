"""The learner's end with a communicator that only records."""

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from distill_system.errors import TransferError
from distill_system.weights.buckets import ParameterMetadata
from distill_system.weights.publisher import WeightPublisher
from distill_system.weights.rounding import AS_THEY_ARE, WireFormat
from distill_system.weights.sender import GlooSender


class Group:
    """A communicator whose broadcasts arrive when the test lets them, or fail."""

    def __init__(self) -> None:
        self.sent: list[torch.Tensor] = []
        self.error: Exception | None = None
        self.may_send = threading.Event()
        self.may_send.set()
        self.is_open = True

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        assert src == 0
        assert self.may_send.wait(timeout=20), "the test never let the broadcast go"
        if self.error is not None:
            raise self.error
        self.sent.append(tensor.clone())

    def destroy(self) -> None:
        self.is_open = False


class Client:
    """Rollout workers that say yes to everything."""

    def __init__(self) -> None:
        self.versions: list[int] = []
        self.updates: list[dict[str, Any]] = []

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        raise AssertionError("the group of these tests is open already")

    def start_receiving(self, version: int, update_info: dict[str, Any]) -> list[str]:
        self.versions.append(version)
        self.updates.append(update_info)
        return [f"version {version}"]


class Trial:
    """A publisher of two small parameters, its group and its workers."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        rank: int = 0,
        wire: WireFormat = AS_THEY_ARE,
    ) -> None:
        self.group, self.client = Group(), Client()
        self.model = nn.Linear(3, 2)
        self.asked: dict[str, Any] = {}

        def open_group(**asked: Any) -> GlooSender:
            self.asked = asked
            sender = GlooSender()
            sender.model_update_group = self.group
            return sender

        monkeypatch.setattr(GlooSender, "open", open_group)
        self.publisher = WeightPublisher(
            self.model,
            backend="gloo",
            client=self.client,
            master_address="127.0.0.1",
            master_port=1,
            num_receivers=3,
            rank=rank,
            timeout_seconds=10.0,
            wire=wire,
            bucket_bytes=24,
        )

    def finish_sending(self) -> None:
        """Wait for the thread that sends, whatever became of it."""
        [thread] = [t for t in threading.enumerate() if t.name == "weight transfer"] or [None]
        if thread is not None:
            thread.join(timeout=20)


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> Trial:
    return Trial(monkeypatch)


def _as_bytes(*tensors: torch.Tensor) -> list[int]:
    flat = [tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    return torch.cat(flat).tolist()


def test_what_is_sent_are_the_parameters_as_they_were_at_the_start(trial: Trial) -> None:
    trial.group.may_send.clear()
    expected = _as_bytes(*trial.model.parameters())
    assert trial.publisher.start(4) == ["version 4"]
    with torch.no_grad():
        trial.model.weight.zero_()  # the next optimizer step
    trial.group.may_send.set()
    trial.finish_sending()
    *buckets, seal = trial.group.sent
    assert [bucket.numel() for bucket in buckets] == [24, 8]
    assert _as_bytes(*buckets) == expected
    assert seal[0] == 32
    assert trial.client.updates == [
        {
            "names": ["weight", "bias"],
            "dtype_names": ["float32", "float32"],
            "shapes": [[2, 3], [2]],
        }
    ]


@pytest.mark.parametrize("seed", [None, 5])
def test_a_lower_precisions_weights_are_rounded_before_they_are_sent(
    monkeypatch: pytest.MonkeyPatch, seed: int | None
) -> None:
    """Half the bytes; what is rounded at random is another draw in each version."""
    torch.manual_seed(0)
    trial = Trial(monkeypatch, wire=WireFormat(dtype=torch.bfloat16, seed=seed))
    sent = []
    for version in range(1, 7):
        trial.publisher.start(version)
        trial.finish_sending()
        *buckets, seal = trial.group.sent[-2:]
        assert seal[0] == 2 * 8
        sent.append(torch.cat(buckets).view(torch.bfloat16).float())
    assert trial.client.updates[0]["dtype_names"] == ["bfloat16", "bfloat16"]
    parameters = torch.cat([p.detach().view(-1) for p in trial.model.parameters()])
    nearest = parameters.bfloat16().float()
    for arrived in sent:
        assert ((arrived - parameters).abs() <= parameters.abs() * 2**-7).all()
        assert torch.equal(arrived, nearest) is (seed is None)
    assert all(torch.equal(sent[0], other) for other in sent) is (seed is None)


def test_the_group_has_a_place_for_every_receiver_and_the_time_it_may_take(trial: Trial) -> None:
    assert trial.asked == {
        "client": trial.client,
        "address": "127.0.0.1",
        "port": 1,
        "world_size": 4,
        "bucket_bytes": 24,
        "timeout_seconds": 10.0,
    }


def test_a_second_publish_sends_what_the_parameters_are_then(trial: Trial) -> None:
    trial.publisher.start(1)
    trial.finish_sending()
    with torch.no_grad():
        trial.model.bias.fill_(7.0)
    trial.publisher.start(2)
    trial.finish_sending()
    assert trial.client.versions == [1, 2]
    assert trial.group.sent[1].view(torch.float32).tolist() != [7.0, 7.0]
    assert trial.group.sent[4].view(torch.float32).tolist() == [7.0, 7.0]


def test_a_second_publish_raises_the_first_ones_error_and_calls_nobody(trial: Trial) -> None:
    trial.group.error = RuntimeError("connection closed by peer")
    trial.publisher.start(1)
    with pytest.raises(TransferError, match=r"version 2 failed \(3 receivers\).*closed by peer"):
        trial.publisher.start(2)
    assert trial.client.versions == [1]


def test_a_transfer_that_fails_leaves_the_group_so_that_no_receiver_waits(trial: Trial) -> None:
    trial.group.error = RuntimeError("connection closed by peer")
    trial.publisher.start(1)
    trial.finish_sending()
    assert trial.publisher._engine.model_update_group is None
    trial.publisher.close()
    trial.publisher.start(2)
    with pytest.raises(TransferError, match="the transfer group is closed"):
        trial.publisher.start(3)


def test_a_second_publish_waits_until_the_first_is_sent(trial: Trial) -> None:
    trial.group.may_send.clear()
    trial.publisher.start(1)
    second = threading.Thread(target=trial.publisher.start, args=(2,), daemon=True)
    second.start()
    second.join(timeout=0.2)
    assert second.is_alive()
    assert trial.client.versions == [1], "its bytes would overwrite those under way"
    trial.group.may_send.set()
    second.join(timeout=20)
    assert trial.client.versions == [1, 2]


def test_closing_lets_what_is_being_sent_arrive(trial: Trial) -> None:
    trial.group.may_send.clear()
    trial.publisher.start(1)
    closing = threading.Thread(target=trial.publisher.close, daemon=True)
    closing.start()
    closing.join(timeout=0.2)
    assert closing.is_alive()
    trial.group.may_send.set()
    closing.join(timeout=20)
    assert len(trial.group.sent) == 3, "two buckets and the seal"
    assert trial.publisher._engine.model_update_group is None


def test_another_rank_joins_in_gathering_waits_for_rank_0_and_sends_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []

    class Sharded:
        """Tells when it is gathered."""

        def metadata(self) -> list[Any]:
            return []

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            for at in range(3):
                seen.append("gathered")
                yield f"w{at}", torch.ones(1)

    trial = Trial(monkeypatch, rank=1)
    stream = SimpleNamespace(synchronize=lambda: seen.append("read"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    trial.publisher._source = Sharded()
    assert trial.asked == {}, "it opens no group"
    assert trial.publisher.start(1) == []
    assert seen == ["gathered"] * 3 + ["read"], "rank 0 has read it before it may change"
    assert trial.client.versions == []
    assert trial.group.sent == []


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ({"w": torch.ones(2), "b": torch.ones(3)}, r"told \('b', torch.float32, \(2,\)\), got"),
        ({"w": torch.ones(2), "b": torch.ones(2).half()}, r"got \('b', torch.float16"),
        ({"b": torch.ones(2), "w": torch.ones(2)}, r"told \('w'.*got \('b'"),
        ({"w": torch.ones(2)}, r"told \('b'.*got \('nothing'"),
        ({"w": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)}, r"none behind, got 'c'"),
    ],
)
def test_tensors_that_are_not_what_receivers_are_told_are_not_sent(
    trial: Trial, sent: dict[str, torch.Tensor], said: str
) -> None:
    class Source:
        """Says w and b of two numbers each."""

        def metadata(self) -> list[ParameterMetadata]:
            return [ParameterMetadata(name, torch.float32, (2,)) for name in "wb"]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return iter(sent.items())

    trial.publisher._source = Source()
    with pytest.raises(TransferError, match=said):
        trial.publisher.start(1)
    assert trial.client.versions == []


def test_over_nccl_vllms_own_group_is_asked_for_and_receivers_are_told_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("vllm")
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    seen: list[Any] = []
    told: list[dict[str, Any]] = []

    def trainer_init(info: Any, *, client: Any, source: Any) -> None:
        seen.append(info)
        client.init_weight_transfer_engine({"master_port": 1})

    monkeypatch.setattr(WeightTransferTrainerFactory, "trainer_init", trainer_init)
    monkeypatch.setattr(Client, "init_weight_transfer_engine", lambda _, info: told.append(info))
    WeightPublisher(
        nn.Linear(3, 2),
        backend="nccl",
        client=Client(),
        master_address="127.0.0.1",
        master_port=1,
        num_receivers=3,
        rank=1,
        timeout_seconds=10.0,
        bucket_bytes=24,
    )
    [asked] = seen
    assert type(asked) is NCCLTrainerInitInfo
    assert (asked.world_size, asked.rank, asked.packed_buffer_size_bytes) == (4, 1, 24)
    assert told == [{"master_port": 1, "timeout_seconds": 10.0}]

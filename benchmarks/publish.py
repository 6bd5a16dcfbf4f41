"""Weight publish against the link's own limit: how fast a new version reaches a rollout engine.

One process holds a random Llama-shaped model of float32 and publishes it by the learner's own
publisher; another holds a real vLLM engine on it. The limit is one gloo broadcast of as many bytes
(512 MiB at most), in one buffer that both have touched, between the same two processes, measured in
turn with the publishes. Sizes whose engine does not fit beside the rest are received and verified,
not loaded:
their column `engine` says none.

    python benchmarks/publish.py [--sizes 3M 30M 125M 350M 1B] [--repeats 5]

pack: parameters gathered and copied into buckets; the learner waits for this alone. send: all bytes
and their seal sent, the receiver verifying beside. load: from there until the engine writes with
them. Medians. share: the link's time over the whole publish's; before load: over pack and send. The
headlines are those of the largest size with an engine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

SEED = 0
SHAPES: dict[str, dict[str, int]] = {
    "3M": {"hidden": 192, "layers": 6, "heads": 3, "inner": 512, "vocabulary": 2048},
    "30M": {"hidden": 512, "layers": 8, "heads": 8, "inner": 1376, "vocabulary": 8192},
    "125M": {"hidden": 768, "layers": 12, "heads": 12, "inner": 2048, "vocabulary": 50304},
    "350M": {"hidden": 1024, "layers": 24, "heads": 16, "inner": 2816, "vocabulary": 32000},
    "1B": {"hidden": 2048, "layers": 16, "heads": 32, "inner": 5632, "vocabulary": 65536},
}
QUICKSTART = Path(__file__).parents[1] / "configs/quickstart.yaml"
WITHOUT_ENGINE = ("1B",)
SECONDS = 300.0
MOST_LINK_BYTES = 512 << 20


class Link:
    """Mixed into receivers: the raw broadcast that a publish is compared with."""

    _link: Any = None

    def join_link(self, address: str, port: int, num_bytes: int) -> None:
        import torch

        from distill_system.weights.communicator import GlooCommunicator

        self._link = GlooCommunicator(
            address=address, port=port, rank=1, world_size=2, timeout_seconds=SECONDS
        )
        self._room = torch.ones(num_bytes, dtype=torch.uint8)

    def receive_raw(self) -> None:
        self._link.broadcast(self._room, src=0).wait()


class EngineLess(Link):
    """Receives and verifies as an engine does, and loads nothing."""

    room: Any = None

    def ready(self) -> None:
        import torch

        torch.set_num_threads(1)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        from distill_system.weights.communicator import GlooCommunicator

        self.bucket_bytes = init_info["packed_buffer_size_bytes"]
        self.group = GlooCommunicator(
            address=init_info["master_address"],
            port=init_info["master_port"],
            rank=init_info["rank_offset"],
            world_size=init_info["world_size"],
            timeout_seconds=SECONDS,
        )

    def receive_weights(self, version: int, update_info: dict[str, Any]) -> Any:
        import torch

        from distill_system.records import WeightVersion
        from distill_system.weights.buckets import Buckets, read_parameters
        from distill_system.weights.transport import broadcast_buckets, check_seal

        cpu = torch.device("cpu")
        parameters = read_parameters(update_info)
        if self.room is None:
            self.room = Buckets(parameters, bucket_bytes=self.bucket_bytes, device=cpu)
        seal = broadcast_buckets(self.group, self.room.buffers)
        check_seal(self.group, seal, cpu)
        return WeightVersion(
            version=version, num_bytes=seal.num_bytes, digest=seal.digest, seconds=0.0
        )


def build_model(size: str) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES[size]
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape["vocabulary"],
            hidden_size=shape["hidden"],
            intermediate_size=shape["inner"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["heads"],
            max_position_embeddings=256,
            tie_word_embeddings=True,
        )
    ).eval()


def start_receiver(size: str, model: Any, folder: Path) -> Any:
    import ray

    from distill_system.config import load_config
    from distill_system.config.rollout import EngineConfig
    from distill_system.data import build_tokenizer
    from distill_system.records import Author
    from distill_system.rollout.worker import RolloutWorker

    class LinkedWorker(Link, RolloutWorker):
        pass

    options: dict[str, Any] = {"num_cpus": 0}
    if size in WITHOUT_ENGINE:
        return ray.remote(EngineLess).options(**options).remote()
    model.save_pretrained(folder)
    build_tokenizer(load_config([QUICKSTART]), None).save_pretrained(folder)  # vLLM wants one
    return (
        ray.remote(LinkedWorker)
        .options(**options)
        .remote(
            name="student_rollout-0",
            model_path=str(folder),
            author=Author.STUDENT,
            engine=EngineConfig(max_num_sequences=8, kv_cache_mebibytes=64),
            max_model_length=64,
            uses_gpu=False,
            weight_transfer_backend="gloo",
        )
    )


class RawLink:
    """The sender's side of the raw broadcast."""

    def __init__(self, receiver: Any, num_bytes: int) -> None:
        import ray
        import torch

        from distill_system.learner.rendezvous import find_rendezvous
        from distill_system.weights.communicator import GlooCommunicator
        from distill_system.weights.meeting import open_store

        self.receiver, self.buffer = receiver, torch.ones(num_bytes, dtype=torch.uint8)
        address, port = find_rendezvous()
        self.store = open_store(address=address, port=port, timeout_seconds=SECONDS)
        joining = receiver.join_link.remote(address, port, num_bytes)
        self.group = GlooCommunicator(
            address=address, port=port, rank=0, world_size=2, timeout_seconds=SECONDS
        )
        ray.get(joining)

    def seconds(self) -> float:
        import ray

        receiving = self.receiver.receive_raw.remote()
        time.sleep(0.05)  # the receiver waits by now: its call is not the link's
        began = time.perf_counter()
        self.group.broadcast(self.buffer, src=0).wait()
        ray.get(receiving)
        return time.perf_counter() - began


def measure(size: str, repeats: int) -> dict[str, object]:
    import ray

    from distill_system.cluster.weight_sync import EveryWorker
    from distill_system.learner.rendezvous import find_rendezvous
    from distill_system.weights import FanOutClient, WeightPublisher

    model = build_model(size)
    with tempfile.TemporaryDirectory() as folder:
        receiver = start_receiver(size, model, Path(folder))
        ray.get(receiver.ready.remote())
    client = FanOutClient(EveryWorker({"student_rollout-0": receiver}, seconds=SECONDS), [1])
    address, port = find_rendezvous()
    publisher = WeightPublisher(
        model,
        backend="gloo",
        client=client,
        master_address=address,
        master_port=port,
        num_receivers=1,
        rank=0,
        timeout_seconds=SECONDS,
    )
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    link_bytes = min(num_bytes, MOST_LINK_BYTES)
    link = RawLink(receiver, link_bytes)
    times: dict[str, list[float]] = {name: [] for name in ("link", "pack", "send", "whole")}
    for version in range(1 + repeats):
        link_seconds = link.seconds() * num_bytes / link_bytes
        began = time.perf_counter()
        receiving = publisher.start(version)
        packed = time.perf_counter() - began
        publisher._sending.result()
        sent = time.perf_counter() - began
        [received] = ray.get(receiving)
        whole = time.perf_counter() - began
        assert received.num_bytes == num_bytes
        if version:  # the first one makes memory and connections
            for name, value in zip(
                times, (link_seconds, packed, sent - packed, whole), strict=True
            ):
                times[name].append(value)
    publisher.close()
    ray.kill(receiver)
    middle = {name: statistics.median(values) for name, values in times.items()}
    load = max(0.0, middle["whole"] - middle["pack"] - middle["send"])
    return {
        "size": size,
        "engine": "none" if size in WITHOUT_ENGINE else "vLLM",
        "MiB": round(num_bytes / 2**20),
        "link GB/s": num_bytes / middle["link"] / 1e9,
        "pack ms": 1e3 * middle["pack"],
        "send ms": 1e3 * middle["send"],
        "load ms": 1e3 * load,
        "whole ms": 1e3 * middle["whole"],
        "share": middle["link"] / middle["whole"],
        "before load": middle["link"] / (middle["pack"] + middle["send"]),
    }


def main() -> None:
    """Measure the sizes and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    from distill_system.rollout.environment import engine_environment

    repository = str(Path(__file__).parents[1])
    environment = {**engine_environment(uses_gpu=False), "PYTHONPATH": repository}
    os.environ.update(environment)
    import ray
    import torch
    from record import write_result

    torch.set_num_threads(1)
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": environment},
    )
    rows = [measure(size, arguments.repeats) for size in arguments.sizes]
    ray.shutdown()
    largest = [row for row in rows if row["engine"] == "vLLM"][-1]
    write_result(
        "publish",
        rows,
        {
            "publish_share_of_link": float(str(largest["share"])),
            "publish_share_of_link_before_load": float(str(largest["before load"])),
        },
        seeds={"model": SEED},
    )


if __name__ == "__main__":
    main()

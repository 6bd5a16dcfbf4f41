"""A torch process group of forked processes, for code that needs ranks and no learner."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

TIMEOUT = timedelta(seconds=60)


def run_ranks(
    count: int, meeting: Path, main: Callable[..., Any], *arguments: Any
) -> dict[int, Any]:
    """Run main(rank, *arguments) in `count` processes that form a gloo group; answers by rank.

    meeting: a file that does not exist yet, where they find one another.
    """
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def rank_main(rank: int) -> None:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=count, timeout=TIMEOUT
        )
        answers.put((rank, main(rank, *arguments)))
        if dist.is_initialized():  # main may have left it
            dist.destroy_process_group()

    processes = [context.Process(target=rank_main, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return dict(answers.get() for _ in range(count))

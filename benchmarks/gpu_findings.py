"""What a proof on a GPU finds: numbers, demands that hold or do not, and how both are measured.

It runs on a CPU as well, with sizes of its own: the clock is then the wall's, and memory and the
names of kernels are left out.
"""

from __future__ import annotations

import gc
import inspect
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from distill_system.language_model import packed_attention

MIB, GIB = 2**20, 2**30
H100_FLOPS = 989.4e12
"""bfloat16 operations per second of an H100 SXM without sparsity, by its data sheet."""
LAST_LINES = 6
"""Of a traceback, in a report."""


class Findings:
    """One proof's numbers and demands, told to `tell` whenever they change.

    device: where the proof runs. small: whether it runs in its small form.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        small: bool,
        tell: Callable[[dict[str, Any]], None] = lambda told: None,
    ) -> None:
        self.device, self.small, self._tell = device, small, tell
        self.numbers: dict[str, Any] = {}
        self.demands: list[dict[str, Any]] = []

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def note(self, name: str, value: Any) -> None:
        """Write a number down."""
        self.numbers[name] = value
        self._report()

    def demand(
        self,
        what: str,
        value: float,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        is_aim: bool = False,
    ) -> None:
        """What must hold of a number; a NaN does not. is_aim: what is wished, not proven."""
        limits = (at_most, at_least)
        assert any(limit is not None for limit in limits), "a demand has a limit"
        holds = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
        self.demands.append(
            {
                "what": what,
                "value": float(value),
                "at_most": at_most,
                "at_least": at_least,
                "is_aim": is_aim,
                "holds": bool(holds),
            }
        )
        self._report()

    def require(self, what: str, holds: bool) -> None:
        """What must be so."""
        self.demand(what, float(holds), at_least=1.0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of the proof whose failure does not cost the others."""
        started = time.perf_counter()
        try:
            yield
        except Exception:
            lines = traceback.format_exc().strip().splitlines()[-LAST_LINES:]
            self.demands.append({"what": name, "is_aim": False, "holds": False, "problem": lines})
        finally:
            self.release()
            seconds = self.numbers.setdefault("seconds_of_parts", {})
            seconds[name] = time.perf_counter() - started
            self._report()

    def release(self) -> None:
        """Give back what nothing holds any more."""
        if self.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()

    def synchronise(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def time(self, function: Callable[[], Any], *, repeats: int, warm_up: int = 1) -> float:
        """Median milliseconds of a call, the device's work included."""
        for _ in range(warm_up):
            function()
        times = []
        for _ in range(repeats):
            self.synchronise()
            started = time.perf_counter()
            function()
            self.synchronise()
            times.append(time.perf_counter() - started)
        return 1e3 * statistics.median(times)

    def peak_mib(self, function: Callable[[], Any]) -> float | None:
        """The most that a call holds above what was held before; None on a CPU."""
        if not self.on_gpu:
            function()
            return None
        self.synchronise()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        function()
        self.synchronise()
        return (torch.cuda.max_memory_allocated(self.device) - before) / MIB

    def kernels(self, function: Callable[[], Any], *, count: int) -> dict[str, float] | None:
        """Milliseconds of a call's kernels by name, the longest first; None on a CPU."""
        if not self.on_gpu:
            return None
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            function()
            self.synchronise()
        times = Counter[str]()
        for event in profile.key_averages():
            times[_short(event.key)] += event.self_device_time_total / 1e3
        return {"all": times.total()} | dict(times.most_common(count))

    def _report(self) -> None:
        self._tell({"numbers": self.numbers, "demands": self.demands})


def _short(kernel: str) -> str:
    """A kernel's name without what all have; different ones may get one name."""
    for part in ("void ", "at::native::", "(anonymous namespace)::", "std::"):
        kernel = kernel.replace(part, "")
    return kernel[:120]


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Length of the difference over the expected's length, in float64."""
    expected = expected.double()
    return float(((value.double() - expected).norm() / expected.norm()).detach())


def adapt_to_older_torch() -> str | None:
    """Let packed attention run on a torch before 2.12, whose varlen_attn lacks enable_gqa.

    Returns: what was done, for the report; None if nothing was needed.
    """
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        return None

    def attend(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **keywords: Any) -> Any:
        del keywords["enable_gqa"]
        group = query.shape[1] // key.shape[1]
        if group > 1:
            key, value = (heads.repeat_interleave(group, dim=1) for heads in (key, value))
        return varlen_attn(query, key, value, *rest, **keywords)

    packed_attention.varlen_attn = attend
    return (
        f"varlen_attn of torch {torch.__version__} has no keyword enable_gqa (it came with 2.12): "
        "called without it, key and value heads repeated"
    )


def count_synchronisations(function: Callable[[], Any]) -> dict[str, int]:
    """Where a call makes the host wait for the GPU: 'file:line' -> how often."""
    import warnings

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchroniz" in str(w.message)]
    places = Counter("/".join(w.filename.split("/")[-2:]) + f":{w.lineno}" for w in waits)
    return dict(places.most_common())

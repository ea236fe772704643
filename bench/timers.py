"""How long one call takes: the wall clock on a CPU, events around a captured graph on a GPU."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timed:
    """What a turn runs: ``run`` does the work of ``batch`` calls; ``note`` says where it is not timed as the rest."""

    run: Call
    batch: int = 1
    note: str | None = None


class Timer(Protocol):
    name: str
    rotation_bytes: int  # operands are rotated over this much memory, so that no call finds its own in the cache

    def scope(self) -> AbstractContextManager[None]:
        """Everything that belongs to a cell, its operands included, is made and timed inside."""
        ...

    def prepare(self, calls: Sequence[Call], captured: bool = True) -> Timed:
        """``captured``: in a graph, where the device has such, as in a server; else launched as in a training loop."""
        ...

    def time(self, timed: Timed) -> float:
        """Seconds a call."""
        ...

    def peak(self, call: Call) -> int:
        """Bytes of memory that a call takes at most, beside what was taken before it."""
        ...


class CpuTimer:
    """The wall clock around one call."""

    name = "perf_counter"
    rotation_bytes = 0

    def scope(self) -> AbstractContextManager[None]:
        return nullcontext()

    def prepare(self, calls: Sequence[Call], captured: bool = True) -> Timed:
        return Timed(calls[0])

    def time(self, timed: Timed) -> float:
        start = time.perf_counter()
        timed.run()
        return (time.perf_counter() - start) / timed.batch

    def peak(self, call: Call) -> int:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is freed but not given back would be taken again unseen
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = _status("VmRSS")
        call()
        return max(_status("VmHWM") - before, 0)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


class CudaTimer:
    """CUDA events around the replay of a graph that holds one call on each copy of the operands.

    A call that cannot be captured is run as it is between the events; its launches then count in full, and its note
    says so.
    """

    name = "cuda graph"
    WARM_UPS = 3
    LEAD_READS = 2

    def __init__(self) -> None:
        self.rotation_bytes = 4 * torch.cuda.get_device_properties().L2_cache_size
        self._stream = torch.cuda.Stream()
        self._lead = torch.zeros(self.rotation_bytes, dtype=torch.uint8, device="cuda").view(torch.float32)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """The one stream that is timed and captured.

        Autograd runs a backward on the stream of its forward: a graph captured on another stream would miss it.
        """
        outside = torch.cuda.current_stream()
        self._stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            outside.wait_stream(self._stream)

    def prepare(self, calls: Sequence[Call], captured: bool = True) -> Timed:
        def run() -> list[Any]:
            # all results live at once: freed one by one, each would be written where the last one still is in the cache
            return [call() for call in calls]

        for _ in range(self.WARM_UPS):
            run()
        torch.cuda.synchronize()
        if not captured:
            return Timed(run, len(calls))
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                run()
        except RuntimeError as error:
            torch.cuda.synchronize()
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            return Timed(run, len(calls), f"launched call by call, since it cannot be captured: {reason}")
        return Timed(graph.replay, len(calls))

    def time(self, timed: Timed) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        # On an idle device the first event would pass before the graph is submitted, and the submission be timed as
        # work. Reads keep it busy meanwhile; unlike writes they leave nothing in the cache to be written back later.
        for _ in range(self.LEAD_READS):
            self._lead.sum()
        start.record()
        timed.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / timed.batch

    def peak(self, call: Call) -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def timer_for(device: str) -> Timer:
    """The timer of ``"cpu"`` or ``"cuda"``."""
    return CpuTimer() if device == "cpu" else CudaTimer()

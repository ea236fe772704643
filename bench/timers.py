"""How long one call takes: the wall clock on a CPU, events around a captured graph on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timed:
    """What a turn runs: ``run`` does the work of ``batch`` calls."""

    run: Call
    batch: int = 1


class Timer(Protocol):
    name: str
    rotation_bytes: int  # operands are rotated over this much memory, so that no call finds its own in the cache

    def prepare(self, calls: Sequence[Call]) -> Timed: ...

    def time(self, timed: Timed) -> float:
        """Seconds a call."""
        ...


class CpuTimer:
    """The wall clock around one call."""

    name = "perf_counter"
    rotation_bytes = 0

    def prepare(self, calls: Sequence[Call]) -> Timed:
        return Timed(calls[0])

    def time(self, timed: Timed) -> float:
        start = time.perf_counter()
        timed.run()
        return (time.perf_counter() - start) / timed.batch


class CudaTimer:
    """CUDA events around the replay of a graph that holds one call on each copy of the operands.

    A call that cannot be captured is run as it is between the events; its launches then count in full.
    """

    name = "cuda graph"

    def __init__(self) -> None:
        self.rotation_bytes = 4 * torch.cuda.get_device_properties().L2_cache_size

    def prepare(self, calls: Sequence[Call]) -> Timed:
        def run() -> None:
            for call in calls:
                call()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
        except RuntimeError:
            torch.cuda.synchronize()
            return Timed(run, len(calls))
        return Timed(graph.replay, len(calls))

    def time(self, timed: Timed) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        timed.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / timed.batch


def timer_for(device: str) -> Timer:
    """The timer of ``"cpu"`` or ``"cuda"``."""
    return CpuTimer() if device == "cpu" else CudaTimer()

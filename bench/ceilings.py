"""What the device itself can do, measured in the same run: every result is given as a share of the floor it sets."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.links import link
from bench.timers import Call, CpuTimer, Timer

REPETITIONS = 10
PAGE = 4 << 20  # bytes, of those that are moved to measure what pages go over


@dataclass(frozen=True)
class Ceilings:
    """Bandwidth of a large copy, bytes read and written, and the speed of a large matrix product; for what is paged,
    the bandwidth each way, both ways at once, between device and page-locked memory (on a CPU: memory and a file), and
    that of a large copy in the host's memory.
    """

    copy_gb_s: float
    matmul_tflop_s: float
    matmul_dtype: str
    link_gb_s: float
    host_copy_gb_s: float

    def floor(self, nbytes: float, flops: float, moved: float = 0.0) -> float:
        """The least seconds that ``nbytes`` of traffic and ``flops`` of arithmetic can take, with ``moved`` bytes that
        go each way between the device and the host's memory.
        """
        return max(
            nbytes / (self.copy_gb_s * 1e9),
            flops / (self.matmul_tflop_s * 1e12),
            moved / (self.link_gb_s * 1e9),
            2 * moved / (self.host_copy_gb_s * 1e9),
        )


def measure(device: str, timer: Timer, quick: bool = False) -> Ceilings:
    """The ceilings of ``device``: the best of a few runs.

    On a CPU the product is in fp32 whatever a cell's dtype: arithmetic on narrower ones is done in fp32 there.
    """
    numel = (1 << 22 if quick else 1 << 26) if device == "cpu" else _copied_on_a_gpu()
    size = (512 if quick else 3072) if device == "cpu" else 8192
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    copy = _copy(numel, device, timer)
    product = _best(timer, lambda: left @ right)
    pages = 8 if quick else 64
    moving = _best(timer, link(device, pages, PAGE).run, captured=False)
    return Ceilings(
        copy_gb_s=_digits(copy),
        matmul_tflop_s=_digits(2 * size**3 / product / 1e12),
        matmul_dtype=str(dtype).removeprefix("torch."),
        link_gb_s=_digits(pages * PAGE / moving / 1e9),
        host_copy_gb_s=_digits(copy if device == "cpu" else _copy(1 << 26, "cpu", CpuTimer())),
    )


def _copy(numel: int, device: str, timer: Timer) -> float:
    """GB/s, read and written, of fp32."""
    source = torch.ones(numel, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _best(timer, lambda: target.copy_(source)) / 1e9


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def _copied_on_a_gpu() -> int:
    """4 GiB of fp32, less where two of them would fill the memory."""
    return min(1 << 30, torch.cuda.get_device_properties().total_memory // 32)


def _best(timer: Timer, call: Call, captured: bool = True) -> float:
    timed = timer.prepare([call], captured)
    return min(timer.time(timed) for _ in range(REPETITIONS))

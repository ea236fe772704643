"""What the device itself can do, measured in the same run: every result is given as a share of the floor it sets."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.timers import Call, Timer

REPETITIONS = 10


@dataclass(frozen=True)
class Ceilings:
    """Bandwidth of a large copy, bytes read and written, and the speed of a large matrix product."""

    copy_gb_s: float
    matmul_tflop_s: float
    matmul_dtype: str

    def floor(self, nbytes: float, flops: float) -> float:
        """The least seconds that ``nbytes`` of traffic and ``flops`` of arithmetic can take."""
        return max(nbytes / (self.copy_gb_s * 1e9), flops / (self.matmul_tflop_s * 1e12))


def measure(device: str, timer: Timer, quick: bool = False) -> Ceilings:
    """The ceilings of ``device``: the best of a few runs.

    On a CPU the product is in fp32 whatever a cell's dtype: arithmetic on narrower ones is done in fp32 there.
    """
    numel = (1 << 22 if quick else 1 << 26) if device == "cpu" else _copied_on_a_gpu()
    size = (512 if quick else 3072) if device == "cpu" else 8192
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    source = torch.ones(numel, device=device)
    target = torch.zeros_like(source)
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    copy = _best(timer, lambda: target.copy_(source))
    product = _best(timer, lambda: left @ right)
    return Ceilings(
        copy_gb_s=float(f"{2 * source.nbytes / copy / 1e9:.4g}"),
        matmul_tflop_s=float(f"{2 * size**3 / product / 1e12:.4g}"),
        matmul_dtype=str(dtype).removeprefix("torch."),
    )


def _copied_on_a_gpu() -> int:
    """4 GiB of fp32, less where two of them would fill the memory."""
    return min(1 << 30, torch.cuda.get_device_properties().total_memory // 32)


def _best(timer: Timer, call: Call) -> float:
    timed = timer.prepare([call])
    return min(timer.time(timed) for _ in range(REPETITIONS))

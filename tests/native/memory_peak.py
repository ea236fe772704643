"""Measures that no native call allocates anything of the size of its weight, and that nothing stays behind."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from peftrt.ops import _native

N = K = 4096
DENSE = N * K * 4


def status(key: str) -> int:
    """Bytes of one line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


if __name__ == "__main__":
    reason = _native.load()
    assert reason is None, reason
    blocks = N * K // 64
    weight = (
        torch.randint(0, 256, (N * K // 2,), dtype=torch.uint8),
        torch.randint(0, 256, (blocks,), dtype=torch.uint8),
        torch.ones(blocks // 256).view(torch.uint8),
        torch.ones(1).view(torch.uint8),
        64,
    )
    small = (weight[0][: 64 * 32], weight[1][:64], weight[2][:4], weight[3], 64)
    for m in (1, 4, 16, 64):  # code and threads come into memory once, and are not what is measured
        torch.ops.peftrt_cpu.nf4_linear_dx(torch.ones(m, 64), *small, torch.empty(m, 64))
        torch.ops.peftrt_cpu.nf4_lora_linear(
            torch.ones(m, 64), None, *small[:4], 64, 64, 64, torch.ones(4, 64), torch.ones(64, 4), 0.5, None, None
        )
    for m in (1, 4, 16, 64):
        x, y = torch.randn(m, K), torch.empty(m, N)
        x.sum(), y.zero_()
        for call in (torch.ops.peftrt_cpu.nf4_linear, torch.ops.peftrt_cpu.nf4_linear_dx):
            extra = (None,) if call is torch.ops.peftrt_cpu.nf4_linear else ()
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
            before = status("VmRSS")
            call(x, *weight, *extra, y)
            # beside the activations: a repacked x, and panels of W of a fixed size a thread
            allowed = 2 * m * K * 4 + DENSE // 16
            assert status("VmHWM") - before < allowed, (m, str(call), status("VmHWM") - before, allowed)
            assert status("VmRSS") - before < allowed, (m, str(call))
        A, B = torch.randn(16, K), torch.randn(N, 16)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        scale = torch.ops.peftrt_cpu.lora_weight_norm(*weight[:4], N, K, 64, A, B, 0.5)
        assert status("VmHWM") - before < allowed, (m, status("VmHWM") - before)
        torch.ops.peftrt_cpu.nf4_lora_linear(x, None, *weight[:4], N, K, 64, A, B, 0.5, None, scale)
        assert status("VmHWM") - before < allowed + y.nbytes, (m, status("VmHWM") - before)
    dense, codes, absmax = torch.ones(N, K, dtype=torch.bfloat16), torch.empty_like(weight[0]), torch.ones(blocks)
    codes.zero_()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    torch.ops.peftrt_cpu.nf4_quantize(dense, 64, codes, absmax.view(torch.uint8))
    assert status("VmHWM") - before < DENSE // 32, status("VmHWM") - before
    print("peak within bounds")

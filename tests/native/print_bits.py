"""Prints the instruction set, a digest of what has the same bits everywhere, and sums of what the others give.

The digest is of dequantised and requantised weights, and of an optimizer's step and norm.
"""

from __future__ import annotations

import hashlib

import torch

from peftrt.ops import _native
from tests.ops.many_tensors import ABSENT, ManyTensors

if __name__ == "__main__":
    reason = _native.load()
    assert reason is None, reason
    generator = torch.Generator().manual_seed(7)
    digest, sums = hashlib.sha256(), []
    for n, k, block_size in ((5, 64, 64), (13, 67, 32), (40, 320, 128), (3, 4097, 4096)):
        blocks = -(-n * k // block_size)
        weight = (
            torch.randint(0, 256, ((n * k + 1) // 2,), dtype=torch.uint8, generator=generator),
            torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator),
            torch.rand(-(-blocks // 256), generator=generator).view(torch.uint8),
            torch.rand(1, generator=generator).view(torch.uint8),
            block_size,
        )
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            out = torch.empty(n, k, dtype=dtype)
            torch.ops.peftrt_cpu.nf4_dequantize(*weight, out)
            codes, absmax = torch.empty_like(weight[0]), torch.empty(4 * blocks, dtype=torch.uint8)
            torch.ops.peftrt_cpu.nf4_quantize(out, block_size, codes, absmax)
            nested = torch.empty_like(weight[1]), torch.empty_like(weight[2])
            torch.ops.peftrt_cpu.nf4_quantize_scales(absmax, weight[3], *nested)
            for made in (out.view(torch.uint8), codes, absmax, *nested):
                digest.update(made.numpy().tobytes())
        for m in (1, 3, 20):
            x, dy = torch.rand(m, k, generator=generator), torch.rand(m, n, generator=generator)
            y, dx = torch.empty(m, n), torch.empty(m, k)
            torch.ops.peftrt_cpu.nf4_linear(x, *weight, None, y)
            torch.ops.peftrt_cpu.nf4_linear_dx(dy, *weight, dx)
            dc = torch.ops.peftrt_cpu.row_scale_gradient(y, y, None, torch.full((n,), 0.5))
            sums += [y.abs().sum().item(), dx.abs().sum().item(), dc.sum().item()]
        adapter = torch.rand(5, k, generator=generator), torch.rand(n, 5, generator=generator), 0.5
        sums.append(torch.ops.peftrt_cpu.lora_weight_norm(*weight[:4], n, k, block_size, *adapter).sum().item())
    for bits in (32, 8):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            many = ManyTensors(bits=bits, dtype=dtype, absent=ABSENT, coefficient=0.37).step("native")
            for made in (*many.everything(), *many.norm(1.0, "native")):
                digest.update(made.numpy().tobytes())
    print(_native.isa(), digest.hexdigest(), *sums)

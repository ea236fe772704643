"""Counts this process's threads around native calls: they use torch's, as many as torch was told, and make none."""

from __future__ import annotations

import os

import torch

from peftrt.ops import _native


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    reason = _native.load()
    assert reason is None, reason
    n, k = 512, 1024
    weight = (
        torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8),
        torch.ones(n * k // 64).view(torch.uint8),
        None,
        None,
        64,
    )

    def call() -> None:
        for m in (1, 16):
            torch.ops.peftrt_cpu.nf4_linear(torch.ones(m, k), *weight, None, torch.empty(m, n))
            torch.ops.peftrt_cpu.nf4_linear_dx(torch.ones(m, n), *weight, torch.empty(m, k))
            lora_A, lora_B = torch.ones(8, k), torch.ones(n, 8)
            torch.ops.peftrt_cpu.nf4_lora_linear(
                torch.ones(m, k), None, *weight[:4], n, k, 64, lora_A, lora_B, 1.0, None, None
            )
            # slots 0 and 1 share their pages: of A the values from 0 on, of B^T those behind them
            pairs = (torch.ones(8 * (n + k)), torch.full((2, 1), 8, dtype=torch.int32))
            pages = torch.zeros(2, 1, 1, dtype=torch.int64)
            table = (*pairs, pages, pages + 8 * k, torch.ones(2, 1))
            slots = torch.arange(m, dtype=torch.int32) % 3 - 1
            for base in ((*weight[:4], n, k, 64), (torch.ones(n, k), None, None, None, n, k, 0)):
                torch.ops.peftrt_cpu.multi_lora_linear(torch.ones(m, k), *base, *table, None, None, [n], slots, None)
                gradient = torch.ops.peftrt_cpu.multi_lora_linear_backward
                gradient(torch.ones(m, n), torch.ones(m, k), *base, *table, [n], slots, True, True)
            torch.ops.peftrt_cpu.row_scale_gradient(torch.ones(m, n), torch.ones(m, n), None, torch.ones(n))
            down = (torch.ones(64, k), torch.ones(64), torch.ones(k, 64), torch.ones(k))
            torch.ops.peftrt_cpu.bottleneck(torch.ones(m, k), torch.ones(m, k), *down, 1.0, 1)
            torch.ops.peftrt_cpu.lora_weight_norm(*weight[:4], n, k, 64, lora_A, lora_B, 1.0)
        dense = torch.empty(n, k)
        torch.ops.peftrt_cpu.nf4_dequantize(*weight, dense)
        torch.ops.peftrt_cpu.nf4_quantize(dense, 64, torch.empty_like(weight[0]), torch.empty_like(weight[1]))

    alone = threads()
    call()
    assert threads() == alone, (alone, threads())
    torch.set_num_threads(3)
    call()
    assert threads() == alone + 2, (alone, threads())
    print("threads obeyed")

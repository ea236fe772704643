"""Runs every native CPU function on buffers that end where an inaccessible page begins; a read past one is fatal."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap

import torch

from peftrt.formats.adamw_state import BLOCK
from peftrt.ops import _native
from peftrt.ops._addresses import DTYPE_CODES

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
keep: list[object] = []


def at_the_end(size: int, dtype: torch.dtype, shape: tuple[int, ...], fill: str = "random") -> torch.Tensor:
    """A tensor of ``size`` bytes whose last byte is the last before a page that cannot be touched."""
    pages = -(-max(size, 1) // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    view = (ctypes.c_char * len(memory)).from_buffer(memory)
    start = ctypes.addressof(view)
    assert libc.mprotect(start + pages * PAGE, PAGE, 0) == 0
    keep.extend((memory, view))
    raw = (ctypes.c_char * size).from_address(start + pages * PAGE - size)
    tensor = torch.frombuffer(raw, dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)
    if fill == "random" and dtype == torch.uint8:
        tensor.random_(0, 256)
    elif fill == "random":
        tensor.copy_(torch.randn(size // dtype.itemsize).to(dtype).view(torch.uint8))
    else:
        tensor.fill_(0xFF)
    return tensor.view(dtype).reshape(shape)


def run(m: int, n: int, k: int, block_size: int, dtype: torch.dtype) -> None:
    blocks = -(-n * k // block_size)
    codes = at_the_end((n * k + 1) // 2, torch.uint8, (-1,))
    absmax = at_the_end(blocks, torch.uint8, (-1,))
    runs = -(-blocks // 256)
    nested = at_the_end(4 * runs, torch.float32, (runs,)).view(torch.uint8)
    offset = at_the_end(4, torch.float32, (1,)).view(torch.uint8)
    weight = (codes, absmax, nested, offset, block_size)

    def floats(rows: int, columns: int, fill: str = "random") -> torch.Tensor:
        return at_the_end(rows * columns * dtype.itemsize, dtype, (rows, columns), fill)

    dense, y, dx = floats(n, k, "nan"), floats(m, n, "nan"), floats(m, k, "nan")
    torch.ops.peftrt_cpu.nf4_dequantize(*weight, dense)
    torch.ops.peftrt_cpu.nf4_linear(floats(m, k), *weight, floats(1, n).reshape(-1), y)
    torch.ops.peftrt_cpu.nf4_linear_dx(floats(m, n), *weight, dx)
    lora_A, lora_B = floats(3, k), floats(n, 3)
    adapted = torch.ops.peftrt_cpu.nf4_lora_linear(
        floats(m, k), None, *weight[:4], n, k, block_size, lora_A, lora_B, 0.5, None, None
    )
    pages = torch.zeros(1, 1, 2, dtype=torch.int64)
    pairs = (floats(9, n + k).reshape(-1), torch.full((1, 1), 9, dtype=torch.int32))
    pairs = (*pairs, pages + torch.tensor([0, 8 * k]), pages + 9 * k + torch.tensor([0, 8 * n]), torch.ones(1, 1))
    slots, vectors = torch.arange(m, dtype=torch.int32) % 2 - 1, at_the_end(4 * (k + 2 * n), torch.float32, (-1,))
    starts = torch.tensor([[0, k, k + n]])
    multi = []
    for base in ((*weight[:4], n, k, block_size), (floats(n, k), None, None, None, n, k, 0)):
        rows, bias, out = floats(m, k), floats(1, n).reshape(-1), floats(m, n, "nan")
        for invariant in (False, True):
            call = (*base, *pairs, vectors, starts, [n], slots, bias, out, invariant)
            torch.ops.peftrt_cpu.multi_lora_linear.out(rows, *call)
            backward = (*base, *pairs, [n], slots, True, True, invariant)
            multi += [out.clone(), *torch.ops.peftrt_cpu.multi_lora_linear_backward(floats(m, n), rows, *backward)]
    norms = torch.ops.peftrt_cpu.lora_weight_norm(*weight[:4], n, k, block_size, lora_A, lora_B, 0.5)
    flat = floats(n, k)
    of_dense = torch.ops.peftrt_cpu.lora_weight_norm(flat, None, None, None, n, k, 0, lora_A, lora_B, 0.5)
    of_columns = torch.ops.peftrt_cpu.lora_weight_norm(floats(k, n).t(), None, None, None, n, k, 0, lora_A, lora_B, 0.5)
    scale = at_the_end(4 * n, torch.float32, (n,))
    dscale = torch.ops.peftrt_cpu.row_scale_gradient(floats(m, n), floats(m, n), None, scale)
    down = (floats(5, k), floats(1, 5).reshape(-1), floats(k, 5), floats(1, k).reshape(-1))
    bottlenecks = []
    for activation in range(7):
        forward = torch.ops.peftrt_cpu.bottleneck(
            floats(m, k), floats(m, k), *down, 0.5, activation, activation % 2 == 0
        )
        inner = at_the_end(20 * m, torch.float32, (m, 5)).copy_(forward[1])
        gradient = torch.ops.peftrt_cpu.bottleneck_gradient
        bottlenecks += [*forward, *gradient(floats(m, k), floats(m, k), inner, down[2], 0.5, activation, True, True)]
    quantised = (
        at_the_end((n * k + 1) // 2, torch.uint8, (-1,), "nan"),
        at_the_end(4 * blocks, torch.uint8, (-1,), "nan"),
    )
    torch.ops.peftrt_cpu.nf4_quantize(dense, block_size, *quantised)
    nested_out = at_the_end(blocks, torch.uint8, (-1,), "nan"), at_the_end(4 * runs, torch.uint8, (-1,), "nan")
    torch.ops.peftrt_cpu.nf4_quantize_scales(quantised[1], offset, *nested_out)
    for out in (
        dense,
        y,
        dx,
        *adapted,
        *multi,
        norms,
        of_dense,
        of_columns,
        dscale,
        *bottlenecks,
        quantised[1].view(torch.float32),
        nested_out[1].view(torch.float32),
    ):
        assert out.isfinite().all(), (m, n, k, block_size, dtype)
    keep.clear()


def optimize(sizes: tuple[int, ...], bits: int, dtype: torch.dtype) -> None:
    """Parameters, gradients and each page of their state; what the page has no room for is cut off."""
    params, grads = ([at_the_end(n * dtype.itemsize, dtype, (n,)) for n in sizes] for _ in range(2))
    blocks = sum(-(-n // BLOCK) for n in sizes)
    page_bytes = -(-blocks * (8 * BLOCK if bits == 32 else 2 * BLOCK + 8) // 16) * 16
    state = at_the_end(page_bytes, torch.uint8, (-1,), "zero").zero_()
    starts = [sum(-(-n // BLOCK) for n in sizes[:t]) * BLOCK for t in range(len(sizes))]
    rows = [[t, i, min(512, n - i), 0, starts[t] + i] for t, n in enumerate(sizes) for i in range(0, n, 512)]
    chunks, addresses = torch.tensor(rows), [[p.data_ptr(), g.data_ptr()] for p, g in zip(params, grads, strict=True)]
    table = torch.tensor([[*pair, DTYPE_CODES[dtype]] for pair in addresses])
    hyper = at_the_end(24 * len(sizes), torch.float32, (len(sizes), 6)).fill_(0.5)
    partials, out = at_the_end(8 * len(rows), torch.float64, (-1,), "nan"), at_the_end(8, torch.float32, (2,), "nan")
    torch.ops.peftrt_cpu.gradient_norm(table, chunks[:, :3].contiguous(), partials, 1.0, out)
    torch.ops.peftrt_cpu.adamw_step(state, chunks, table, hyper, out[1], bits, page_bytes, DTYPE_CODES[dtype], 0)
    for result in (*params, partials, out):
        assert result.isfinite().all(), (sizes, bits, dtype)
    assert state.any()
    keep.clear()


if __name__ == "__main__":
    faulthandler.enable()
    reason = _native.load()
    assert reason is None, reason
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for m in (1, 2, 5, 8, 9, 17):
            for n, k, block_size in ((1, 1, 32), (3, 7, 64), (5, 64, 64), (13, 65, 32), (7, 127, 128), (25, 320, 4096)):
                run(m, n, k, block_size, dtype)
        for bits in (32, 8):
            for sizes in ((1,), (7, 255), (256, 33, 513), (1000, 1, 4096)):
                optimize(sizes, bits, dtype)
    print("no breach")

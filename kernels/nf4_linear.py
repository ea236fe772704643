"""nf4_linear: y = x W^T + b, and dX = dY W, with NF4 weights decoded tile by tile on the way to the tensor cores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftrt.kernels._launch import on_device
from peftrt.kernels._nf4 import CHUNKS, alignment
from peftrt.kernels._schedule import MANY, Config, Schedule, architecture_of, ranges, schedule, sum_splits
from peftrt.kernels._tiles import nf4_dx_tile, nf4_tile


@triton.jit
def nf4_linear_kernel(
    p_x,
    p_codes,
    p_absmax,
    p_nested_absmax,
    p_nested_offset,
    p_tables,
    p_bias,
    p_out,
    M,
    N,
    K,
    row_bytes,
    steps,
    BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    NESTED: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile [BM, BN] of y. Where SPLIT, a sum over ``steps`` steps of K only, without bias: fp32 [splits, M, N]."""
    # neighbouring programs share a tile of W
    i_m = tl.program_id(0) % tl.cdiv(M, BM)
    i_n = tl.program_id(0) // tl.cdiv(M, BM)
    i_first = tl.program_id(1) * steps
    i_last = tl.minimum(i_first + steps, tl.cdiv(K, BK))
    o_m = i_m.to(tl.int64) * BM + tl.arange(0, BM)
    o_n = i_n.to(tl.int64) * BN + tl.arange(0, BN)
    m_m = o_m < M
    m_n = o_n < N
    p_scales = (p_absmax, p_nested_absmax, p_nested_offset)
    b_sum = nf4_tile(
        p_x,
        p_codes,
        p_scales,
        p_tables,
        tl.zeros((BM, BN), tl.float32),
        o_m,
        m_m,
        o_n,
        m_n,
        i_first,
        i_last,
        K,
        row_bytes,
        BLOCK,
        ALIGNMENT,
        NESTED,
        BK,
        PRECISION,
    )
    if BIAS:
        b_sum += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if SPLIT:
        p_out += tl.program_id(1).to(tl.int64) * M * N
    p_tile = p_out + o_m[:, None] * N + o_n[None, :]
    tl.store(p_tile, b_sum.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit
def nf4_linear_dx_kernel(
    p_dy,
    p_codes,
    p_absmax,
    p_nested_absmax,
    p_nested_offset,
    p_tables,
    p_out,
    M,
    N,
    K,
    row_bytes,
    steps,
    BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    NESTED: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile [BM, BK] of dX. Where SPLIT, a sum over ``steps`` steps of N only: fp32 [splits, M, K]."""
    i_m = tl.program_id(0) % tl.cdiv(M, BM)
    i_k = tl.program_id(0) // tl.cdiv(M, BM) * BK
    i_first = tl.program_id(1) * steps
    i_last = tl.minimum(i_first + steps, tl.cdiv(N, BN))
    o_m = i_m.to(tl.int64) * BM + tl.arange(0, BM)
    m_m = o_m < M
    p_scales = (p_absmax, p_nested_absmax, p_nested_offset)
    b_sum = nf4_dx_tile(
        p_dy,
        p_codes,
        p_scales,
        p_tables,
        p_tables,
        tl.zeros((BM, BK), tl.float32),
        o_m,
        m_m,
        i_k,
        i_first,
        i_last,
        N,
        K,
        row_bytes,
        BLOCK,
        ALIGNMENT,
        NESTED,
        False,
        BN,
        BK,
        PRECISION,
    )
    if SPLIT:
        p_out += tl.program_id(1).to(tl.int64) * M * K
    o_k = i_k + tl.arange(0, BK)
    p_tile = p_out + o_m[:, None] * K + o_k[None, :]
    tl.store(p_tile, b_sum.to(p_out.dtype.element_ty), mask=m_m[:, None] & (o_k < K)[None, :])


# For whole chunks, by architecture (sm_90 and up, sm_8x, AMD), pass and bytes of an element. Chosen by compiled code
# alone: instructions a weight, no spills, shared memory under 99 KB (64 KB on AMD). Not measured on a device. At
# least 64 weights a thread, so that each scale of a tile is decoded once; BM under 64 for fp32, so that mma.sync is
# chosen and not wgmma from registers. From 65 rows on sm_90 tiles are small enough for two programs a multiprocessor,
# one of which decodes while the other multiplies. Hundreds of rows are the most that come here (peftrt/ops/_paths.py),
# except where blocks straddle rows; ranges end where a tile of rows begins, so that sums are split no more than needed.
CONFIGS: dict[tuple[str, str, int], tuple[Config, ...]] = {
    ("sm_90", "forward", 2): (
        Config(16, 16, 128, 64, warps=4, stages=4, split=True),
        Config(64, 64, 128, 64, warps=4, stages=3, split=True),
        *ranges((128, 256, MANY), 128, 128, 64, warps=4, stages=3, split=True),
    ),
    ("sm_90", "dx", 2): (
        Config(16, 16, 64, 128, warps=4, stages=4, split=True),
        Config(64, 64, 64, 128, warps=4, stages=4, split=True),
        *ranges((128, 256, MANY), 128, 64, 128, warps=4, stages=3, split=True),
    ),
    ("sm_90", "forward", 4): ranges((32, MANY), 32, 128, 64, warps=8, stages=2, split=True),
    ("sm_90", "dx", 4): ranges((32, MANY), 32, 64, 128, warps=8, stages=2, split=True),
    # mma.sync takes both operands from registers: larger tiles spill
    ("sm_80", "forward", 2): (
        Config(16, 16, 128, 64, warps=4, stages=4, split=True),
        *ranges((64, 128, MANY), 64, 128, 64, warps=4, stages=3, split=True),
    ),
    ("sm_80", "dx", 2): (
        Config(16, 16, 64, 128, warps=4, stages=4, split=True),
        *ranges((64, 128, MANY), 64, 64, 128, warps=4, stages=4, split=True),
    ),
    ("sm_80", "forward", 4): ranges((32, MANY), 32, 128, 64, warps=8, stages=2, split=True),
    ("sm_80", "dx", 4): ranges((32, MANY), 32, 64, 128, warps=8, stages=2, split=True),
    ("hip", "forward", 2): (
        Config(16, 16, 128, 64, warps=4, stages=2, split=True),
        *ranges((128, MANY), 128, 128, 64, warps=4, stages=2, split=True),
    ),
    ("hip", "dx", 2): (
        Config(16, 16, 64, 128, warps=4, stages=2, split=True),
        *ranges((128, MANY), 128, 64, 128, warps=4, stages=2, split=True),
    ),
    ("hip", "forward", 4): ranges((32, MANY), 32, 64, 64, warps=4, stages=2, split=True),
    ("hip", "dx", 4): ranges((32, MANY), 32, 64, 64, warps=4, stages=2, split=True),
}
# Where blocks straddle rows, on every device and in both passes, by bytes of an element. Gradients of any number of
# rows come here: columns cannot be decoded apart.
STRADDLING_CONFIGS: dict[int, tuple[Config, ...]] = {
    2: (
        Config(16, 16, 64, 64, warps=4, stages=2, split=True),
        *ranges((128, 512), 128, 64, 64, warps=8, stages=2, split=True),
        Config(MANY, 128, 64, 64, warps=8, stages=2),
    ),
    4: (
        *ranges((32, 128), 32, 64, 64, warps=8, stages=1, split=True),
        Config(MANY, 32, 64, 64, warps=8, stages=1),
    ),
}


def configs(architecture: str, dx: bool, itemsize: int, align: int) -> tuple[Config, ...]:
    """The configurations of a kernel by rows; ``align`` is what ``alignment`` says."""
    if align != CHUNKS.value:
        return STRADDLING_CONFIGS[itemsize]
    return CONFIGS[architecture, "dx" if dx else "forward", itemsize]


def nf4_linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    tables: Tensor,
    block_size: int,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """``out = x W^T + bias``, with W rounded to x's dtype and sums in fp32.

    Args:
        x: [M, K], fp32, bf16 or fp16.
        codes, absmax, nested_absmax, nested_offset, tables, block_size: as of ``nf4_dequantize``, for W [N, K].
        bias: [N] in x's dtype, or None.
        out: [M, N] in x's dtype.
    All are contiguous, on one device, and of the sizes said: the operation has checked them.
    """
    _launch(x, codes, absmax, nested_absmax, nested_offset, tables, block_size, bias, out, dx=False)


def nf4_linear_dx(
    dy: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    tables: Tensor,
    block_size: int,
    out: Tensor,
) -> None:
    """``out = dy W``, dy [M, N], out [M, K]; the rest as of :func:`nf4_linear`."""
    _launch(dy, codes, absmax, nested_absmax, nested_offset, tables, block_size, None, out, dx=True)


def nf4_linear_parts(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    tables: Tensor,
    block_size: int,
    columns: int,
    dx: bool,
) -> Tensor:
    """fp32 [parts, M, columns] whose sum is x W^T, or where ``dx`` x W: for a kernel that adds to it and rounds once.

    The rest as of :func:`nf4_linear`.
    """
    plan, sizes = _plan(x, columns, block_size, dx)
    parts = x.new_empty((plan.splits, x.shape[0], columns), dtype=torch.float32)
    if parts.numel():
        weight = (codes, absmax, nested_absmax, nested_offset, tables, block_size)
        _multiply(plan, sizes, x, weight, None, parts, dx, split=True)
    return parts


def _launch(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    tables: Tensor,
    block_size: int,
    bias: Tensor | None,
    out: Tensor,
    dx: bool,
) -> None:
    if out.numel() == 0:
        return
    plan, sizes = _plan(x, out.shape[1], block_size, dx)
    parts, once = plan.parts(out), plan.splits == 1
    weight = (codes, absmax, nested_absmax, nested_offset, tables, block_size)
    _multiply(plan, sizes, x, weight, bias if once else None, parts, dx, split=not once)
    if not once:
        with on_device(x):
            sum_splits(parts, None, bias, out)


def _plan(x: Tensor, columns: int, block_size: int, dx: bool) -> tuple[Schedule, tuple[int, int, int]]:
    """The schedule of a product with ``columns`` columns, and its M, N and K."""
    M, N, K = (*x.shape, columns) if dx else (x.shape[0], columns, x.shape[1])
    by_rows = configs(architecture_of(x.device), dx, x.element_size(), alignment(K, block_size))
    return schedule(by_rows, M, N, K, dx, x.device), (M, N, K)


def _multiply(
    plan: Schedule,
    sizes: tuple[int, int, int],
    x: Tensor,
    weight: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, int],
    bias: Tensor | None,
    out: Tensor,
    dx: bool,
    split: bool,
) -> None:
    codes, absmax, nested_absmax, nested_offset, tables, block_size = weight
    K, nested = sizes[2], nested_absmax is not None
    scales = (absmax, nested_absmax, nested_offset) if nested else (absmax, absmax, absmax)
    constants = {"BLOCK": block_size, "ALIGNMENT": alignment(K, block_size), "NESTED": nested, **plan.constants(x)}
    constants["SPLIT"] = split
    with on_device(x):
        if dx:
            nf4_linear_dx_kernel[plan.grid](x, codes, *scales, tables, out, *sizes, K // 2, plan.steps, **constants)
        else:
            constants["BIAS"] = bias is not None
            addend = x if bias is None else bias
            nf4_linear_kernel[plan.grid](
                x, codes, *scales, tables, addend, out, *sizes, K // 2, plan.steps, **constants
            )

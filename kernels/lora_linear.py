"""lora_linear: y = c (x W^T + s xa B^T) + b and dX = (c dY) W + drop'(G A), tiles of which begin with the adapter's.

The adapter's share of a tile is summed first, and the base's products are added to it: the result is written once and
rounded once. As the end of the loop it would need registers for two sums where dropout stands between them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from peftrt.kernels._adapter import RANKS, adapter_tile, dropout_limit, kept
from peftrt.kernels._launch import on_device
from peftrt.kernels._nf4 import alignment
from peftrt.kernels._schedule import architecture_of, schedule, sum_splits
from peftrt.kernels._tiles import nf4_dx_tile, nf4_tile
from peftrt.kernels.lora_linear_dense import lora_linear_dense
from peftrt.kernels.nf4_linear import configs

# The tiles are nf4_linear's. What the adapter adds to one, compiled for sm_90 (Triton 3.7.1, bf16, R = 16, nested
# scales; November 2026, not measured on a device): at 128 x 128 x 64 y has 280 instructions more than 1608, dX 368 more
# than 1384 (3176 with dropout), and each 12 wgmma of TF32. A step of the loop has 470 and 487, as without an adapter,
# and 8 wgmma: at K = 4096 that is 0.9 % more instructions and 2.3 % more of the tensor cores' time.

# codes, absmax, nested_absmax, nested_offset, tables, block_size, as of ``nf4_linear``; or dense [N, K], any strides
Weight = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, int] | Tensor


@triton.jit
def lora_linear_kernel(
    p_x,
    p_codes,
    p_absmax,
    p_nested_absmax,
    p_nested_offset,
    p_tables,
    p_xa,
    p_b,
    p_row_scale,
    p_bias,
    p_out,
    M,
    N,
    K,
    R,
    row_bytes,
    steps,
    scaling,
    BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    NESTED: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile [BM, BN] of y over NF4. Where SPLIT, a sum over ``steps`` steps of K only: fp32 [splits, M, N].

    The adapter's share is the first split's; row scale and bias come where the splits are summed.
    """
    # neighbouring programs share a tile of W
    i_m = tl.program_id(0) % tl.cdiv(M, BM)
    i_n = tl.program_id(0) // tl.cdiv(M, BM)
    i_first = tl.program_id(1) * steps
    i_last = tl.minimum(i_first + steps, tl.cdiv(K, BK))
    o_m = i_m.to(tl.int64) * BM + tl.arange(0, BM)
    o_n = i_n.to(tl.int64) * BN + tl.arange(0, BN)
    m_m = o_m < M
    m_n = o_n < N
    ranks = tl.where(tl.program_id(1) == 0, R, 0)
    b_sum = tl.zeros((BM, BN), tl.float32)
    b_sum = adapter_tile(p_xa, p_b, b_sum, o_m, m_m, o_n, m_n, R, ranks, 1, R, scaling, BR, PRECISION)
    b_sum = nf4_tile(
        p_x,
        p_codes,
        (p_absmax, p_nested_absmax, p_nested_offset),
        p_tables,
        b_sum,
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
    if ROW_SCALE:
        b_sum *= tl.load(p_row_scale + o_n, mask=m_n, other=0.0)[None, :]
    if BIAS:
        b_sum += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if SPLIT:
        p_out += tl.program_id(1).to(tl.int64) * M * N
    p_tile = p_out + o_m[:, None] * N + o_n[None, :]
    tl.store(p_tile, b_sum.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit
def lora_linear_dx_kernel(
    p_dy,
    p_codes,
    p_absmax,
    p_nested_absmax,
    p_nested_offset,
    p_tables,
    p_g,
    p_a,
    p_row_scale,
    p_seed,
    p_out,
    M,
    N,
    K,
    R,
    row_bytes,
    steps,
    factor,
    limit,
    BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    NESTED: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile [BM, BK] of dX over NF4. Where SPLIT, a sum over ``steps`` steps of N only: fp32 [splits, M, K]."""
    i_m = tl.program_id(0) % tl.cdiv(M, BM)
    i_k = tl.program_id(0) // tl.cdiv(M, BM) * BK
    i_first = tl.program_id(1) * steps
    i_last = tl.minimum(i_first + steps, tl.cdiv(N, BN))
    o_m = i_m.to(tl.int64) * BM + tl.arange(0, BM)
    o_k = i_k.to(tl.int64) + tl.arange(0, BK)
    m_m = o_m < M
    m_k = o_k < K
    ranks = tl.where(tl.program_id(1) == 0, R, 0)
    b_sum = tl.zeros((BM, BK), tl.float32)
    b_sum = adapter_tile(p_g, p_a, b_sum, o_m, m_m, o_k, m_k, R, ranks, K, 1, factor, BR, PRECISION)
    if DROPOUT:
        b_sum = tl.where(kept(p_seed, limit, o_m[:, None] * K + o_k[None, :], WIDE), b_sum, 0.0)
    b_sum = nf4_dx_tile(
        p_dy,
        p_codes,
        (p_absmax, p_nested_absmax, p_nested_offset),
        p_tables,
        p_row_scale,
        b_sum,
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
        ROW_SCALE,
        BN,
        BK,
        PRECISION,
    )
    if SPLIT:
        p_out += tl.program_id(1).to(tl.int64) * M * K
    p_tile = p_out + o_m[:, None] * K + o_k[None, :]
    tl.store(p_tile, b_sum.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_k[None, :])


def lora_linear(
    x: Tensor,
    weight: Weight,
    xa: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    row_scale: Tensor | None,
    out: Tensor,
) -> None:
    """``out = row_scale (x W^T + scaling xa B^T) + bias``, sums in fp32.

    Args:
        x: [M, K], fp32, bf16 or fp16.
        weight: W [N, K], NF4 or dense in x's dtype.
        xa: fp32 [M, R], ``drop(x) A^T``.
        lora_B: [N, R], fp32, bf16 or fp16.
        scaling: s.
        bias: [N] in x's dtype, or None.
        row_scale: fp32 [N], or None.
        out: [M, N] in x's dtype.
    All but a dense weight are contiguous, on one device, and of the sizes said: the operation has checked them.
    """
    if out.numel() == 0:
        return
    if isinstance(weight, Tensor):
        lora_linear_dense(x, weight.t(), xa, lora_B.t(), out, factor=scaling, bias=bias, result_scale=row_scale)
        return
    codes, *scales, tables, block_size = weight
    (M, K), N, R = x.shape, out.shape[1], xa.shape[1]
    align = alignment(K, block_size)
    plan = schedule(configs(architecture_of(x.device), False, x.element_size(), align), M, N, K, False, x.device)
    parts, once = plan.parts(out), plan.splits == 1
    with on_device(x):
        lora_linear_kernel[plan.grid](
            x,
            codes,
            *stored(scales),
            tables,
            xa,
            lora_B,
            x if row_scale is None else row_scale,
            x if bias is None else bias,
            parts,
            M,
            N,
            K,
            R,
            K // 2,
            plan.steps,
            scaling,
            BLOCK=block_size,
            ALIGNMENT=align,
            NESTED=scales[1] is not None,
            ROW_SCALE=row_scale is not None and once,
            BIAS=bias is not None and once,
            BR=RANKS,
            **plan.constants(x),
        )
        if not once:
            sum_splits(parts, row_scale, bias, out)


def lora_linear_dx(
    dy: Tensor,
    weight: Weight,
    g: Tensor,
    lora_A: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    row_scale: Tensor | None,
    out: Tensor,
) -> None:
    """``out = (row_scale dy) W + drop'(g A)``, sums in fp32.

    Args:
        dy: [M, N], fp32, bf16 or fp16.
        weight: W [N, K], NF4 or dense in dy's dtype.
        g: fp32 [M, R], ``s (row_scale dy) B``.
        lora_A: [R, K], fp32, bf16 or fp16.
        seed: int64 [1]; None without dropout.
        dropout_p: probability of a zero.
        row_scale: fp32 [N], or None. A dense W is rounded again after it.
        out: [M, K] in dy's dtype.
    """
    if out.numel() == 0:
        return
    if isinstance(weight, Tensor):
        lora_linear_dense(dy, weight, g, lora_A, out, seed=seed, dropout_p=dropout_p, sum_scale=row_scale)
        return
    codes, *scales, tables, block_size = weight
    (M, N), K, R = dy.shape, out.shape[1], g.shape[1]
    align = alignment(K, block_size)
    plan = schedule(configs(architecture_of(dy.device), True, dy.element_size(), align), M, N, K, True, dy.device)
    parts, limit = plan.parts(out), dropout_limit(dropout_p)
    with on_device(dy):
        lora_linear_dx_kernel[plan.grid](
            dy,
            codes,
            *stored(scales),
            tables,
            g,
            lora_A,
            dy if row_scale is None else row_scale,
            dy if limit is None else seed,
            parts,
            M,
            N,
            K,
            R,
            K // 2,
            plan.steps,
            1.0 / (1.0 - dropout_p),
            limit or 0,
            BLOCK=block_size,
            ALIGNMENT=align,
            NESTED=scales[1] is not None,
            ROW_SCALE=row_scale is not None,
            DROPOUT=limit is not None,
            WIDE=out.numel() > 1 << 32,
            BR=RANKS,
            **plan.constants(dy),
        )
        if plan.splits > 1:
            sum_splits(parts, None, None, out)


def stored(scales: list[Tensor | None]) -> list[Tensor | None]:
    """absmax and what nests it; itself in the place of what there is not, which no kernel reads."""
    return [scale if scale is not None else scales[0] for scale in scales]

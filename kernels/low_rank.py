"""The narrow products of an adapter: x A^T and dY B, [M, R]; and its gradients G^T x and (x A^T)^T dY, sums over rows.

Each reads x or dY once for 32 or 64 ranks, and makes dropout's mask again from the seed. Sums are split among programs
and their parts added in order: the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftrt.kernels._adapter import dropout_limit, exact_dot, kept
from peftrt.kernels._launch import on_device
from peftrt.kernels._schedule import MANY, PRECISION, Config, architecture_of, ranges, schedule, split_steps, sum_splits


@triton.jit
def low_rank_kernel(
    p_x,
    p_a,
    p_column_scale,
    p_seed,
    p_out,
    M,
    K,
    R,
    stride_r,
    stride_k,
    steps,
    factor,
    limit,
    COLUMN_SCALE: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile [BM, BN] of ``factor drop(x) A^T``, BN ranks. Where SPLIT, a sum over ``steps`` steps of K only."""
    # neighbouring programs share a tile of x
    i_r = tl.program_id(0) % tl.cdiv(R, BN) * BN
    i_m = tl.program_id(0) // tl.cdiv(R, BN)
    i_first = tl.program_id(1) * steps
    i_last = tl.minimum(i_first + steps, tl.cdiv(K, BK))
    o_m = i_m.to(tl.int64) * BM + tl.arange(0, BM)
    o_r = i_r + tl.arange(0, BN)
    m_m = o_m < M
    m_r = o_r < R
    b_sum = tl.zeros((BM, BN), tl.float32)
    for i in range(i_first, i_last):
        o_k = (i * BK + tl.arange(0, BK)).to(tl.int64)
        m_k = o_k < K
        o_x = o_m[:, None] * K + o_k[None, :]
        b_x = tl.load(p_x + o_x, mask=m_m[:, None] & m_k[None, :], other=0.0)
        if DROPOUT:
            b_x = tl.where(kept(p_seed, limit, o_x, WIDE), b_x, 0.0)
        p_row = p_a + o_r.to(tl.int64)[:, None] * stride_r + o_k[None, :] * stride_k
        b_a = tl.load(p_row, mask=m_r[:, None] & m_k[None, :], other=0.0).to(tl.float32)
        if COLUMN_SCALE:
            b_a *= tl.load(p_column_scale + o_k, mask=m_k, other=0.0)[None, :]
        b_sum = exact_dot(b_x, b_a.T, b_sum, PRECISION)
    if SPLIT:
        p_out += tl.program_id(1).to(tl.int64) * M * R
    tl.store(p_out + o_m[:, None] * R + o_r[None, :], b_sum * factor, mask=m_m[:, None] & m_r[None, :])


@triton.jit
def low_rank_gradient_kernel(
    p_left,
    p_x,
    p_column_scale,
    p_seed,
    p_out,
    M,
    K,
    R,
    stride_r,
    stride_k,
    steps,
    factor,
    limit,
    COLUMN_SCALE: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile [BR, BK] of ``factor left^T drop(x)`` over ``steps`` steps of BM rows, of [splits, R, K] by strides."""
    # neighbouring programs share a tile of x
    i_r = tl.program_id(0) % tl.cdiv(R, BR) * BR
    i_k = tl.program_id(0) // tl.cdiv(R, BR)
    i_first = tl.program_id(1) * steps
    i_last = tl.minimum(i_first + steps, tl.cdiv(M, BM))
    o_r = i_r + tl.arange(0, BR)
    o_k = i_k.to(tl.int64) * BK + tl.arange(0, BK)
    m_r = o_r < R
    m_k = o_k < K
    b_sum = tl.zeros((BR, BK), tl.float32)
    for i in range(i_first, i_last):
        o_m = (i * BM + tl.arange(0, BM)).to(tl.int64)
        m_m = o_m < M
        p_row = p_left + o_m[:, None] * R + o_r[None, :]
        b_left = tl.load(p_row, mask=m_m[:, None] & m_r[None, :], other=0.0)
        o_x = o_m[:, None] * K + o_k[None, :]
        b_x = tl.load(p_x + o_x, mask=m_m[:, None] & m_k[None, :], other=0.0)
        if DROPOUT:
            b_x = tl.where(kept(p_seed, limit, o_x, WIDE), b_x, 0.0)
        b_sum = exact_dot(b_left.T, b_x, b_sum, PRECISION)
    if COLUMN_SCALE:
        b_sum *= tl.load(p_column_scale + o_k, mask=m_k, other=0.0)[None, :]
    p_out += tl.program_id(1).to(tl.int64) * R * K
    p_tile = p_out + o_r.to(tl.int64)[:, None] * stride_r + o_k[None, :] * stride_k
    tl.store(p_tile, (b_sum * factor).to(p_out.dtype.element_ty), mask=m_r[:, None] & m_k[None, :])


# 32 rows at most (``exact_dot``). Ranges of rows split their sums for themselves. Not measured on a device; chosen by
# code compiled for sm_90 (Triton 3.7.1, bf16, R = 16, November 2026): 13.8 instructions for an element of x in x A^T,
# 31 with dropout; 9.1 and 31 in A's gradient. For x A^T at M = 2048 and K = 4096 these issue in 3.9 µs on an H200, in
# 8.8 with dropout; x is read from memory in 3.5.
ROW_RANGES = (32, 128, 512, 2048, MANY)
STAGES = {"sm_90": 3, "sm_80": 3, "hip": 2}
GRADIENT_ROWS, GRADIENT_COLUMNS, GRADIENT_WARPS = 32, 128, 4


def narrow_configs(architecture: str, rank: int, itemsize: int) -> tuple[Config, ...]:
    """By rows; BN ranks a program, so that x is read once for up to 64: in fp32 32, which have more parts to keep."""
    ranks = 16 if rank <= 16 else 32 if rank <= 32 or itemsize == 4 else 64
    # Each warp has 16 of the 32 rows; of four, two would convert and multiply the same.
    warps = 2 if ranks < 64 else 4
    return ranges(ROW_RANGES, 32, ranks, 64, warps=warps, stages=STAGES[architecture], split=True)


def low_rank(
    x: Tensor,
    right: Tensor,
    out: Tensor,
    *,
    factor: float = 1.0,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    column_scale: Tensor | None = None,
) -> None:
    """``out = factor drop(column_scale x) right^T``, sums in fp32.

    Args:
        x: [M, K], fp32, bf16 or fp16, contiguous.
        right: [R, K], fp32, bf16 or fp16, any strides: A, or B transposed.
        out: fp32 [M, R], contiguous.
        factor: of the result.
        seed, dropout_p: of the zeros in x; the rest is scaled up. ``seed``: int64 [1], or None.
        column_scale: fp32 [K], or None.
    """
    if out.numel() == 0:
        return
    (M, K), R, limit = x.shape, right.shape[0], dropout_limit(dropout_p)
    plan = schedule(narrow_configs(architecture_of(x.device), R, x.element_size()), M, R, K, False, x.device)
    parts = plan.parts(out)
    with on_device(x):
        low_rank_kernel[plan.grid](
            x,
            right,
            x if column_scale is None else column_scale,
            x if limit is None else seed,
            parts,
            M,
            K,
            R,
            *right.stride(),
            plan.steps,
            factor / (1.0 - dropout_p),
            limit or 0,
            COLUMN_SCALE=column_scale is not None,
            DROPOUT=limit is not None,
            WIDE=x.numel() > 1 << 32,
            **plan.constants(x),
        )
        if plan.splits > 1:
            sum_splits(parts, None, None, out)


def low_rank_gradient(
    left: Tensor,
    x: Tensor,
    out: Tensor,
    *,
    factor: float = 1.0,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    column_scale: Tensor | None = None,
) -> None:
    """``out = factor left^T drop(x) column_scale``, sums over rows in fp32.

    Args:
        left: fp32 [M, R], contiguous.
        x: [M, K], fp32, bf16 or fp16, contiguous.
        out: [R, K], or a contiguous [K, R] transposed; fp32, bf16 or fp16.
        factor, seed, dropout_p: as of :func:`low_rank`.
        column_scale: fp32 [K], or None.
    """
    if out.numel() == 0:
        return
    (M, K), R, limit = x.shape, left.shape[1], dropout_limit(dropout_p)
    ranks, architecture = 16 if R <= 16 else 32, architecture_of(x.device)
    tiles, total = triton.cdiv(R, ranks) * triton.cdiv(K, GRADIENT_COLUMNS), triton.cdiv(M, GRADIENT_ROWS)
    steps = split_steps(tiles, total, x.device)
    splits = max(triton.cdiv(total, steps), 1)
    # whichever of its two sides is contiguous: parts are added as they lie
    flat = out if out.is_contiguous() else out.t()
    parts = flat if splits == 1 else flat.new_empty((splits, *flat.shape), dtype=torch.float32)
    with on_device(x):
        low_rank_gradient_kernel[(tiles, splits)](
            left,
            x,
            x if column_scale is None else column_scale,
            x if limit is None else seed,
            parts,
            M,
            K,
            R,
            *out.stride(),
            steps,
            factor / (1.0 - dropout_p),
            limit or 0,
            COLUMN_SCALE=column_scale is not None,
            DROPOUT=limit is not None,
            WIDE=x.numel() > 1 << 32,
            BM=GRADIENT_ROWS,
            BK=GRADIENT_COLUMNS,
            BR=ranks,
            PRECISION=PRECISION[architecture] if x.is_cuda else "ieee",
            num_warps=GRADIENT_WARPS,
            num_stages=STAGES[architecture],
            enable_fp_fusion=False,
        )
        if splits > 1:
            sum_splits(parts, None, None, flat)

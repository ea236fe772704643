"""lora_linear over a dense base, y and dX alike; and an adapter's share alone, for cuBLAS to add the base's to."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftrt.kernels._adapter import RANKS, adapter_tile, dropout_limit, kept
from peftrt.kernels._launch import on_device
from peftrt.kernels._schedule import MANY, PRECISION, Config, architecture_of, ranges, schedule, sum_splits
from peftrt.kernels._tiles import dense_tile


@triton.jit
def lora_linear_dense_kernel(
    p_x,
    p_w,
    p_left,
    p_right,
    p_row_scale,
    p_bias,
    p_seed,
    p_out,
    M,
    S,
    C,
    R,
    stride_s,
    stride_c,
    stride_r,
    stride_right,
    steps,
    factor,
    limit,
    SCALED_SUM: tl.constexpr,
    SCALED_RESULT: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile [BM, BN] of ``x W + drop'(factor left right)``, W [S, C] dense and right [R, C]: y, and dX.

    The row scale is that of the sum's terms for dX, that of the result's columns for y.
    """
    i_m = tl.program_id(0) % tl.cdiv(M, BM)
    i_c = tl.program_id(0) // tl.cdiv(M, BM)
    i_first = tl.program_id(1) * steps
    i_last = tl.minimum(i_first + steps, tl.cdiv(S, BK))
    o_m = i_m.to(tl.int64) * BM + tl.arange(0, BM)
    o_c = i_c.to(tl.int64) * BN + tl.arange(0, BN)
    m_m = o_m < M
    m_c = o_c < C
    ranks = tl.where(tl.program_id(1) == 0, R, 0)
    b_sum = tl.zeros((BM, BN), tl.float32)
    if DROPOUT:
        b_sum = adapter_tile(
            p_left, p_right, b_sum, o_m, m_m, o_c, m_c, R, ranks, stride_r, stride_right, factor, BR, PRECISION
        )
        b_sum = tl.where(kept(p_seed, limit, o_m[:, None] * C + o_c[None, :], WIDE), b_sum, 0.0)
    b_sum = dense_tile(
        p_x,
        p_w,
        p_row_scale,
        b_sum,
        o_m,
        m_m,
        o_c,
        m_c,
        i_first,
        i_last,
        S,
        stride_s,
        stride_c,
        SCALED_SUM,
        BK,
        PRECISION,
    )
    if not DROPOUT:
        # before the loop, ptxas would wait after every wgmma in it (C7515)
        b_sum = adapter_tile(
            p_left, p_right, b_sum, o_m, m_m, o_c, m_c, R, ranks, stride_r, stride_right, factor, BR, PRECISION
        )
    if SCALED_RESULT:
        b_sum *= tl.load(p_row_scale + o_c, mask=m_c, other=0.0)[None, :]
    if BIAS:
        b_sum += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    if SPLIT:
        p_out += tl.program_id(1).to(tl.int64) * M * C
    p_tile = p_out + o_m[:, None] * C + o_c[None, :]
    tl.store(p_tile, b_sum.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_c[None, :])


@triton.jit
def adapter_share_kernel(
    p_left,
    p_right,
    p_row_scale,
    p_bias,
    p_seed,
    p_out,
    M,
    C,
    R,
    stride_r,
    stride_right,
    stride_out,
    first,
    columns,
    factor,
    limit,
    SCALED_RESULT: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile [BM, BN] of ``scale drop'(factor left right) + bias``: C columns of ``columns``, from ``first``."""
    i_m = tl.program_id(0) % tl.cdiv(M, BM)
    i_c = tl.program_id(0) // tl.cdiv(M, BM)
    o_m = i_m.to(tl.int64) * BM + tl.arange(0, BM)
    o_c = i_c.to(tl.int64) * BN + tl.arange(0, BN)
    m_m = o_m < M
    m_c = o_c < C
    b_sum = tl.zeros((BM, BN), tl.float32)
    b_sum = adapter_tile(
        p_left, p_right, b_sum, o_m, m_m, o_c, m_c, R, R, stride_r, stride_right, factor, BR, PRECISION
    )
    if DROPOUT:
        o_index = o_m[:, None] * columns + (first + o_c)[None, :]
        b_sum = tl.where(kept(p_seed, limit, o_index, WIDE), b_sum, 0.0)
    if SCALED_RESULT:
        b_sum *= tl.load(p_row_scale + o_c, mask=m_c, other=0.0)[None, :]
    if BIAS:
        b_sum += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    p_tile = p_out + o_m[:, None] * stride_out + o_c[None, :]
    tl.store(p_tile, b_sum.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_c[None, :])


# Of a dense base, by architecture and bytes of an element, for both passes: columns of the result BN, terms of the sum
# BK. NF4's are those of nf4_linear. Chosen by compiled code; not measured on a device.
DENSE_CONFIGS: dict[tuple[str, int], tuple[Config, ...]] = {
    ("sm_90", 2): (
        Config(16, 16, 64, 128, warps=4, stages=4, split=True),
        Config(64, 64, 128, 64, warps=4, stages=4, split=True),
        *ranges((128, 256, MANY), 128, 128, 64, warps=4, stages=3, split=True),
    ),
    ("sm_90", 4): ranges((32, 128, MANY), 32, 128, 32, warps=4, stages=3, split=True),
    ("sm_80", 2): (
        Config(16, 16, 64, 128, warps=4, stages=3, split=True),
        *ranges((64, 128, MANY), 64, 128, 64, warps=4, stages=3, split=True),
    ),
    ("sm_80", 4): ranges((32, 128, MANY), 32, 128, 32, warps=4, stages=3, split=True),
    ("hip", 2): (
        Config(16, 16, 64, 128, warps=4, stages=2, split=True),
        *ranges((128, MANY), 128, 128, 64, warps=4, stages=2, split=True),
    ),
    ("hip", 4): ranges((32, 128, MANY), 32, 64, 64, warps=4, stages=2, split=True),
}
# The adapter's share alone is bound by what it writes.
SHARE = {"BM": 32, "BN": 128, "num_warps": 4}


def lora_linear_dense(
    x: Tensor,
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    out: Tensor,
    *,
    factor: float = 1.0,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    bias: Tensor | None = None,
    sum_scale: Tensor | None = None,
    result_scale: Tensor | None = None,
) -> None:
    """``out = result_scale ((sum_scale x) W + drop'(factor left right)) + bias``, sums in fp32.

    Args:
        x: [M, S], fp32, bf16 or fp16, contiguous.
        weight: W [S, C] in x's dtype, any strides.
        left: fp32 [M, R], contiguous.
        right: [R, C], fp32, bf16 or fp16, any strides.
        out: [M, C] in x's dtype, contiguous.
        factor: of the adapter's share.
        seed, dropout_p: of the zeros in the adapter's share, over the flat indices of ``out``; the rest is scaled up.
        bias: [C] in x's dtype, or None.
        sum_scale: fp32 [S], or None; W, whose rows it scales, is rounded again.
        result_scale: fp32 [C], or None.
    """
    if out.numel() == 0:
        return
    (M, S), C, R = x.shape, out.shape[1], left.shape[1]
    by_rows = DENSE_CONFIGS[architecture_of(x.device), x.element_size()]
    plan, limit = schedule(by_rows, M, C, S, False, x.device), dropout_limit(dropout_p)
    parts, once = plan.parts(out), plan.splits == 1
    row_scale = result_scale if sum_scale is None else sum_scale
    with on_device(x):
        lora_linear_dense_kernel[plan.grid](
            x,
            weight,
            left,
            right,
            x if row_scale is None else row_scale,
            x if bias is None else bias,
            x if limit is None else seed,
            parts,
            M,
            S,
            C,
            R,
            *weight.stride(),
            *right.stride(),
            plan.steps,
            factor / (1.0 - dropout_p),
            limit or 0,
            SCALED_SUM=sum_scale is not None,
            SCALED_RESULT=result_scale is not None and once,
            BIAS=bias is not None and once,
            DROPOUT=limit is not None,
            WIDE=out.numel() > 1 << 32,
            BR=RANKS,
            **plan.constants(x),
        )
        if not once:
            sum_splits(parts, result_scale, bias, out)


def dense_parts(x: Tensor, weight: Tensor, columns: int) -> Tensor:
    """fp32 [parts, M, columns] whose sum is x W, without an adapter: for a kernel that adds to it and rounds once.

    x [M, S] and W [S, C] as of :func:`lora_linear_dense`.
    """
    M, S = x.shape
    by_rows = DENSE_CONFIGS[architecture_of(x.device), x.element_size()]
    plan = schedule(by_rows, M, columns, S, False, x.device)
    parts = x.new_empty((plan.splits, M, columns), dtype=torch.float32)
    if parts.numel() == 0:
        return parts
    flags = ("SCALED_SUM", "SCALED_RESULT", "BIAS", "DROPOUT", "WIDE")
    constants = plan.constants(x) | dict.fromkeys(flags, False) | {"SPLIT": True, "BR": RANKS}
    strides = (*weight.stride(), 0, 0)
    with on_device(x):
        # no ranks: what stands for the adapter is not read
        lora_linear_dense_kernel[plan.grid](
            x, weight, parts, x, x, x, x, parts, M, S, columns, 0, *strides, plan.steps, 1.0, 0, **constants
        )
    return parts


def adapter_share(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    *,
    factor: float = 1.0,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    bias: Tensor | None = None,
    result_scale: Tensor | None = None,
    first: int = 0,
    columns: int = 0,
) -> None:
    """``out = result_scale drop'(factor left right) + bias``: columns of a result, from ``first``, of ``columns``.

    ``out`` [M, C] may be a slice of columns; the rest as of :func:`lora_linear_dense`.
    """
    if out.numel() == 0:
        return
    (M, R), C, limit = left.shape, out.shape[1], dropout_limit(dropout_p)
    precision = PRECISION[architecture_of(left.device)] if left.is_cuda else "ieee"
    with on_device(left):
        adapter_share_kernel[(triton.cdiv(M, SHARE["BM"]) * triton.cdiv(C, SHARE["BN"]),)](
            left,
            right,
            left if result_scale is None else result_scale,
            left if bias is None else bias,
            left if limit is None else seed,
            out,
            M,
            C,
            R,
            *right.stride(),
            out.stride(0),
            first,
            columns,
            factor / (1.0 - dropout_p),
            limit or 0,
            SCALED_RESULT=result_scale is not None,
            BIAS=bias is not None,
            DROPOUT=limit is not None,
            WIDE=M * columns > 1 << 32,
            BR=RANKS,
            PRECISION=precision,
            enable_fp_fusion=False,
            **SHARE,
        )

"""Tiles of products with a base weight: the loops that the bare products and those with an adapter share."""

from __future__ import annotations

import triton
import triton.language as tl

from peftrt.kernels._nf4 import (
    CHUNKS,
    codebook,
    decode_scales,
    levels,
    load_chunk_scales,
    scale_chunks,
    straddling_tile,
)


@triton.jit
def nf4_tile(
    p_x,
    p_codes,
    p_scales,
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
    BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    NESTED: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``b_sum + x W^T`` for rows ``o_m`` of x and ``o_n`` of W, over steps ``[i_first, i_last)`` of K.

    The weight is the operand in shared memory: as the one in registers, Triton would overwrite it while wgmma still
    reads (triton #9433).
    """
    b_codebook = codebook(p_tables, o_n.shape[0])
    if ALIGNMENT == CHUNKS:
        # scales are loaded a step ahead: behind a nested one is a chain of loads
        b_absmax, b_step = load_chunk_scales(p_scales, o_n * K, m_n, i_first * BK, K, BLOCK, BK, NESTED)
    for i in range(i_first, i_last):
        o_k = i * BK + tl.arange(0, BK)
        m_k = o_k < K
        b_x = tl.load(p_x + o_m[:, None] * K + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        if ALIGNMENT == CHUNKS:
            o_byte = i * (BK // 2) + tl.arange(0, BK // 2)
            p_byte = p_codes + o_n[:, None] * row_bytes + o_byte[None, :]
            b_codes = tl.load(p_byte, mask=m_n[:, None] & (o_byte < row_bytes)[None, :], other=0)
            b_scale = decode_scales(b_absmax, b_step, p_scales, p_tables, NESTED)
            b_absmax, b_step = load_chunk_scales(p_scales, o_n * K, m_n, (i + 1) * BK, K, BLOCK, BK, NESTED)
            b_w = scale_chunks(levels(b_codes, b_codebook), b_scale)
        else:
            b_w = straddling_tile(
                p_codes, p_scales, p_tables, b_codebook, o_n * K, m_n, i * BK, K, BLOCK, BK, ALIGNMENT, NESTED
            )
        b_sum = tl.dot(b_x, b_w.to(b_x.dtype).T, b_sum, input_precision=PRECISION)
    return b_sum


@triton.jit
def nf4_dx_tile(
    p_dy,
    p_codes,
    p_scales,
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
    BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    NESTED: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``b_sum + dY W`` for rows ``o_m`` of dY and columns ``[i_k, i_k + BK)`` of W, over steps of N.

    Where ROW_SCALE, W's rows are scaled by ``p_row_scale`` before they are rounded: no rounding is added.
    """
    b_codebook = codebook(p_tables, BN)
    if ALIGNMENT == CHUNKS:
        o_next = (i_first * BN + tl.arange(0, BN)).to(tl.int64)
        b_absmax, b_step = load_chunk_scales(p_scales, o_next * K, o_next < N, i_k, K, BLOCK, BK, NESTED)
    for i in range(i_first, i_last):
        o_n = (i * BN + tl.arange(0, BN)).to(tl.int64)
        m_n = o_n < N
        b_dy = tl.load(p_dy + o_m[:, None] * N + o_n[None, :], mask=m_m[:, None] & m_n[None, :], other=0.0)
        if ROW_SCALE:
            b_row_scale = tl.load(p_row_scale + o_n, mask=m_n, other=0.0)[:, None]
        if ALIGNMENT == CHUNKS:
            o_byte = i_k // 2 + tl.arange(0, BK // 2)
            p_byte = p_codes + o_n[:, None] * row_bytes + o_byte[None, :]
            b_codes = tl.load(p_byte, mask=m_n[:, None] & (o_byte < row_bytes)[None, :], other=0)
            b_scale = decode_scales(b_absmax, b_step, p_scales, p_tables, NESTED)
            if ROW_SCALE:
                b_scale *= b_row_scale
            o_next = o_n + BN
            b_absmax, b_step = load_chunk_scales(p_scales, o_next * K, o_next < N, i_k, K, BLOCK, BK, NESTED)
            b_w = scale_chunks(levels(b_codes, b_codebook), b_scale)
        else:
            b_w = straddling_tile(
                p_codes, p_scales, p_tables, b_codebook, o_n * K, m_n, i_k, K, BLOCK, BK, ALIGNMENT, NESTED
            )
            if ROW_SCALE:
                b_w *= b_row_scale
        b_sum = tl.dot(b_dy, b_w.to(b_dy.dtype), b_sum, input_precision=PRECISION)
    return b_sum


@triton.jit
def dense_tile(
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
    ROW_SCALE: tl.constexpr,
    BS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``b_sum + x W`` for rows ``o_m`` of x [M, S] and columns ``o_c`` of W [S, C], any strides, over steps of S.

    Where ROW_SCALE, W's rows are scaled by ``p_row_scale``, in fp32, and rounded to its dtype again. Scaling x instead
    would make it the operand in registers (see ``nf4_tile``).
    """
    for i in range(i_first, i_last):
        o_s = (i * BS + tl.arange(0, BS)).to(tl.int64)
        m_s = o_s < S
        b_x = tl.load(p_x + o_m[:, None] * S + o_s[None, :], mask=m_m[:, None] & m_s[None, :], other=0.0)
        p_tile = p_w + o_s[:, None] * stride_s + o_c[None, :] * stride_c
        b_w = tl.load(p_tile, mask=m_s[:, None] & m_c[None, :], other=0.0)
        if ROW_SCALE:
            b_row_scale = tl.load(p_row_scale + o_s, mask=m_s, other=0.0)
            b_w = (b_w.to(tl.float32) * b_row_scale[:, None]).to(b_x.dtype)
        b_sum = tl.dot(b_x, b_w, b_sum, input_precision=PRECISION)
    return b_sum

"""What the NF4 kernels share: looking codes up, decoding scales, a tile of a weight in any alignment.

A code is looked up with ``tl.gather`` in a table of 16 fp32 values that lies across the lanes of a warp: one shuffle a
weight, exact in fp32, and one source for NVIDIA, AMD and the interpreter. Compiled for sm_90 (Triton 3.7.1, forward
tile 64 x 128 x 64, November 2026) the loop has 6.8 instructions a weight with nested scales and rounding, 3.1 of them
on the ALU pipe; with 128 rows 7.3 and 3.3. Byte permutations took 9.1 and 6.9 with plain scales, a tree of selections
over 20.

A table of pairs of levels in the operand's dtype takes fewer (2.9 before scaling, this gather 4.8; Triton 3.6.0), but
its levels are rounded before they are scaled. Against fp64 over normal weights of 1024 x 4096 (in plain torch on a
CPU, November 2026) the product's error is then 1.16 times that of decoding with one rounding (scaled in fp32 and
rounded again), or 1.33 times (scaled in bf16); fp16 1.19 and 1.35. With scales on the fp32 sums it is 0.92 times, but
that costs BM / 32 instructions a weight, and cannot be done for dX, whose sum runs over scales.

Every kernel is compiled with ``enable_fp_fusion=False``: a nested scale is a product and a sum with a rounding each.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Consecutive weights of a row that share a scale wherever K and the block size are multiples of it.
CHUNK = tl.constexpr(64)
# How the rows of a weight [N, K] lie over bytes and blocks.
CHUNKS = tl.constexpr(0)  # chunks of a row have one scale each
STRADDLING = tl.constexpr(1)  # blocks straddle rows
ODD = tl.constexpr(2)  # and bytes do


def alignment(k: int, block_size: int) -> int:
    """CHUNKS, STRADDLING or ODD."""
    if k % CHUNK.value == 0 and block_size % CHUNK.value == 0:
        return CHUNKS.value
    return STRADDLING.value if k % 2 == 0 else ODD.value


@triton.jit
def codebook(p_tables, ROWS: tl.constexpr):
    """The NF4 levels in fp32, a copy for every row: [ROWS, 16]."""
    return tl.broadcast_to(tl.load(p_tables + tl.arange(0, 16))[None, :], (ROWS, 16))


@triton.jit
def levels(b_codes, b_codebook):
    """Levels of packed codes [ROWS, BYTES], the high nibble first: fp32 [ROWS, 2 BYTES]."""
    b_first = tl.gather(b_codebook, (b_codes >> 4).to(tl.int32), 1)
    b_second = tl.gather(b_codebook, (b_codes & 15).to(tl.int32), 1)
    return tl.join(b_first, b_second).reshape(b_codes.shape[0], 2 * b_codes.shape[1])


@triton.jit
def load_scales(p_scales, o_block, m_block, NESTED: tl.constexpr):
    """Blocks' scales as they are stored: (absmax, step of its 256 neighbours) where nested, else (absmax, absmax)."""
    b_absmax = tl.load(p_scales[0] + o_block, mask=m_block, other=0)
    if NESTED:
        b_step = tl.load(p_scales[1] + o_block // 256, mask=m_block, other=0.0)
    else:
        b_step = b_absmax
    return b_absmax, b_step


@triton.jit
def decode_scales(b_absmax, b_step, p_scales, p_tables, NESTED: tl.constexpr):
    """fp32 scales of what ``load_scales`` gave: ``dynamic[absmax] * step``, rounded, ``+ offset``, rounded."""
    if NESTED:
        return tl.load(p_tables + 16 + b_absmax.to(tl.int32)) * b_step + tl.load(p_scales[2])
    else:
        return b_absmax


@triton.jit
def load_chunk_scales(p_scales, o_row, m_row, i_column, K, BLOCK: tl.constexpr, BK: tl.constexpr, NESTED: tl.constexpr):
    """``load_scales`` for the chunks of rows in columns ``[i_column, i_column + BK)``: [rows, BK / CHUNK]."""
    i_chunk = i_column + tl.arange(0, BK // CHUNK) * CHUNK
    m_chunk = m_row[:, None] & (i_chunk < K)[None, :]
    return load_scales(p_scales, (o_row[:, None] + i_chunk[None, :]) // BLOCK, m_chunk, NESTED)


@triton.jit
def scale_chunks(b_level, b_scale):
    """Levels [ROWS, BK] times scales [ROWS, BK / CHUNK]."""
    ROWS: tl.constexpr = b_level.shape[0]
    BK: tl.constexpr = b_level.shape[1]
    return (b_level.reshape(ROWS, BK // CHUNK, CHUNK) * b_scale[:, :, None]).reshape(ROWS, BK)


@triton.jit
def straddling_tile(
    p_codes,
    p_scales,
    p_tables,
    b_codebook,
    o_row,
    m_row,
    i_column,
    K,
    BLOCK: tl.constexpr,
    BK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    NESTED: tl.constexpr,
):
    """fp32 weights of rows in columns ``[i_column, i_column + BK)`` in any alignment: [rows, BK].

    ``o_row`` int64: position of each row's first weight. Zeros where ``m_row`` is false and from column K on.
    """
    o_start = o_row + i_column
    i_pair = 2 * tl.arange(0, BK // 2)
    m_first = m_row[:, None] & (i_column + i_pair < K)[None, :]
    b_byte = tl.load(p_codes + (o_start // 2)[:, None] + (i_pair // 2)[None, :], mask=m_first, other=0)
    b_first = b_byte >> 4
    b_second = b_byte & 15
    if ALIGNMENT == ODD:
        # a row at an odd position starts with a low nibble, and its pairs lie in two bytes
        m_second = m_row[:, None] & (i_column + i_pair + 1 < K)[None, :]
        m_low = (o_start % 2 == 1)[:, None]
        b_after = tl.load(p_codes + ((o_start + 1) // 2)[:, None] + (i_pair // 2)[None, :], mask=m_second, other=0)
        b_first = tl.where(m_low, b_second, b_first)
        b_second = tl.where(m_low, b_after >> 4, b_second)
    b_first_scale, b_second_scale = straddling_scales(
        p_scales, p_tables, o_start, m_row, i_column, i_pair, K, BLOCK, BK, ALIGNMENT, NESTED
    )
    b_first_value = tl.gather(b_codebook, b_first.to(tl.int32), 1) * tl.where(m_first, b_first_scale, 0.0)
    if ALIGNMENT == ODD:
        b_second_scale = tl.where(m_second, b_second_scale, 0.0)
    else:
        b_second_scale = tl.where(m_first, b_second_scale, 0.0)
    b_second_value = tl.gather(b_codebook, b_second.to(tl.int32), 1) * b_second_scale
    return tl.join(b_first_value, b_second_value).reshape(b_first.shape[0], BK)


@triton.jit
def straddling_scales(
    p_scales,
    p_tables,
    o_start,
    m_row,
    i_column,
    i_pair,
    K,
    BLOCK: tl.constexpr,
    BK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    NESTED: tl.constexpr,
):
    """Scales of the first and of the second weight of each pair: the few blocks that BK weights touch, and a choice."""
    o_block = o_start // BLOCK
    i_next = (BLOCK - o_start % BLOCK).to(tl.int32)  # where the row's next block begins, counted from i_column
    b_absmax, b_step = load_scales(p_scales, o_block, m_row & (i_column < K), NESTED)
    b_scale = decode_scales(b_absmax, b_step, p_scales, p_tables, NESTED)
    b_first = tl.broadcast_to(b_scale[:, None], (o_start.shape[0], BK // 2))
    b_second = b_first
    for _ in tl.static_range((BK + BLOCK - 2) // BLOCK):
        o_block += 1
        m_block = m_row & (i_next < BK) & (i_column + i_next < K)
        b_absmax, b_step = load_scales(p_scales, o_block, m_block, NESTED)
        b_scale = decode_scales(b_absmax, b_step, p_scales, p_tables, NESTED)
        b_first = tl.where(i_pair[None, :] >= i_next[:, None], b_scale[:, None], b_first)
        if ALIGNMENT == ODD:
            b_second = tl.where(i_pair[None, :] + 1 >= i_next[:, None], b_scale[:, None], b_second)
        else:
            b_second = b_first
        i_next += BLOCK
    return b_first, b_second

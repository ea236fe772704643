"""What the kernels of an adapter share: products in fp32, dropout's mask, an adapter's share of a tile.

Adapters are fp32 over a bf16 or fp16 base, and their products keep that: one product of TF32 would round x A^T to 11
bits. Three do not (``PRECISION``), and two where x is bf16 or fp16, which TF32 holds exactly: then the other factor
alone has a part below its first 11 bits, of which the second product drops at most the last two of the value's 24.
Parts in x's own dtype would be cheaper still, but fp16 has no exponents for the lower part of a small A.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix(b_word):
    """MurmurHash3's finaliser, of uint32."""
    b_word = (b_word ^ (b_word >> 16)) * 0x85EBCA6B
    b_word = (b_word ^ (b_word >> 13)) * 0xC2B2AE35
    return b_word ^ (b_word >> 16)


@triton.jit
def kept(p_seed, limit, o_index, WIDE: tl.constexpr):
    """Where dropout keeps the elements of flat index ``o_index``: the mask of ``peftrt.reference.dropout``, bit by bit.

    ``limit`` is what ``dropout_limit`` says; WIDE: indices may have more than 32 bits.
    """
    i_seed = tl.load(p_seed)
    i_low = i_seed.to(tl.uint32)
    i_key = mix(mix(i_low ^ 0x9E3779B9) ^ (i_seed >> 32).to(tl.uint32))
    b_word = mix(o_index.to(tl.uint32) ^ i_low) ^ i_key
    if WIDE:
        b_word ^= mix((o_index >> 32).to(tl.uint32))
    return (mix(b_word) ^ 0x80000000).to(tl.int32, bitcast=True) > limit


def dropout_limit(p: float) -> int | None:
    """An element is kept iff its word, less 2^31, is greater: int32 for every p. None where all are kept."""
    dropped = round(p * 2**32)
    return dropped - 1 - 2**31 if dropped else None


@triton.jit
def exact_dot(b_left, b_right, b_sum, PRECISION: tl.constexpr):
    """``b_sum + b_left b_right`` with the accuracy of fp32; each of them is fp32, bf16 or fp16.

    All products go to one sum: Triton's own "tf32x3" would hold a second one in registers. In a loop it is for kernels
    of 32 rows at most, so that mma.sync is chosen: wgmma would read the parts of a value from registers while the next
    round overwrites them (triton #9433). An infinite factor becomes NaN.
    """
    b_wide_left = b_left.to(tl.float32)
    b_wide_right = b_right.to(tl.float32)
    if PRECISION != "tf32x3":
        return tl.dot(b_wide_left, b_wide_right, b_sum, input_precision=PRECISION)
    b_left_high = high_part(b_wide_left) if b_left.dtype == tl.float32 else b_wide_left
    b_right_high = high_part(b_wide_right) if b_right.dtype == tl.float32 else b_wide_right
    if b_left.dtype == tl.float32:
        b_sum = tl.dot(b_wide_left - b_left_high, b_right_high, b_sum, input_precision="tf32")
    if b_right.dtype == tl.float32:
        b_sum = tl.dot(b_left_high, b_wide_right - b_right_high, b_sum, input_precision="tf32")
    return tl.dot(b_left_high, b_right_high, b_sum, input_precision="tf32")


@triton.jit
def high_part(b_value):
    """The first 11 bits of fp32 values, which TF32 holds exactly."""
    return (b_value.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


# Ranks of a round of ``adapter_tile``: with 32, tiles of 128 rows would spill registers on sm_90.
RANKS = 16


@triton.jit
def adapter_tile(
    p_left,
    p_right,
    b_sum,
    o_m,
    m_m,
    o_column,
    m_column,
    R,
    ranks,
    stride_r,
    stride_column,
    factor,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``b_sum + factor left right``: rows ``o_m`` of left [M, R], fp32, and columns ``o_column`` of right [R, columns].

    The first ``ranks`` of the R ranks, all or none, BR at a time. The loop is not pipelined: it has one round for most
    adapters, and three products in each.
    """
    for i_r in tl.range(0, ranks, BR, num_stages=1):
        o_r = i_r + tl.arange(0, BR)
        m_r = o_r < R
        p_row = p_left + o_m[:, None] * R + o_r[None, :]
        b_left = tl.load(p_row, mask=m_m[:, None] & m_r[None, :], other=0.0) * factor
        p_column = p_right + o_r.to(tl.int64)[:, None] * stride_r + o_column[None, :] * stride_column
        b_right = tl.load(p_column, mask=m_r[:, None] & m_column[None, :], other=0.0)
        b_sum = exact_dot(b_left, b_right, b_sum, PRECISION)
    return b_sum

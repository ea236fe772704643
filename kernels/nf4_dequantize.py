"""nf4_dequantize: codes and scales, nested ones too, to values in one launch; of a whole weight or of some columns."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from peftrt.kernels._launch import on_device
from peftrt.kernels._nf4 import decode_scales, load_scales


@triton.jit
def decode_groups(p_codes, p_scales, p_tables, o_byte, m_byte, o_block, m_group, NESTED: tl.constexpr):
    """fp32 values [GROUPS, 32] of groups of 32 weights, whose bytes lie at ``o_byte`` [GROUPS * 16].

    32 divides every block size, so a group has one scale. Codes are loaded and looked up as a flat vector: a lookup by
    groups would move every byte between threads first.
    """
    GROUPS: tl.constexpr = o_block.shape[0]
    b_codes = tl.load(p_codes + o_byte, mask=m_byte, other=0)
    b_absmax, b_step = load_scales(p_scales, o_block, m_group, NESTED)
    b_scale = decode_scales(b_absmax, b_step, p_scales, p_tables, NESTED)
    b_code = tl.join(b_codes >> 4, b_codes & 15).reshape(GROUPS * 32).to(tl.int32)
    b_level = tl.gather(tl.load(p_tables + tl.arange(0, 16)), b_code, 0).reshape(GROUPS, 32)
    return b_level * b_scale[:, None]


@triton.jit
def nf4_dequantize_kernel(
    p_codes,
    p_absmax,
    p_nested_absmax,
    p_nested_offset,
    p_tables,
    p_out,
    numel,
    num_bytes,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    NESTED: tl.constexpr,
):
    """out[i] = round(nf4[code[i]] * scale[i // BLOCK]), GROUPS groups of 32 weights a program.

    ``num_bytes`` is an argument since Triton loads byte by byte where it cannot tell that the count is a multiple of
    16.
    """
    i_program = tl.program_id(0).to(tl.int64)
    o_byte = i_program * (GROUPS * 16) + tl.arange(0, GROUPS * 16)
    o_group = i_program * GROUPS + tl.arange(0, GROUPS)
    o_element = o_group[:, None] * 32 + tl.arange(0, 32)[None, :]
    p_scales = (p_absmax, p_nested_absmax, p_nested_offset)
    o_block = o_group // (BLOCK // 32)
    b_value = decode_groups(
        p_codes, p_scales, p_tables, o_byte, o_byte < num_bytes, o_block, o_group * 32 < numel, NESTED
    )
    tl.store(p_out + o_element, b_value.to(p_out.dtype.element_ty), mask=o_element < numel)


@triton.jit
def nf4_dequantize_columns_kernel(
    p_codes,
    p_absmax,
    p_nested_absmax,
    p_nested_offset,
    p_tables,
    p_out,
    groups,
    row_bytes,
    first_byte,
    out_groups,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    NESTED: tl.constexpr,
):
    """The same for a range of columns: ``out_groups`` groups of every row, from ``first_byte`` of its ``row_bytes``.

    ``groups`` is how many groups ``out`` has, fewer than 2^31. Rows and blocks are multiples of 64 weights.
    """
    o_lane = tl.arange(0, GROUPS * 16)
    # for each byte, and for each group: its row of W, and its place there
    o_byte_group = tl.program_id(0) * GROUPS + o_lane // 16
    o_byte = (o_byte_group // out_groups).to(tl.int64) * row_bytes
    o_byte += first_byte + (o_byte_group % out_groups) * 16 + o_lane % 16
    o_group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    o_block = (o_group // out_groups).to(tl.int64) * row_bytes + first_byte + (o_group % out_groups) * 16
    o_block = o_block // (BLOCK // 2)
    p_scales = (p_absmax, p_nested_absmax, p_nested_offset)
    b_value = decode_groups(
        p_codes, p_scales, p_tables, o_byte, o_byte_group < groups, o_block, o_group < groups, NESTED
    )
    o_element = o_group.to(tl.int64)[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(p_out + o_element, b_value.to(p_out.dtype.element_ty), mask=(o_group < groups)[:, None])


# Chosen by the instructions of compiled code; not measured on a device.
GROUPS = 256
WARPS = 4


def nf4_dequantize(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    tables: Tensor,
    block_size: int,
    out: Tensor,
) -> None:
    """Decode into ``out``.

    Args:
        codes: uint8 [ceil(numel/2)].
        absmax: fp32 [blocks]; where nested, uint8 [blocks].
        nested_absmax: fp32 [ceil(blocks/256)], or None.
        nested_offset: fp32 [1], or None.
        tables: fp32 [272], the levels of NF4 and the dynamic map of nested scales.
        block_size: a power of two from 32.
        out: [numel], fp32, bf16 or fp16.
    All are contiguous, on one device, and of the sizes said: the operation has checked them.
    """
    if out.numel() == 0:
        return
    nested = nested_absmax is not None
    with on_device(out):
        nf4_dequantize_kernel[(triton.cdiv(out.numel(), 32 * GROUPS),)](
            codes,
            absmax,
            nested_absmax if nested else absmax,
            nested_offset if nested else absmax,
            tables,
            out,
            out.numel(),
            codes.numel(),
            BLOCK=block_size,
            GROUPS=GROUPS,
            NESTED=nested,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


def nf4_dequantize_columns(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    tables: Tensor,
    block_size: int,
    k: int,
    first: int,
    out: Tensor,
) -> None:
    """Decode columns ``[first, first + columns)`` of a weight [N, k] into ``out``.

    Args:
        codes, absmax, nested_absmax, nested_offset, tables, block_size: of the whole weight, as of ``nf4_dequantize``.
        k: a multiple of 64, as is ``block_size``.
        first: a multiple of 64.
        out: [N, columns], contiguous, of fewer than 2^36 elements; columns a multiple of 64.
    """
    if out.numel() == 0:
        return
    nested = nested_absmax is not None
    groups = out.numel() // 32
    with on_device(out):
        nf4_dequantize_columns_kernel[(triton.cdiv(groups, GROUPS),)](
            codes,
            absmax,
            nested_absmax if nested else absmax,
            nested_offset if nested else absmax,
            tables,
            out,
            groups,
            k // 2,
            first // 2,
            out.shape[1] // 32,
            BLOCK=block_size,
            GROUPS=GROUPS,
            NESTED=nested,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )

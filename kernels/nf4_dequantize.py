"""nf4_dequantize: codes and scales, nested ones too, to values in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from peftrt.kernels._launch import on_device
from peftrt.kernels._nf4 import decode_scales, load_scales


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
    ROWS: tl.constexpr,
    NESTED: tl.constexpr,
):
    """out[i] = round(nf4[code[i]] * scale[i // BLOCK]).

    A program decodes ROWS rows of 32 weights: 32 divides every block size, so a row has one scale. Codes are loaded and
    looked up as a flat vector: a lookup by rows would move every byte between threads first, and ``num_bytes`` is an
    argument since Triton loads byte by byte where it cannot tell that the count is a multiple of 16.
    """
    i_program = tl.program_id(0).to(tl.int64)
    o_byte = i_program * (ROWS * 16) + tl.arange(0, ROWS * 16)
    o_row = i_program * ROWS + tl.arange(0, ROWS)
    o_element = o_row[:, None] * 32 + tl.arange(0, 32)[None, :]
    p_scales = (p_absmax, p_nested_absmax, p_nested_offset)
    b_codes = tl.load(p_codes + o_byte, mask=o_byte < num_bytes, other=0)
    b_absmax, b_step = load_scales(p_scales, o_row // (BLOCK // 32), o_row * 32 < numel, NESTED)
    b_scale = decode_scales(b_absmax, b_step, p_scales, p_tables, NESTED)
    b_code = tl.join(b_codes >> 4, b_codes & 15).reshape(ROWS * 32).to(tl.int32)
    b_level = tl.gather(tl.load(p_tables + tl.arange(0, 16)), b_code, 0).reshape(ROWS, 32)
    b_value = b_level * b_scale[:, None]
    tl.store(p_out + o_element, b_value.to(p_out.dtype.element_ty), mask=o_element < numel)


# Chosen by the instructions of compiled code; not measured on a device.
ROWS = 256
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
        nf4_dequantize_kernel[(triton.cdiv(out.numel(), 32 * ROWS),)](
            codes,
            absmax,
            nested_absmax if nested else absmax,
            nested_offset if nested else absmax,
            tables,
            out,
            out.numel(),
            codes.numel(),
            BLOCK=block_size,
            ROWS=ROWS,
            NESTED=nested,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )

"""adamw_step: a step of AdamW over chunks of many parameters, whose state lies in pages; fp32 or in 8 bits.

Every operation is rounded by itself: products and sums are not contracted, square roots and quotients are the nearest
ones, and subnormal numbers are kept. So the bits are those of every other backend.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftrt.kernels._launch import on_device

# Elements that share a scale, and levels of a map.
BLOCK = tl.constexpr(256)
LEVELS = tl.constexpr(256)


@triton.jit
def at_element(address, first, ELEMENT: tl.constexpr, BITS: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to element ``first`` of a tensor at an address.

    With moments in fp32, of which 16 bytes are 4 elements, 8 bytes of bf16 are loaded at a time: with 16 the moments
    would change threads on their way.
    """
    p_first = address.to(tl.pointer_type(ELEMENT)) + first
    if ALIGNED:
        p_first = tl.multiple_of(p_first, ELEMENT.primitive_bitwidth // 2 if BITS == 32 else 16)
    return p_first


@triton.jit
def updated(b_p, b_g, b_m, b_v, hyper, coefficient):
    """p, m and v after the step, fp32."""
    if coefficient is not None:
        b_g *= coefficient
    b_m += hyper[0] * (b_g - b_m)
    b_v += hyper[1] * (b_g * b_g - b_v)
    b_change = hyper[2] * tl.div_rn(b_m, tl.sqrt_rn(b_v) * hyper[3] + hyper[4])
    return b_p - (hyper[5] * b_p + b_change), b_m, b_v


@triton.jit
def midpoints_below(b_x, p_midpoints, SIGNED: tl.constexpr):
    """How many midpoints of a map lie below x, of magnitude 1 at most: the code of x. All do where x is NaN.

    Levels counted upwards from 0 follow seven lines, one a decade, each a fifth as steep as the one before: x has the
    least of their values. Half a level less, that is right or one too small, however it was rounded; the midpoint above
    decides.
    """
    STEPS: tl.constexpr = 64 if SIGNED else 128
    b_x = tl.where(b_x == b_x, b_x, 1.0)
    b_steps = tl.abs(b_x) * (STEPS / 0.9)
    b_level = b_steps + STEPS * (8 / 9)
    for i in tl.static_range(1, 7):
        b_level = tl.minimum(b_level, b_steps * 5**i + STEPS * (8 / 9) / 2**i)
    b_code = (b_level - (0.5 if SIGNED else 1.5)).to(tl.int32)
    if SIGNED:
        # code 127 is 0; below it lie the same magnitudes but 1
        b_code = tl.maximum(tl.where(b_x < 0, 126 - b_code, 127 + b_code), 0)
    return b_code + (b_x > tl.load(p_midpoints + b_code)).to(tl.int32)


@triton.jit
def load_moment(p_values, p_scale, p_map, o, m, BITS: tl.constexpr):
    """fp32 values; or codes, looked up, times their block's scale."""
    b_value = tl.load(p_values + o, mask=m)
    return b_value if BITS == 32 else tl.load(p_map + b_value.to(tl.int32)) * tl.load(p_scale)


@triton.jit
def store_moment(p_values, p_scale, p_midpoints, b_value, o, m, BITS: tl.constexpr, SIGNED: tl.constexpr):
    """fp32 values; or the block's largest magnitude, of which NaN is the greatest, and the codes of what is left."""
    if BITS == 32:
        tl.store(p_values + o, b_value, mask=m)
    else:
        b_value = b_value if m is None else tl.where(m, b_value, 0.0)
        # as integers magnitudes have the order that they have as numbers, and NaN lies above them
        scale = tl.max(b_value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0).to(tl.float32, bitcast=True)
        b_x = tl.div_rn(b_value, tl.where(scale == 0, 1.0, scale))
        tl.store(p_values + o, midpoints_below(b_x, p_midpoints, SIGNED).to(tl.uint8), mask=m)
        tl.store(p_scale, scale)


@triton.jit
def step_tile(
    p_tensors,
    p_moments,
    p_scales,
    p_tables,
    hyper,
    coefficient,
    o_first,
    count,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """The elements from ``o_first``, in 8 bits a block; where ``RAGGED``, only those below ``count``."""
    o, i_block = o_first + tl.arange(0, TILE), o_first // BLOCK
    m = o < count if RAGGED else None
    b_p = tl.load(p_tensors[0] + o, mask=m).to(tl.float32)
    b_g = tl.load(p_tensors[1] + o, mask=m).to(tl.float32)
    b_m = load_moment(p_moments[0], p_scales[0] + i_block, p_tables, o, m, BITS)
    b_v = load_moment(p_moments[1], p_scales[1] + i_block, p_tables + LEVELS, o, m, BITS)
    b_p, b_m, b_v = updated(b_p, b_g, b_m, b_v, hyper, coefficient)
    tl.store(p_tensors[0] + o, b_p.to(p_tensors[0].dtype.element_ty), mask=m)
    store_moment(p_moments[0], p_scales[0] + i_block, p_tables + 2 * LEVELS, b_m, o, m, BITS, True)
    store_moment(p_moments[1], p_scales[1] + i_block, p_tables + 3 * LEVELS, b_v, o, m, BITS, False)


@triton.jit
def planes_of(p_page, start, room, ELEMENT: tl.constexpr, BITS: tl.constexpr):
    """Where both moments of element ``start`` of a page lie, and their scales, in 8 bits."""
    if BITS == 32:
        p_m = p_page.to(tl.pointer_type(tl.float32)) + start
        return (p_m, p_m + room), (p_m, p_m)
    else:
        # as many codes at a time as elements are 16 bytes
        p_m = tl.multiple_of(p_page + start, 128 // ELEMENT.primitive_bitwidth)
        p_v = tl.multiple_of(p_page + (room + start), 128 // ELEMENT.primitive_bitwidth)
        p_scale = (p_page + 2 * room).to(tl.pointer_type(tl.float32)) + start // BLOCK
        return (p_m, p_v), (p_scale, p_scale + room // BLOCK)


@triton.jit(do_not_specialize=["p_state", "p_chunks", "p_addresses", "p_hyper", "p_coefficient", "p_tables", "blocks"])
def adamw_step_kernel(
    p_state,
    p_chunks,
    p_addresses,
    p_hyper,
    p_coefficient,
    p_tables,
    blocks,
    ELEMENT: tl.constexpr,
    BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_COEFFICIENT: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Every PARTS-th tile of a chunk; ``blocks``: how many a page has room for."""
    p_chunk = p_chunks + (tl.program_id(0) // PARTS).to(tl.int64) * 5
    i_tensor, first = tl.load(p_chunk), tl.load(p_chunk + 1)
    count = tl.load(p_chunk + 2).to(tl.int32)
    p_page = tl.multiple_of(p_state + tl.load(p_chunk + 3), 16)
    start = tl.multiple_of(tl.load(p_chunk + 4), BLOCK)
    address, grad_address = tl.load(p_addresses + i_tensor * 3), tl.load(p_addresses + i_tensor * 3 + 1)
    if grad_address != 0:
        p_param = at_element(address, first, ELEMENT, BITS, ALIGNED)
        p_tensors = (p_param, at_element(grad_address, first, ELEMENT, BITS, ALIGNED))
        p_own = p_hyper + i_tensor * 6
        hyper = (tl.load(p_own), tl.load(p_own + 1), tl.load(p_own + 2))
        hyper += (tl.load(p_own + 3), tl.load(p_own + 4), tl.load(p_own + 5))
        coefficient = tl.load(p_coefficient) if HAS_COEFFICIENT else None
        p_moments, p_scales = planes_of(p_page, start, blocks.to(tl.int64) * BLOCK, ELEMENT, BITS)
        o_first, full = tl.program_id(0) % PARTS * TILE, count // TILE * TILE
        # a tile that is whole needs no mask, with which elements would be loaded one by one
        for i in range(o_first, full, PARTS * TILE):
            step_tile(p_tensors, p_moments, p_scales, p_tables, hyper, coefficient, i, count, BITS, TILE, False)
        if (full < count) & (full % (PARTS * TILE) == o_first):
            step_tile(p_tensors, p_moments, p_scales, p_tables, hyper, coefficient, full, count, BITS, TILE, True)


# Elements that a program takes at a time, how many programs share a chunk, and their warps. Chosen by compiled code;
# not measured on a device. In sm_90's (Triton 3.7.1, November 2026) 1024 elements with fp32 moments take 62 registers,
# so that 8 programs of a multiprocessor have 128 KiB of loads in flight, four times what an H200's memory needs; with
# 39 instructions an element it issues a quarter of the time. In 8 bits 141 instructions an element take twice as long
# as the bytes; a block is a warp's, so that none waits for another, and a chunk four programs', so that few are late.
CONFIGS = {32: {"TILE": 1024, "PARTS": 1, "num_warps": 4}, 8: {"TILE": BLOCK.value, "PARTS": 4, "num_warps": 1}}
ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def adamw_step(
    state: Tensor,
    chunks: Tensor,
    addresses: Tensor,
    hyper: Tensor,
    coefficient: Tensor | None,
    tables: Tensor | None,
    bits: int,
    room: int,
    dtype: torch.dtype,
    aligned: bool,
) -> None:
    """Update the parameters and the state of ``chunks``.

    Args:
        state: uint8 [bytes], whose pages begin at multiples of 16 bytes.
        chunks: int64 [C, 5]: tensor, first element, how many, offset of the page, first element there.
        addresses: int64 [T, 3]: of parameter and gradient, the latter 0 where there is none; the third is not read.
        hyper: fp32 [T, 6]: 1 - beta1, 1 - beta2, step_size, correction, eps, lr * weight_decay.
        coefficient: of gradients, fp32 [], or None.
        tables: fp32 [1024] for 8 bits: levels of exp_avg and of exp_avg_sq, then the midpoints of each, 255 and one
            that is not read.
        bits: 32 or 8.
        room: elements of a page, a multiple of BLOCK.
        dtype: of parameters and gradients; fp32, bf16 or fp16.
        aligned: chunks begin at multiples of 16 bytes of both.
    All tensors are contiguous and on one device.
    """
    if chunks.shape[0] == 0:
        return
    config = CONFIGS[bits]
    with on_device(state):
        adamw_step_kernel[(chunks.shape[0] * config["PARTS"],)](
            state,
            chunks,
            addresses,
            hyper,
            hyper if coefficient is None else coefficient,
            hyper if tables is None else tables,
            room // BLOCK.value,
            ELEMENT=ELEMENTS[dtype],
            BITS=bits,
            ALIGNED=aligned,
            HAS_COEFFICIENT=coefficient is not None,
            **config,
            enable_fp_fusion=False,
        )
